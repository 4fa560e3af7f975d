"""The first pictures of a source, for benchmarks that show them again and again."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from accel.errors import UserError
from stream.source import open_source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def first_pictures(source: str, size: tuple[int, int], count: int, fit: str = "fit") -> list[NDArray[np.uint8]]:
    """At most `count` pictures, (H, W, 3) uint8 RGB; UserError for a source without any."""
    opened = open_source(source, size=size, fit=fit)
    try:
        found = [frame.image for frame in islice(opened.frames(), count)]
    finally:
        opened.close()
    if not found:
        raise UserError(f"{source} has no pictures", hint="demo has")
    return found
