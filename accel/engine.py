"""What every engine and backend is: a module made fast for one set of shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn


PRECISIONS = ("fp32", "fast", "int8", "fp8")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: its name, static shape and dtype (a torch dtype's name)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine computes, apart from its weights.

    `precision` is what the backend may compute in: "fp32", "fast" for the quickest floats of the device (bf16 on CPUs
    that have it), or "int8" and "fp8" for 8-bit integers and floats where the backend has them, the module is `Sampled`
    and the outputs stay close; in every other case they mean "fast". Inputs and outputs keep the dtypes of their
    `TensorSpec`.
    `fingerprint` identifies architecture, weights and samples; equal ones may share a compiled engine. `architecture`
    identifies all of that but the weights: where it is not "", engines of equal ones may be given each other's.

    >>> EngineSpec("decode", (TensorSpec("z", (1, 12, 36, 64)),), (TensorSpec("rgb", (1, 3, 288, 512)),), "mini-1")
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    fingerprint: str
    precision: str = "fast"
    architecture: str = ""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"{self.name}: precision is one of {', '.join(PRECISIONS)}, not {self.precision!r}")


@runtime_checkable
class Sampled(Protocol):
    """A module that knows what its inputs look like; by them it can be quantised, and an engine of it judged."""

    def samples(self, inputs: tuple[TensorSpec, ...]) -> Iterable[tuple[Tensor, ...]]:
        """The same sets of inputs at every call, three or more, in the shapes and dtypes of `inputs`."""
        ...


class Pending(Protocol):
    """A launched computation; its inputs must not be written to before `wait` returned or `done` said True."""

    def done(self) -> bool: ...
    def wait(self) -> tuple[Tensor, ...]:
        """Block until the outputs are there; they stay valid until the engine's next launch."""
        ...


@dataclass(frozen=True, slots=True)
class Ready:
    """The `Pending` of an engine that computes while it is launched."""

    outputs: tuple[Tensor, ...]

    def done(self) -> bool:
        return True

    def wait(self) -> tuple[Tensor, ...]:
        return self.outputs


class Engine(Protocol):
    """A compiled network. Not thread-safe: the worker thread that loaded it calls it.

    One launch is in flight at a time; launching again waits for the one before.
    """

    @property
    def spec(self) -> EngineSpec: ...

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]: ...
    def launch(self, *tensors: Tensor) -> Pending: ...


class Backend(Protocol):
    """A way to make engines, one file each."""

    name: str
    device: str
    fingerprint: str  # library version, device and options: part of every cache key

    def load(self, module: Callable[[], nn.Module], spec: EngineSpec, cache: Path | None = None) -> Engine:
        """Compile, or take from the cache folder (None: no cache).

        `module` is called only when the cache has no such engine. What it returns is the backend's from then
        on, to move, cast and lay out anew: give a copy of weights that are used elsewhere. Its forward takes the
        inputs in order and returns a tensor or a tuple; it casts integer inputs to the dtype of its own
        parameters, because a backend may have cast those.
        """
        ...


def check(tensors: tuple[Tensor, ...], expected: tuple[TensorSpec, ...], owner: str) -> None:
    """Raise ValueError unless the tensors have exactly the expected count, shapes and dtypes.

    Without this a compiled engine would broadcast, reinterpret or crash, each in its own way.
    """
    if len(tensors) != len(expected):
        raise ValueError(f"{owner}: {len(expected)} tensors expected, {len(tensors)} given")
    for tensor, spec in zip(tensors, expected, strict=True):
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tuple(tensor.shape) != spec.shape or dtype != spec.dtype:
            raise ValueError(f"{owner}: {spec.name} is {spec.dtype} {spec.shape}, not {dtype} {tuple(tensor.shape)}")
