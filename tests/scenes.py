"""Small moving pictures whose motion is known."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

SIZE = (128, 96)  # (width, height)

Image = NDArray[np.uint8]


def texture(seed: int = 0, size: tuple[int, int] = SIZE, blur: float = 1.5) -> Image:
    """Coloured blotches and grain, (H, W, 3): detail everywhere, softer than `blur` pixels."""
    width, height = size
    chance = np.random.default_rng(seed)
    blotches = cv2.resize(chance.random((height // 16 + 1, width // 16 + 1, 3)), size, interpolation=cv2.INTER_CUBIC)
    grain = cv2.GaussianBlur(chance.standard_normal((height, width, 3)), (0, 0), blur)
    picture = blotches + 0.15 * grain / grain.std()
    return (255 * (picture - picture.min()) / np.ptp(picture)).round().astype(np.uint8)


def sliding(count: int, step: tuple[int, int] = (2, -1), seed: int = 0, size: tuple[int, int] = SIZE) -> list[Image]:
    """A window that moves by `step` pixels a frame over a texture: the backward flow is `step` everywhere."""
    reach_x, reach_y = abs(step[0]) * (count - 1), abs(step[1]) * (count - 1)
    wide = texture(seed, (size[0] + reach_x, size[1] + reach_y))
    left, top = (reach_x if step[0] < 0 else 0), (reach_y if step[1] < 0 else 0)
    corners = [(left + i * step[0], top + i * step[1]) for i in range(count)]
    return [wide[y : y + size[1], x : x + size[0]].copy() for x, y in corners]


def passing(count: int, step: int = 6, side: int = 32, size: tuple[int, int] = SIZE) -> tuple[list[Image], list[Image]]:
    """A square that crosses a standing texture from the left, and per frame where it is, (H, W) bool."""
    background, square = texture(1, size), texture(2, (side, side))
    top = (size[1] - side) // 2
    frames, places = [], []
    for i in range(count):
        image, place = background.copy(), np.zeros((size[1], size[0]), bool)
        left, right = max(0, i * step), min(size[0], i * step + side)
        if left < right:
            image[top : top + side, left:right] = square[:, left - i * step : right - i * step]
            place[top : top + side, left:right] = True
        frames.append(image)
        places.append(place)
    return frames, places


def psnr(image: Image, reference: Image) -> float:
    """Peak signal-to-noise ratio, dB."""
    return 10 * float(np.log10(255**2 / max(np.square(image.astype(float) - reference).mean(), 1e-9)))
