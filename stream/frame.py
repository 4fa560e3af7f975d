"""A picture with its times, and what is known of a stream before its first picture."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Frame:
    """One captured or stylized picture; never mutated.

    >>> Frame(np.zeros((288, 512, 3), np.uint8), pts=40_000, seq=1, captured=time.monotonic())
    """

    image: NDArray[np.uint8]  # (H, W, 3) RGB, C-contiguous
    pts: int  # µs; of a file: the container's own timestamp, of a live source: since it opened
    seq: int  # as captured; a gap is a drop
    captured: float  # time.monotonic() when the pixels reached us, s


@dataclass(frozen=True, slots=True)
class VideoSpec:
    """What a source tells about its pictures before the first one."""

    width: int  # pixels, as delivered: rotated, square pixels, resized; the same for every frame
    height: int
    fps: float  # nominal; frames may come at any distance, pts tell
    live: bool  # cannot wait for a slow reader: newest wins
    time_base: Fraction = Fraction(1, 90_000)  # s per container tick; a file sink keeps it so that pts stay equal
    frames: int | None = None  # how many are expected, where the container says
    audio: str | None = None  # path or URL whose audio belongs to these pictures
    native: tuple[int, int] | None = None  # W, H as shown, before resizing to the delivered size
    end: int | None = None  # µs, pts at which the last picture is expected to end; None: unknown or endless
    origin: str | None = None  # path of the file being read: no sink may write over it


def to_us(pts: int, time_base: Fraction) -> int:
    """Ticks of `time_base` in µs, rounded to nearest.

    >>> to_us(3003, Fraction(1, 90_000))
    33367
    """
    return round(pts * time_base * 1_000_000)


def to_ticks(us: int, time_base: Fraction) -> int:
    """µs in ticks of `time_base`, rounded to nearest; undoes `to_us` for every tick longer than 1 µs."""
    return round(Fraction(us, 1_000_000) / time_base)
