"""OpenVINO on CPUs: the quick engine where there is no GPU."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from accel import cache as store
from accel.engine import EngineSpec, Sampled, TensorSpec, check
from accel.machine import cpu_name, giving_way, physical_cores
from accel.quantised import LARGEST_ERROR, Refused, Samples, difference, library_version, quantised

if TYPE_CHECKING:
    import openvino
    from torch import Tensor, nn

log = logging.getLogger(__name__)

FORMAT = 2  # raise it when the conversion below, or that to int8, changes what a blob computes
PRECISION = "INFERENCE_PRECISION_HINT"


def library() -> ModuleType:
    """Import OpenVINO with its usage reporting off; import it nowhere else.

    Left alone, `import openvino` and each conversion send events to its vendor and write to ~/intel, without asking,
    unless the user has opted out. Where its telemetry package cannot be imported OpenVINO uses its own silent stub:
    that is what happens here.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    module: ModuleType = openvino
    return module


class OpenVINOBackend:
    """Compiles for one OpenVINO device, in bf16 for "fast" specs where the device has it, else in fp32.

    "int8" specs are quantised once, judged by samples that were not used for that, and kept in the cache as what they
    came to: where int8 is too far from float32 or cannot be had, as "fast" ones. One line in the log says which.
    `int8=False` takes them as "fast" ones to begin with, to be compared with. `threads` bounds the inference threads;
    by default the physical cores this process may use.

    >>> engine = OpenVINOBackend(threads=2).load(build_decoder, spec, cache=default_root())
    """

    name = "openvino"

    def __init__(self, device: str = "CPU", threads: int | None = None, int8: bool = True) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads is at least 1, not {threads}")
        self.device = device
        self.threads = threads or physical_cores()
        self._int8 = int8
        openvino = library()
        self._core = openvino.Core()
        capabilities = sorted(self._core.get_property(device, "OPTIMIZATION_CAPABILITIES"))
        self._has_bf16, self._has_int8 = "BF16" in capabilities, "INT8" in capabilities
        self.fingerprint = (
            f"openvino {openvino.get_version()}; torch {version('torch')}; format {FORMAT}; "
            f"{device} {cpu_name()}; {' '.join(capabilities)}; threads={self.threads}; nncf {library_version()}"
        )

    def load(self, module: Callable[[], nn.Module], spec: EngineSpec, cache: Path | None = None) -> OpenVINOEngine:
        """Import the engine from the cache folder, or trace, compile and store it.

        Raises ValueError when the module's inputs or outputs are not those of the spec. The engine's threads give way
        to others of this process: a stream's frame lane must not wait for its model.
        """
        return giving_way(lambda: self._load(module, spec, cache))

    def _load(self, module: Callable[[], nn.Module], spec: EngineSpec, cache: Path | None) -> OpenVINOEngine:
        if spec.precision == "int8" and not self._int8:
            spec = replace(spec, precision="fast")
        key = store.key_of(self.fingerprint, spec)
        compiled = self._imported(cache, key, spec) if cache else None
        if compiled is None:
            started = time.perf_counter()
            net = module()
            model, error = converted(net, spec), None
            if spec.precision == "int8":
                model, error = self._judged(model, net, spec)
            compiled = self._core.compile_model(model, self.device, self._properties(spec))
            build_s = time.perf_counter() - started
            if cache:
                store.write(cache, key, compiled.export_model().getvalue(), build_s, error=error)
        return OpenVINOEngine(spec, compiled)

    def _judged(self, model: openvino.Model, net: nn.Module, spec: EngineSpec) -> tuple[openvino.Model, float | None]:
        """The model in int8 and its error, or as it is and None."""
        try:
            if not self._has_int8:
                raise Refused("this device has none")
            samples = list(net.samples(spec.inputs)) if isinstance(net, Sampled) else []
            judges = len(samples) // 3
            if not judges:
                raise Refused("nothing to judge it by")
            found = quantised(model.clone(), samples[judges:])
            error = difference(
                self._outputs(found, spec, samples[:judges]),
                self._outputs(model, replace(spec, precision="fp32"), samples[:judges]),
            )
            if not error < LARGEST_ERROR:  # a NaN too
                raise Refused(f"{error:.1%} from float32, which is too far")
        except Refused as reason:
            log.info("%s: no int8 (%s), %s instead", spec.name, reason, self._properties(spec)[PRECISION])
            return model, None
        log.info("%s: int8, %.2g from float32", spec.name, error)
        return found, error

    def _outputs(self, model: openvino.Model, spec: EngineSpec, samples: Samples) -> Samples:
        engine = OpenVINOEngine(spec, self._core.compile_model(model, self.device, self._properties(spec)))
        return [tuple(output.clone() for output in engine(*sample)) for sample in samples]

    def _imported(self, cache: Path, key: store.Key, spec: EngineSpec) -> openvino.CompiledModel | None:
        blob = store.read(cache, key)
        if blob is None:
            return None
        try:
            return self._core.import_model(blob, self.device, self._properties(spec))
        except RuntimeError as error:  # all that OpenVINO raises; its last line says why
            reason = str(error).strip().splitlines()[-1]
            log.warning("cached engine %s cannot be imported (%s): building it again", spec.name, reason)
            store.drop(cache, store.digest_of(key))
            return None

    def _properties(self, spec: EngineSpec) -> dict[str, Any]:
        precision = "bf16" if self._has_bf16 and spec.precision != "fp32" else "f32"
        # OpenVINO 2026.4's code generator for fused subgraphs ("snippets") crashes on the UNet of `mini` in float32.
        whole = {"SNIPPETS_MODE": "DISABLE"} if precision == "f32" else {}
        threads = {"INFERENCE_NUM_THREADS": self.threads}
        return {"PERFORMANCE_HINT": "LATENCY", PRECISION: precision, **threads, **whole}


