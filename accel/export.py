"""A module as an ONNX file of static shapes and strong types: what TensorRT compiles, and ONNX Runtime can check.

Precision lives in the file. A module that is not "fp32" is cast to half precision; what must not be stays float32:
- The graph's inputs and outputs keep the dtypes of the spec, so engines are interchangeable; casts stand at the edges.
- Timesteps (`KEPT`) go in uncast: half precision is exact up to 2048 only, bf16 up to 256. diffusers works out their
  sinusoids in float32 and casts those itself.
- Norms and softmax have half inputs and outputs. Inside, GroupNormalization (its `stash_type`) and TensorRT's norms and
  attention compute in float32, as torch does, so there is nothing to cast around them.
A spec that asks for fp32, as SDXL's own autoencoder does, is exported as it is.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.engine import EngineSpec, check
from accel.errors import UserError
from accel.fp8 import FORMAT as EIGHTHS
from accel.fp8 import Reaches, quantised
from accel.onnx_graph import cast_bytes_first, join_one_type, widen_residuals

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

FORMAT = 1  # raise it when the export changes what a file computes: part of every key
OPSET, OLDER = 23, 21  # 23 has Attention; 21 spells it out, for older parsers and for heads that no kernel fits
KEPT = ("t",)  # inputs that stay float32
HALVES = ("float16", "bfloat16")
SMALL = 16 << 10  # bytes of a tensor that stays in the file itself: shapes and sizes are read without the weights


@dataclass(frozen=True, slots=True)
class Exported:
    """An ONNX file, with its weights beside it where they are large."""

    path: Path
    opset: int
    nodes: int


def recipe(opset: int = OPSET, half: str = "float16") -> str:
    """Everything but module and spec that decides what is in the file, for keys."""
    made = f"torch {version('torch')}; onnxscript {version('onnxscript')}; export {FORMAT}; fp8 {EIGHTHS}"
    return f"opset {opset}; {half}; {made}"


def missing() -> UserError | None:
    """What the export lacks here, or None."""
    from importlib.util import find_spec

    lack = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if not lack:
        return None
    return UserError(f"{' and '.join(lack)}: not installed", hint="pip install 'livestyle[rtx]'")


def export(
    module: nn.Module,
    spec: EngineSpec,
    path: Path,
    opset: int = OPSET,
    half: str = "float16",
    *,
    wide: bool = False,
    eighths: Reaches | None = None,
) -> Exported:
    """Write the module, which is cast in place, as `path` and `path`.data; inputs and outputs are named by the spec.

    `wide` is for Turing, see `accel.onnx_graph.widen_residuals`; layers named by `eighths` are in 8-bit floats
    (`accel.fp8`).

    Raises ValueError where the module's inputs or outputs are not those of the spec.

    >>> export(net, spec, Path("unet.onnx"))
    Exported(path=PosixPath('unet.onnx'), opset=23, nodes=516)
    """
    import onnx_ir
    import torch

    if half not in HALVES:
        raise ValueError(f"half precision is one of {', '.join(HALVES)}, not {half!r}")
    dtype: torch.dtype = getattr(torch, "float32" if spec.precision == "fp32" else half)
    typed = typed_module(module, spec, dtype)
    given = zeros(spec)
    with torch.no_grad(), _quiet(), quantised(module, eighths or {}):
        traced = torch.export.export(typed, given, strict=False)
        check(
            tuple(node.meta["val"] for node in traced.graph.output_node().args[0]), spec.outputs, f"{spec.name}: output"
        )
        program: Any = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=opset,
            input_names=[s.name for s in spec.inputs],
            output_names=output_names(spec),
            verbose=False,
        )
    graph = program.model.graph
    names = [value.name for value in graph.inputs]
    if names != [s.name for s in spec.inputs]:
        raise ValueError(f"{spec.name}: inputs are {[s.name for s in spec.inputs]} in the spec, {names} in the graph")
    cast_bytes_first(graph, half)
    join_one_type(graph)
    if wide:
        widen_residuals(graph)
    onnx_ir.save(program.model, path, external_data=f"{path.name}.data", size_threshold_bytes=SMALL)
    for value in graph.initializers.values():  # onnxscript's rules remember the last graph that they matched
        value.const_value = None
    return Exported(path, program.model.opset_imports[""], len(list(graph)))


def typed_module(module: nn.Module, spec: EngineSpec, dtype: torch.dtype) -> nn.Module:
    """The module computing in `dtype`, between inputs and outputs of the spec's dtypes."""
    import torch
    from torch import nn

    kept = [i for i, s in enumerate(spec.inputs) if s.name in KEPT]
    wanted: list[torch.dtype] = [getattr(torch, s.dtype) for s in spec.outputs]

    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.training = False  # alone: eval() again would work tables out anew, in half precision
            self.module = module.eval().requires_grad_(False).to(dtype)

        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            given = (t.to(dtype) if t.is_floating_point() and i not in kept else t for i, t in enumerate(tensors))
            found = self.module(*given)
            outputs = (found,) if isinstance(found, torch.Tensor) else tuple(found)
            return tuple(
                # Only the cast above is undone: another dtype than the spec's is an error, found by `check`.
                o.to(want) if o.is_floating_point() and want.is_floating_point else o
                for o, want in zip(outputs, wanted, strict=True)
            )

    return Typed()


def output_names(spec: EngineSpec) -> list[str]:
    """The outputs' names in the file, where none can be an input's as well."""
    taken = {s.name for s in spec.inputs}
    return [f"{s.name}_out" if s.name in taken else s.name for s in spec.outputs]


def zeros(spec: EngineSpec) -> tuple[Tensor, ...]:
    """Inputs to trace with."""
    import torch

    return tuple(torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in spec.inputs)


def example(spec: EngineSpec, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs to compare engines with: unit normal, bytes, a time in the schedule, and 0, 1, 2 … where whole numbers go.

    Those are valid as positions in a table and as SDXL's sizes.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def one(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if dtype == torch.uint8:
            return torch.randint(0, 256, shape, generator=generator, dtype=dtype)
        if not dtype.is_floating_point:
            return torch.arange(shape[-1], dtype=dtype).expand(shape).contiguous()
        if name in KEPT:
            return torch.full(shape, 499, dtype=dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    return tuple(one(s.name, s.shape, getattr(torch, s.dtype)) for s in spec.inputs)


def parity(exported: Exported, wanted: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> float:
    """The largest difference of ONNX Runtime's outputs from the wanted, each relative to the largest value wanted."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(exported.path), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    worst = 0.0
    for tensor, output in zip(wanted, found, strict=True):
        expected = tensor.numpy().astype(np.float64)
        difference = float(np.abs(output.astype(np.float64) - expected).max())
        worst = max(worst, difference / max(float(np.abs(expected).max()), 1e-12))
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on torchvision, which is not used, and torch's on its own old names."""
    logger = logging.getLogger("torch.onnx._internal.exporter")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            yield
    finally:
        logger.setLevel(before)
