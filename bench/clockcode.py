"""A clock in the picture: the time as black and white blocks along its upper edge, read back after any coding.

48 square blocks in three rows of 16 across the whole width: a white and a black one to compare with, 32 bits of
milliseconds, 14 bits of checksum. Pure Python up to `read` and `draw`, so that a GStreamer server of the system's
Python can use it.

>>> image = draw(np.zeros((360, 640, 3), np.uint8), now_ms())
>>> age_ms = now_ms() - read(image)
"""

from __future__ import annotations

import time
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COLUMNS, ROWS = 16, 3
BLACK, WHITE = 30, 225


def now_ms() -> int:
    """Milliseconds of the clock that every process of a machine shares, modulo 2³²."""
    return int(time.monotonic() * 1000) & 0xFFFFFFFF


def bits_of(ms: int) -> list[int]:
    """The 48 bits that tell `ms`, row by row."""
    data = (ms & 0xFFFFFFFF).to_bytes(4, "big")
    check = zlib.crc32(data) & 0x3FFF
    number = 0b10 << 46 | int.from_bytes(data, "big") << 14 | check
    return [number >> (47 - i) & 1 for i in range(48)]


def ms_of(bits: list[int]) -> int | None:
    """The time that 48 bits tell; None where they are no code."""
    data = int("".join(map(str, bits[2:34])), 2)
    check = int("".join(map(str, bits[34:])), 2)
    right = bits[:2] == [1, 0] and zlib.crc32(data.to_bytes(4, "big")) & 0x3FFF == check
    return data if right else None


def luma(width: int, height: int, ms: int) -> bytes:
    """The Y plane of a picture with the code above a grey slope that wanders with the time. Width divides by 16."""
    block = width // COLUMNS
    bits = bits_of(ms)
    rows = []
    for row in range(ROWS):
        line = b"".join(bytes([WHITE if bit else BLACK]) * block for bit in bits[row * COLUMNS : (row + 1) * COLUMNS])
        rows.append(line * block)
    slope = bytes((x + ms // 8) % 128 + 64 for x in range(width))
    return b"".join(rows) + slope * (height - ROWS * block)


def draw(image: NDArray[np.uint8], ms: int) -> NDArray[np.uint8]:
    """A copy of the (H, W, 3) picture that tells `ms`."""
    image = image.copy()
    side = image.shape[1] / COLUMNS
    for i, bit in enumerate(bits_of(ms)):
        row, column = divmod(i, COLUMNS)
        top, left = round(row * side), round(column * side)
        image[top : round((row + 1) * side), left : round((column + 1) * side)] = WHITE if bit else BLACK
    return image


def read(image: NDArray[np.uint8]) -> int | None:
    """The time in a picture of any size, as long as its blocks keep their place; None where there is none."""
    grey = image.mean(axis=2)
    side = image.shape[1] / COLUMNS
    levels = []
    for i in range(COLUMNS * ROWS):
        row, column = divmod(i, COLUMNS)
        top, left = (row + 0.25) * side, (column + 0.25) * side
        inner = max(1, round(side / 2))
        levels.append(float(grey[round(top) : round(top) + inner, round(left) : round(left) + inner].mean()))
    middle = (levels[0] + levels[1]) / 2
    if levels[0] - levels[1] < 40:
        return None
    return ms_of([int(level > middle) for level in levels])
