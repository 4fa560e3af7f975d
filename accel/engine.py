"""What every engine and backend is: a module made fast for one set of shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: its name, static shape and dtype (a torch dtype's name)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine computes, apart from its weights.

    `precision` is what the backend may compute in: "fp32", or "fast" for the quickest format of the device
    (bf16 on CPUs that have it). Inputs and outputs keep the dtypes of their `TensorSpec` either way.
    `fingerprint` identifies architecture and weights; equal fingerprints may share a compiled engine.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    fingerprint: str
    precision: str = "fast"


class Pending(Protocol):
    """A launched computation."""

    def done(self) -> bool: ...
    def wait(self) -> tuple[Tensor, ...]:
        """Block until the outputs are there; they stay valid until the engine's next launch."""
        ...


class Engine(Protocol):
    """A compiled network. Not thread-safe: the worker thread that loaded it calls it."""

    spec: EngineSpec

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]: ...
    def launch(self, *tensors: Tensor) -> Pending: ...


class Backend(Protocol):
    """A way to make engines, one file each."""

    name: str
    device: str
    fingerprint: str  # library version, device and options: part of every cache key

    def load(self, module: Callable[[], nn.Module], spec: EngineSpec, cache: Path | None = None) -> Engine:
        """Compile, or take from the cache folder. `module` is called only when the cache has no such engine."""
        ...