def converted(module: nn.Module, spec: EngineSpec) -> openvino.Model:
    """Trace the module into an OpenVINO model of the spec's static shapes and dtypes."""
    import torch

    openvino = library()
    example = tuple(torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in spec.inputs)
    with torch.inference_mode(), warnings.catch_warnings():
        # Tracing warns of every shape that Python code looks at; shapes are static here.
        warnings.simplefilter("ignore")
        model = openvino.convert_model(module.eval(), example_input=example)
    if len(model.inputs) != len(spec.inputs):
        raise ValueError(f"{spec.name}: {len(spec.inputs)} inputs in the spec, {len(model.inputs)} in the module")
    model.reshape(
        {port: openvino.PartialShape(list(s.shape)) for port, s in zip(model.inputs, spec.inputs, strict=True)}
    )
    found = tuple(TensorSpec(s.name, *_shape_dtype(p)) for p, s in zip(model.outputs, spec.outputs, strict=False))
    if len(model.outputs) != len(spec.outputs) or found != spec.outputs:
        raise ValueError(f"{spec.name}: outputs are {spec.outputs} in the spec, {found} in the module")
    return model


def _shape_dtype(port: Any) -> tuple[tuple[int, ...], str]:
    return tuple(port.shape), str(port.element_type.to_dtype())


class OpenVINOEngine:
    """A compiled model and its one infer request.

    Inputs are read where they lie (a copy is made of those that are not contiguous). Outputs are tensors of this
    engine, written anew by each launch: clone what must live longer.
    """

    def __init__(self, spec: EngineSpec, compiled: openvino.CompiledModel) -> None:
        import torch

        self.spec = spec
        self._tensor = library().Tensor
        self._request = compiled.create_infer_request()
        self._outputs = tuple(torch.empty(s.shape, dtype=getattr(torch, s.dtype)) for s in spec.outputs)
        for index, output in enumerate(self._outputs):
            self._request.set_output_tensor(index, self._tensor(output.numpy(), shared_memory=True))

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.launch(*tensors).wait()

    def launch(self, *tensors: Tensor) -> OpenVINOPending:
        """Start on OpenVINO's own threads, after the launch before this one has finished."""
        check(tensors, self.spec.inputs, self.spec.name)
        self._request.wait()
        inputs = tuple(t.detach().cpu().contiguous() for t in tensors)
        for index, tensor in enumerate(inputs):
            self._request.set_input_tensor(index, self._tensor(tensor.numpy(), shared_memory=True))
        self._request.start_async()
        return OpenVINOPending(self._request, inputs, self._outputs)


class OpenVINOPending:
    """One run of an infer request; it holds the inputs, whose memory OpenVINO reads."""

    def __init__(self, request: openvino.InferRequest, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        self._request = request
        self._inputs = inputs
        self._outputs = outputs

    def done(self) -> bool:
        return bool(self._request.wait_for(0))

    def wait(self) -> tuple[Tensor, ...]:
        self._request.wait()
        return self._outputs
