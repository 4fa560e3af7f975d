"""A few pictures of the real world, by which autoencoders are quantised and judged.

The photographs that the demo shows too; they ship inside scikit-image's wheel (skimage/data), NASA's and CC0.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

FILES = ("chelsea.png", "rocket.jpg", "hubble_deep_field.jpg", "astronaut.png", "coffee.png")


def photographs(size: tuple[int, int]) -> Iterator[Tensor]:
    """Six pictures (1, H, W, 3) uint8 of (width, height), always the same; none where scikit-image is not whole.

    The last is a photograph in hard light, its levels spread to both ends: styles are brighter than the world.
    """
    package = find_spec("skimage")
    folder = Path(package.origin).parent / "data" if package and package.origin else Path()
    for file in FILES:
        image = cv2.imread(str(folder / file), cv2.IMREAD_COLOR)
        if image is None:
            return
        picture = _filling(image[..., ::-1], size)
        yield torch.from_numpy(picture)[None]
    hard = np.clip((picture.astype(np.float32) - 40) * 3, 0, 255)
    yield torch.from_numpy(hard.round().astype(np.uint8))[None]


def _filling(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of the picture, as large as it can be, at the size."""
    scale = max(size[0] / image.shape[1], size[1] / image.shape[0])
    width = min(image.shape[1], round(size[0] / scale))
    height = min(image.shape[0], round(size[1] / scale))
    left, top = (image.shape[1] - width) // 2, (image.shape[0] - height) // 2
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    filling = cv2.resize(image[top : top + height, left : left + width], size, interpolation=method)
    return np.ascontiguousarray(filling)
