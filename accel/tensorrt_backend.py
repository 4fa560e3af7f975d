"""TensorRT, of either provider: engines out of the cache, or given other weights, or built, and then compared.

What the engines of a backend need between their layers is one buffer, as large as the largest of them asks for, so they
run one after the other: what is to run beside them, on another lane, takes a backend of its own. LoRAs that come and
go are tensors (`models/slots.py`); other weights are for checkpoints. Nothing here is made without a device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel import cache as store
from accel import export, refit
from accel.engine import EngineSpec, Sampled
from accel.errors import UserError
from accel.graphs import Recorder, recorded
from accel.quantised import difference
from accel.tensorrt_build import Built, alone, built
from accel.tensorrt_compiler import Recipe
from accel.tensorrt_engine import Scratch, TensorRTEngine
from accel.tensorrt_jit import Kernels
from accel.tensorrt_provider import lack, provider_for
from accel.transfer import device_errors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger(__name__)

LARGEST_ERROR = 0.05  # relative L2, of an engine that is kept
LARGEST_OF_EIGHTHS = 0.2  # in 8-bit floats, whose pictures were judged before; random UNets come to 0.15
LARGEST_OF_OPEN = 0.01  # with weights that can be replaced: where those are, TensorRT is known to lose biases


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
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime = self._trt.Runtime(self._logger)
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
                engine = self._stored(spec, cache, key) or self._refitted(module, spec, cache, key)
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

    def _refitted(
        self, module: Callable[[], nn.Module], spec: EngineSpec, root: Path, key: store.Key
    ) -> TensorRTEngine | None:
        """An engine of the same architecture with this one's weights, stored as its own; None where there can be none.

        It is compared with the module, as one that was built.
        """
        for entry, weights in refit.relatives(root, key) if spec.architecture else ():
            started, blob = time.monotonic(), store.read(root, entry.key)
            raw = self._runtime.deserialize_cuda_engine(blob) if blob else None
            if raw is None:
                continue
            net = module()
            given = export.example(spec)
            wanted = self._eager(net, spec, given)
            try:
                after = refit.refit(self._trt, raw, self._logger, weights, net, self._stream())
                self._wait()  # its first launches are on a stream of their own
                engine = TensorRTEngine(self._trt, raw, spec, self._scratch, Kernels(raw, None), self._record)
                error = difference([engine(*given)], [tuple(wanted)])
                if not error < LARGEST_OF_OPEN:
                    raise refit.Refused(f"it is {error:.1%} from the network then")
            except refit.Refused as reason:
                self._say(f"{spec.name}: engine {entry.digest} cannot have these weights ({reason}): building another")
                return None
            config = raw.create_serialization_config()
            config.set_flag(self._trt.SerializationFlag.INCLUDE_REFIT)
            plan, spent_s = bytes(raw.serialize_with_config(config)), time.monotonic() - started
            store.write(root, key, plan, spent_s, error=error, beside={refit.NAME: after.to_json()})
            engine.keep(root / store.digest_of(key))
            self._say(f"{spec.name}: other weights for engine {entry.digest} in {spent_s:.0f} s, error {error:.1e}")
            return engine
        return None

    def _built(
        self, module: Callable[[], nn.Module], spec: EngineSpec, root: Path, key: store.Key | None
    ) -> TensorRTEngine:
        given: list[Tensor] = []
        wanted: list[Tensor] = []

        def look(net: nn.Module) -> None:
            if spec.precision == "fp8" and isinstance(net, Sampled):
                given[:] = next(iter(net.samples(spec.inputs)))
            else:
                given[:] = export.example(spec)
            wanted[:] = self._eager(net, spec, given)

        started = time.monotonic()
        with built(module, spec, self.recipe, root, self._say, look) as made:
            build_s = time.monotonic() - started
            engine = self._opened(made.file.read_bytes(), spec, None)
            if engine is None:
                raise UserError(f"{spec.name}: TensorRT does not take its own engine", hint="use --engine torch-cuda")
            error = difference([engine(*given)], [tuple(wanted)])
            if not error < largest_error(made):  # a NaN too
                plain = replace(spec, precision="fp32" if spec.precision == "fp32" else "fast", architecture="")
                if plain != spec:
                    del engine  # and its memory
                    self._say(f"{spec.name}: {error:.1%} from the network it was made of, building a plain one")
                    return self._built(module, plain, root, key)
                raise UserError(
                    f"{spec.name}: TensorRT's engine is {error:.1%} from the network it was made of",
                    hint="use --engine torch-cuda, and report it",
                )
            if key:
                store.write(root, key, made.file, build_s, error=error, beside=made.beside)
                engine.keep(root / store.digest_of(key))
        self._say(f"{spec.name}: built in {build_s:.0f} s, error {error:.1e}")
        return engine

    def _eager(self, net: nn.Module, spec: EngineSpec, given: Sequence[Tensor]) -> list[Tensor]:
        """What the module itself makes of this on the device, in the engine's precision, which it has from then on."""
        import torch

        dtype: torch.dtype = getattr(torch, "float32" if spec.precision == "fp32" else self.recipe.half)
        with torch.inference_mode(False), torch.no_grad():
            typed = export.typed_module(net, spec, dtype).to(self.device)
            found = [output.clone() for output in typed(*(t.to(self.device) for t in given))]
            typed.to("cpu")  # for the export, and so that the GPU is the engine's
        return found

    def _stream(self) -> int:
        """The handle of the caller's stream."""
        import torch

        device = self._scratch.device
        return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0

    def _wait(self) -> None:
        import torch

        if self._scratch.device.type == "cuda":
            torch.cuda.synchronize(self._scratch.device)

    def _opened(self, blob: bytes, spec: EngineSpec, folder: Path | None) -> TensorRTEngine | None:
        raw = self._runtime.deserialize_cuda_engine(blob)
        if raw is None:
            return None
        engine = TensorRTEngine(self._trt, raw, spec, self._scratch, Kernels(raw, folder), self._record)
        if folder:
            engine.keep(folder)
        return engine


def largest_error(made: Built) -> float:
    """How far such an engine may be from the network it was made of."""
    if made.error is not None:
        return LARGEST_OF_EIGHTHS
    return LARGEST_OF_OPEN if refit.NAME in made.beside else LARGEST_ERROR
