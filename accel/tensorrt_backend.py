"""TensorRT's engines at work, of either provider: bound once to static tensors, launched as one CUDA graph.

What the engines of a backend need between their layers is one buffer, as large as the largest of them asks for, so they
run one after the other: what is to run beside them, on another lane, takes a backend of its own. LoRAs come in as
tensors (`models/slots.py`), so that no engine is ever refitted. Nothing here is made without a device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel import cache as store
from accel import export
from accel.engine import EngineSpec, Pending, check
from accel.errors import UserError
from accel.graphs import Recorder, Replay, recorded, recording
from accel.hold import Held, hold
from accel.tensorrt_build import Recipe, alone, built
from accel.tensorrt_jit import Kernels
from accel.tensorrt_provider import lack, provider_for
from accel.transfer import Event, device_errors, enqueued, event

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger(__name__)

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64",
          "BOOL": "bool", "UINT8": "uint8", "INT8": "int8"}  # fmt: skip
ALIGNED = 256  # bytes, of every bound address
LARGEST_ERROR = 0.05  # relative L2, of an engine that is kept


class TensorRTBackend:
    """Compiles for one CUDA device, "fast" specs in `half`. UserError where TensorRT cannot run here.

    `record` is as for `CudaBackend`. An engine is compared with its module when it is built, never when it is loaded.

    >>> engine = TensorRTBackend().load(graph.build, graph.spec, default_root())
    """

    name = "tensorrt"

    def __init__(
        self,
        device: str = "cuda",
        half: str = "float16",
        record: Recorder | None = recorded,
        say: Callable[[str], None] = log.info,
    ) -> None:
        import torch

        major, minor = torch.cuda.get_device_capability(device)
        target = f"sm_{major}{minor}"
        if problem := lack(target):
            raise problem
        self.device = device
        self.recipe = Recipe(provider_for(target), target, half)
        self.fingerprint = self.recipe.fingerprint
        self._record, self._say = record, say
        self._trt: Any = self.recipe.provider.library()
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        self._scratch = Scratch(torch.device(device))

    def load(self, module: Callable[[], nn.Module], spec: EngineSpec, cache: Path | None = None) -> TensorRTEngine:
        """Take the engine from the cache, or build it, compare it with the module and store it.

        UserError where it cannot be built, computes something else, or the GPU's memory does not hold it.
        """
        with device_errors(spec.name):
            if cache is None:
                return self._built(module, spec, store.default_root(), None)
            key = store.key_of(self.fingerprint, spec)
            with alone(cache, key):
                engine = self._stored(spec, cache, key)
                return engine or self._built(module, spec, cache, key)

    def _stored(self, spec: EngineSpec, root: Path, key: store.Key) -> TensorRTEngine | None:
        """The cache's engine, or None; one that this card, driver or version does not take is dropped."""
        blob, folder = store.read(root, key), root / store.digest_of(key)
        if blob is None:
            return None
        engine = self._opened(blob, spec, folder)
        if engine is None:
            log.warning("cached engine %s is not taken by this TensorRT: building it again", folder)
            store.drop(root, folder.name)
        return engine

    def _built(
        self, module: Callable[[], nn.Module], spec: EngineSpec, root: Path, key: store.Key | None
    ) -> TensorRTEngine:
        wanted: list[Tensor] = []

        def seen() -> nn.Module:
            net = module()
            wanted[:] = self._eager(net, spec)
            return net

        started = time.monotonic()
        with built(seen, spec, self.recipe, root, self._say) as file:
            build_s = time.monotonic() - started
            engine = self._opened(file.read_bytes(), spec, None)
            if engine is None:
                raise UserError(f"{spec.name}: TensorRT does not take its own engine", hint="use --engine torch-cuda")
            error = difference(engine(*export.example(spec)), wanted)
            if not error < LARGEST_ERROR:  # a NaN too
                raise UserError(
                    f"{spec.name}: TensorRT's engine is {error:.1%} from the network it was made of",
                    hint="use --engine torch-cuda, and report it",
                )
            if key:
                store.write(root, key, file, build_s, error=error)
                engine.keep(root / store.digest_of(key))
        self._say(f"{spec.name}: built in {build_s:.0f} s, error {error:.1e}")
        return engine

    def _eager(self, net: nn.Module, spec: EngineSpec) -> list[Tensor]:
        """What the module itself makes of the example on this device, in the engine's precision."""
        import torch

        dtype: torch.dtype = getattr(torch, "float32" if spec.precision == "fp32" else self.recipe.half)
        with torch.inference_mode(False), torch.no_grad():
            typed = export.typed_module(net, spec, dtype).to(self.device)
            found = [output.clone() for output in typed(*(t.to(self.device) for t in export.example(spec)))]
            typed.to("cpu")  # for the export, and so that the GPU is the engine's
        return found

    def _opened(self, blob: bytes, spec: EngineSpec, folder: Path | None) -> TensorRTEngine | None:
        raw = self._runtime.deserialize_cuda_engine(blob)
        if raw is None:
            return None
        engine = TensorRTEngine(self._trt, raw, spec, self._scratch, Kernels(raw, folder), self._record)
        if folder:
            engine.keep(folder)
        return engine


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


def difference(found: tuple[Tensor, ...], wanted: list[Tensor]) -> float:
    """The largest relative L2 difference of an output."""
    return max(
        float((f.double() - w.double()).norm() / w.double().norm().clamp_min(1e-12))
        for f, w in zip(found, wanted, strict=True)
    )
