"""How big a picture becomes inside a box: pure maths on sizes, width before height."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

MULTIPLE = 8  # pixels per latent: both sides of every model input divide by it


@dataclass(frozen=True, slots=True)
class Fit:
    """Scale to `scaled`, then cut `size` from the centre; the two are equal unless the picture is cropped."""

    scaled: tuple[int, int]  # W, H
    size: tuple[int, int]  # W, H delivered


def round_size(width: float, height: float, multiple: int = MULTIPLE) -> tuple[int, int]:
    """The nearest size whose sides both divide by `multiple`, never zero.

    >>> round_size(405, 717)
    (408, 720)
    """
    return _nearest(width, multiple), _nearest(height, multiple)


def fit_size(native: tuple[float, float], box: tuple[int, int], mode: str = "fit") -> Fit:
    """How a picture of `native` W×H comes into `box` W×H by `mode`: `fit`, `crop` or `stretch`.

    `fit` keeps the aspect (to the nearest multiple of 8 pixels) in the largest size inside the box; `crop` fills the
    box and cuts what hangs over, half on each side; `stretch` gives the aspect up. Raises ValueError for another mode.

    >>> fit_size((1280, 720), (512, 512)).size
    (512, 288)
    >>> fit_size((1280, 720), (512, 512), "crop").scaled
    (911, 512)
    """
    width, height = native
    ratios = box[0] / width, box[1] / height
    if mode == "stretch":
        return Fit(box, box)
    if mode == "crop":
        fill = max(ratios)
        return Fit((max(box[0], ceil(width * fill - 1e-6)), max(box[1], ceil(height * fill - 1e-6))), box)
    if mode != "fit":
        raise ValueError(f"no such fit: {mode}")
    inside = min(ratios)
    wide, high = round_size(width * inside, height * inside)
    size = min(wide, box[0] // MULTIPLE * MULTIPLE), min(high, box[1] // MULTIPLE * MULTIPLE)
    return Fit(size, size)


def centre_cut(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The middle W×H of an (H, W, 3) picture, C-contiguous."""
    width, height = size
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def _nearest(side: float, multiple: int) -> int:
    return max(multiple, int(side / multiple + 0.5) * multiple)
