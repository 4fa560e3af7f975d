"""Pictures of any size brought to the one size a sink was opened with."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

NEAR = 0.03  # shapes that differ less are stretched: a bar of two pixels looks like a fault


def boxed(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """`image` (H, W, 3) scaled into W×H with black bars left and right, or above and below; C-contiguous.

    >>> boxed(np.zeros((288, 512, 3), np.uint8), (640, 480)).shape
    (480, 640, 3)
    """
    width, height = size
    high, wide = image.shape[:2]
    if (wide, high) == size:
        return np.ascontiguousarray(image)
    share = min(width / wide, height / high)
    inner = round(wide * share), round(high * share)
    if inner[0] >= width * (1 - NEAR) and inner[1] >= height * (1 - NEAR):
        inner = size
    scaled = cv2.resize(image, inner, interpolation=cv2.INTER_AREA if share < 1 else cv2.INTER_LINEAR)
    if inner == size:
        return scaled.astype(np.uint8, copy=False)
    canvas = np.zeros((height, width, 3), np.uint8)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    canvas[top : top + inner[1], left : left + inner[0]] = scaled
    return canvas
