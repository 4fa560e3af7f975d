"""PyTorch on an NVIDIA GPU: compiled by inductor, half precision, one CUDA graph per engine."""

from __future__ import annotations

import ctypes
import logging
import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel import cache as store
from accel.engine import EngineSpec, Pending, check
from accel.export import example, typed_module
from accel.graphs import Recorder, Replay, recorded, recording
from accel.torch_backend import placed
from accel.transfer import device_errors, enqueued, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the steps from module to engine change
MODE = "max-autotune-no-cudagraphs"


class CudaBackend:
    """Compiles with `torch.compile` and records each engine's launch as one CUDA graph.

    The graphs are our own and not inductor's (mode "max-autotune"): those belong to one thread, leave out the copies in
    and out, and cannot become part of the graph of a whole frame. A "fast" engine computes in float16; where that
    overflows on noise, in bfloat16. What cannot be compiled runs eagerly, with one line in the log. `mode=None`
    compiles nothing, `record=None` records nothing: what is left of both is eager PyTorch, to be compared with.

    >>> engine = CudaBackend().load(build_decoder, spec, cache=default_root())
    """

    def __init__(
        self,
        device: str = "cuda",
        mode: str | None = MODE,
        record: Recorder | None = recorded,
        dtype: str | None = None,
    ) -> None:
        import torch

        self.device = device
        self._on, self._mode, self._record = torch.device(device), mode, record
        kinds = {(True, True): "torch-cuda", (True, False): "torch-cuda-compiled", (False, True): "torch-cuda-graph"}
        self.name = kinds.get((mode is not None, record is not None), "torch-cuda-eager")
        self.dtypes = (dtype,) if dtype else fast_dtypes(self._on)
        self.fingerprint = (
            f"torch-cuda {version('torch')}; CUDA {torch.version.cuda}; driver {driver_version()}; "
            f"{hardware(self._on)}; fast={','.join(self.dtypes)}; {mode}; format {FORMAT}"
        )

    def load(self, module: Callable[[], nn.Module], spec: EngineSpec, cache: Path | None = None) -> CudaEngine:
        """Compile, or with what the cache has of it; UserError where the GPU's memory does not hold it.

        Weights are in no cache: `module` is called every time. Raises ValueError for a spec that is not the module's.
        """
        import torch

        with torch.inference_mode(), device_errors(spec.name):
            inputs = tuple(tensor.to(self._on) for tensor in example(spec))
            net = self._sound(module, spec, inputs)
            replay = self._compiled(net, spec, inputs, cache) if self._mode else self._replay(net, spec, inputs)
            return CudaEngine(spec, replay, self._on, self._record)

    def _sound(self, module: Callable[[], nn.Module], spec: EngineSpec, inputs: tuple[Tensor, ...]) -> nn.Module:
        """The module in the first format that does not overflow, its outputs checked against the spec."""
        import torch

        formats = ("float32",) if spec.precision == "fp32" else self.dtypes
        for name in formats:
            dtype: torch.dtype = getattr(torch, name)
            with torch.inference_mode(False):  # weights are ordinary tensors, as tracing wants them
                net = typed_module(placed(module(), self.device, dtype), spec, dtype)
            outputs = net(*inputs)
            check(outputs, spec.outputs, f"{spec.name} on {self.name}: output")
            if all(bool(o.isfinite().all()) for o in outputs):
                break
            log.info("%s overflows in %s", spec.name, name)
        return net

    def _compiled(self, net: nn.Module, spec: EngineSpec, inputs: tuple[Tensor, ...], cache: Path | None) -> Replay:
        import torch

        key = store.key_of(self.fingerprint, spec)
        with ExitStack() as stack:
            stack.enter_context(own_artifacts())
            stack.enter_context(warnings.catch_warnings(action="ignore"))  # PyTorch warns of its own code
            had = bool(cache) and restored(cache, key)
            started = time.perf_counter()
            try:
                flat = torch.export.export(net, inputs, strict=False).module()  # hooks and features traced away
                function = torch.compile(flat, mode=self._mode, fullgraph=True, dynamic=False)
                replay = self._replay(function, spec, inputs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 whatever a compiler's failure is, it costs speed and not the stream
                log.warning("%s is not compiled (%s): it runs as it is", spec.name, first_line(error))
                return self._replay(net, spec, inputs)
            if cache and not had and (made := torch.compiler.save_cache_artifacts()):
                store.write(cache, key, made[0], time.perf_counter() - started)
        return replay

    def _replay(self, function: Callable[..., Any], spec: EngineSpec, inputs: tuple[Tensor, ...]) -> Replay:
        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            with tuned(self._on, spec):  # also where it is recorded as a part of a larger graph
                found: tuple[Tensor, ...] = function(*tensors)
            return found

        return Replay(call, inputs, spec.name, self._on, self._record)


class CudaEngine:
    """A compiled network with its inputs and outputs on the GPU; outputs are valid until the next launch.

    It runs on the caller's current stream. Inputs may be anywhere; launched while a larger graph is being recorded, it
    becomes a part of that.
    """

    def __init__(self, spec: EngineSpec, replay: Replay, device: torch.device, record: Recorder | None) -> None:
        self.spec = spec
        self.replay = replay
        self.device = device
        self.record = record  # how a larger graph with it inside can be recorded

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs, still being computed: whatever uses them on this stream comes behind. Waits for nothing."""
        import torch

        check(tensors, self.spec.inputs, self.spec.name)
        with torch.inference_mode(), nullcontext() if recording(self.device) else device_errors(self.spec.name):
            return self.replay(*tensors)

    def launch(self, *tensors: Tensor) -> Pending:
        return enqueued(self(*tensors), self.device)


def fast_dtypes(device: torch.device) -> tuple[str, ...]:
    """What "fast" may be, the first choice first: tensor cores for float16 since 7.0, for bfloat16 since 8.0."""
    import torch

    if device.type != "cuda":
        return ("float32",)
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 0):
        return ("float32",)
    return ("float16", "bfloat16" if capability >= (8, 0) else "float32")


def tuned(device: torch.device, spec: EngineSpec) -> AbstractContextManager[None]:
    """Let cuDNN try its algorithms the first time, and compute exactly in engines that are to be exact."""
    import torch

    if device.type != "cuda":
        return nullcontext()
    exact = spec.precision == "fp32"
    found: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=not exact)
    return found


def own_artifacts() -> AbstractContextManager[Any]:
    """Collect what is compiled within the block apart from what the process compiled before."""
    try:
        from torch.compiler._cache import CacheArtifactManager

        fresh: AbstractContextManager[Any] = CacheArtifactManager.with_fresh_cache()
    except (ImportError, AttributeError):  # not public: without it an entry also holds what came before
        return nullcontext()
    return fresh


def restored(cache: Path | None, key: store.Key) -> bool:
    """Whether the cache had compiled code of this key; it then lies where inductor looks for it.

    Inductor's working folder is beside our entries, and may be removed whenever nothing runs.
    """
    import torch

    assert cache is not None
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    blob = store.read(cache, key)
    if blob is None:
        return False
    try:
        found = torch.compiler.load_cache_artifacts(blob)
        reason = "nothing of this PyTorch in it"
    except Exception as error:  # noqa: BLE001 unpickling another version's may raise anything
        found, reason = None, first_line(error)
    if found is None:
        log.warning("compiled code in the cache cannot be used (%s): compiling again", reason)
        store.drop(cache, store.digest_of(key))
    return found is not None


def hardware(device: torch.device) -> str:
    """The GPU's name and architecture, as in "NVIDIA H200 sm_90"."""
    import torch

    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"


def driver_version() -> str:
    """Of NVIDIA's kernel driver, as in "580.159.03"; "none" where there is none."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(80)
        if library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(text, len(text)):
            return "none"
        library.nvmlShutdown()
    except (OSError, AttributeError):
        return "none"
    return text.value.decode()
