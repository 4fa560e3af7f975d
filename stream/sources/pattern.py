"""The test pattern: colour bars, a moving disc and a number on every frame."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from math import cos, sin

import cv2
import numpy as np
from numpy.typing import NDArray

from stream.frame import Frame, VideoSpec

FPS = 30
COLOURS = np.array(  # 75 % bars
    [[191, 191, 191], [191, 191, 0], [0, 191, 191], [0, 191, 0], [191, 0, 191], [191, 0, 0], [0, 0, 191]], np.uint8
)


def open_source(url: str, size: tuple[int, int] | None, fit: str) -> PatternSource:
    """The test pattern at `size`, 512×288 without."""
    return PatternSource(size or (512, 288))


class PatternSource:
    """Endless numbered pictures at a nominal 30 fps, rendered as fast as they are wanted; deterministic."""

    def __init__(self, size: tuple[int, int]) -> None:
        width, height = size
        self.spec = VideoSpec(width, height, fps=FPS, live=False, time_base=Fraction(1, 90_000), native=size)
        self.warnings: list[str] = []
        self.skipped = 0
        self._closed = threading.Event()
        bars = COLOURS[np.arange(width) * len(COLOURS) // width]  # (W, 3)
        self._bars = np.ascontiguousarray(np.broadcast_to(bars, (height, width, 3)))

    def frames(self) -> Iterator[Frame]:
        """Frames 0, 1, 2 …; ends when closed."""
        seq = 0
        while not self._closed.is_set():
            yield Frame(self.render(seq), round(seq * 1e6 / FPS), seq, time.monotonic())
            seq += 1

    def render(self, seq: int) -> NDArray[np.uint8]:
        """The picture of frame `seq`."""
        image = self._bars.copy()
        width, height = self.spec.width, self.spec.height
        unit = min(width, height)
        angle = seq / FPS * 2.0
        centre = width / 2 + 0.38 * width * cos(angle * 0.7), height / 2 + 0.3 * height * sin(angle)
        point = round(centre[0] * 16), round(centre[1] * 16)  # in sixteenths of a pixel
        cv2.circle(image, point, unit * 2, (255, 255, 255), cv2.FILLED, cv2.LINE_AA, shift=4)
        scale = unit / 160
        thick = max(1, unit // 80)
        (wide, high), _ = cv2.getTextSize(f"{seq:06d}", cv2.FONT_HERSHEY_SIMPLEX, scale, thick)
        left, base = (width - wide) // 2, (height + high) // 2
        cv2.rectangle(
            image, (left - high // 2, base - high * 3 // 2), (left + wide + high // 2, base + high // 2), (0, 0, 0), -1
        )
        cv2.putText(
            image, f"{seq:06d}", (left, base), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), thick, cv2.LINE_AA
        )
        return image

    def close(self) -> None:
        """End `frames()`."""
        self._closed.set()
