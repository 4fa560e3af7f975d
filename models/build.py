"""Every engine of a model made ahead of its first run, on this machine or for another one."""

from __future__ import annotations

from collections.abc import Callable

from accel.engine import Backend
from models.load import load
from models.structure import PLAIN, Structure


def build(
    model: str,
    size: tuple[int, int],
    engine: str = "auto",
    target: str | None = None,
    log: Callable[[str], None] = lambda line: None,
    structure: Structure = PLAIN,
    batch: int = 1,
) -> None:
    """Fill the cache with what `load` will ask for. TensorRT builds for a `target` ("sm_89"), with no card here.

    Without a target it builds for the card that is here. `batch`: also engines for launches of so many streams' frames.
    Raises UserError as `load` does.

    >>> build("sd-turbo", (512, 512), "tensorrt", "sm_89", log=print)
    """
    load(model, size, engine, log, structure=structure, backend=_ahead(engine, target, log)).widen(batch)


def _ahead(engine: str, target: str | None, log: Callable[[str], None]) -> Backend | None:
    """A backend that builds for the target, or None for the engine's own on this machine."""
    from accel.errors import UserError

    if target is None:
        if engine == "tensorrt":
            from accel.select import missing

            if lack := missing("tensorrt"):
                raise UserError(lack.message, hint="--target sm_89 builds for another machine's card; or " + lack.hint)
        return None
    if engine not in ("auto", "tensorrt"):
        raise UserError(f"--target is for engine tensorrt, not {engine}", hint=f"leave out --engine {engine}")
    from accel.tensorrt_build import TensorRTBuilder

    return TensorRTBuilder(target, say=log)
