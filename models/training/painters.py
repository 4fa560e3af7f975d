"""The procedural painters that `mini` learned from, by style name."""

from __future__ import annotations

from collections.abc import Callable

from models.training.brushwork import Picture
from models.training.painters_colour import COLOUR_PAINTERS
from models.training.painters_line import LINE_PAINTERS

Painter = Callable[..., Picture]


def photo(picture: Picture, *, thickness: float = 1.0) -> Picture:
    """The photograph itself: the style that changes nothing."""
    return picture


PAINTERS: dict[str, Painter] = {"photo": photo, **LINE_PAINTERS, **COLOUR_PAINTERS}
