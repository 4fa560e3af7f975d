"""An engine of the right shapes and no work, to test and time everything around the engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from accel.engine import EngineSpec, Ready, check

if TYPE_CHECKING:
    from torch import Tensor, nn


class NullBackend:
    """Answers zeros; never asks for the module, and uses no cache."""

    name = "null"
    device = "cpu"
    fingerprint = "null"

    def load(self, module: Callable[[], nn.Module], spec: EngineSpec, cache: Path | None = None) -> NullEngine:
        return NullEngine(spec)


class NullEngine:
    """Zeros in the shapes and dtypes of `spec.outputs`, the same tensors at every launch."""

    def __init__(self, spec: EngineSpec) -> None:
        import torch

        self.spec = spec
        self._outputs = tuple(torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in spec.outputs)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.launch(*tensors).wait()

    def launch(self, *tensors: Tensor) -> Ready:
        check(tensors, self.spec.inputs, self.spec.name)
        for output in self._outputs:
            output.zero_()  # outputs belong to the caller until the next launch, and may have been written to
        return Ready(self._outputs)
