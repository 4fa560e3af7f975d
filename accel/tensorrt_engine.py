"""An engine of TensorRT at work, of either provider: bound once to static tensors, launched as one CUDA graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel import export
from accel.engine import EngineSpec, Pending, check
from accel.errors import UserError
from accel.graphs import Recorder, Replay, recording
from accel.hold import Held, hold
from accel.tensorrt_jit import Kernels
from accel.transfer import Event, device_errors, enqueued, event

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64",
          "BOOL": "bool", "UINT8": "uint8", "INT8": "int8"}  # fmt: skip
ALIGNED = 256  # bytes, of every bound address


class Scratch:
    """Memory for what lies between layers, of engines that run one after the other on one device."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        self.last: Event = event(device)  # recorded behind each launch that uses it
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def of(self, size: int) -> Tensor:
        """A buffer of at least so many bytes. Those given before stay valid: recorded graphs know their addresses."""
        import torch

        if size > self._buffer.numel():
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self._buffer


class Bound:
    """An execution context of a static engine, and the tensors it reads and writes; called, it launches its kernels."""

    def __init__(self, raw: Any, context: Any, spec: EngineSpec, device: torch.device) -> None:
        import torch

        self.spec, self.device = spec, device
        self._context = context
        names = export.output_names(spec)
        for expected, name in (*((s, s.name) for s in spec.inputs), *zip(spec.outputs, names, strict=True)):
            shape, dtype = tuple(raw.get_tensor_shape(name)), DTYPES.get(raw.get_tensor_dtype(name).name)
            if shape != expected.shape or dtype != expected.dtype:
                wanted = f"{expected.dtype} {expected.shape}"
                raise ValueError(f"{spec.name}: the engine's {name} is {dtype} {shape}, not {wanted}")
        self.outputs = tuple(torch.zeros(s.shape, dtype=getattr(torch, s.dtype), device=device) for s in spec.outputs)
        for tensor, name in zip(self.outputs, names, strict=True):
            self._bind(tensor, name)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Enqueue on the current stream; the inputs are always the same tensors, those of `Replay`."""
        import torch

        for tensor, spec in zip(inputs, self.spec.inputs, strict=True):
            self._bind(tensor, spec.name)
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        if not self._context.execute_async_v3(stream):
            raise RuntimeError(f"{self.spec.name}: TensorRT could not enqueue")
        return self.outputs

    def _bind(self, tensor: Tensor, name: str) -> None:
        """Let the engine read or write there; nothing happens where it already does."""
        address = tensor.data_ptr()
        if self._context.get_tensor_address(name) == address:
            return
        fits = tensor.is_contiguous() and address % ALIGNED == 0
        if not fits or not self._context.set_tensor_address(name, address):  # it says False where others raise
            raise RuntimeError(f"{self.spec.name}: {name} cannot be bound")


class TensorRTEngine:
    """An engine with its inputs and outputs on the GPU; outputs are valid until the next launch.

    It runs on the caller's current stream, behind the launch before of any engine of its backend. Inputs may be
    anywhere; launched while a larger graph is being recorded, it becomes a part of that.
    """

    def __init__(
        self, trt: Any, raw: Any, spec: EngineSpec, scratch: Scratch, kernels: Kernels, record: Recorder | None
    ) -> None:
        import torch

        self.spec = spec
        self.device = scratch.device
        self.record = record  # how a larger graph with it inside can be recorded
        self._raw, self._shared, self._kernels = raw, scratch, kernels
        self._held: Held | None = None
        context = kernels.context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise UserError(f"{spec.name}: no room on the GPU for this engine", hint="a smaller --size or --model")
        self._scratch = scratch.of(int(raw.device_memory_size_v2))
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        with torch.inference_mode(False):  # or nothing else could write to its tensors
            bound = Bound(raw, context, spec, self.device)
            self.replay = Replay(bound, export.example(spec), spec.name, self.device, record)
        kernels.save()

    def keep(self, folder: Path) -> None:
        """Its place in the cache: not to be pruned while it is in use, and where the compiled kernels go."""
        self._held = hold(folder)
        self._kernels.folder = folder
        self._kernels.save()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs, still being computed: whatever uses them on this stream comes behind. Waits for nothing."""
        import torch

        check(tensors, self.spec.inputs, self.spec.name)
        if recording(self.device):
            return self.replay(*tensors)
        with torch.inference_mode(), device_errors(self.spec.name):
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).wait_event(self._shared.last)  # type: ignore[arg-type]
            outputs = self.replay(*tensors)
            self._shared.last.record()
        return outputs

    def launch(self, *tensors: Tensor) -> Pending:
        return enqueued(self(*tensors), self.device)
