"""The built-in moving picture: slow flights over public-domain photographs, and balloons that drift by.

The photographs ship inside scikit-image's wheel (skimage/data; see the notes in its `_fetchers.py`): astronaut (NASA,
public domain), rocket (SpaceX, public domain), chelsea (CC0, Stefan van der Walt), coffee (CC0, Rachel Michetti),
hubble_deep_field (NASA, public domain).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from math import cos, pi, sin
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from accel.errors import UserError
from stream.frame import Frame, VideoSpec

FPS = 30
SCENE_S = 7.0  # from the middle of one cross-fade to the middle of the next
FADE_S = 1.2

Colour = tuple[float, float, float]  # RGB, 0–1


@dataclass(frozen=True, slots=True)
class Scene:
    """A photograph and how the view moves over it; lengths in photographs, angles in degrees."""

    file: str
    centre: tuple[float, float]  # x, y the view circles about, 0–1
    zoom: float  # 1: the view is as big as it can be
    sway: tuple[float, float] = (0.03, 0.025)  # x, y
    turn: float = 1.0


@dataclass(frozen=True, slots=True)
class Balloon:
    """A hot-air balloon on its way across; lengths in picture heights, speed in picture widths per s."""

    colours: tuple[Colour, Colour]
    height: float
    start: float  # x at time 0, 0–1 over the picture and its margins
    level: float  # y of the middle, 0–1
    speed: float


SCENES = (
    Scene("astronaut.png", (0.50, 0.30), 1.10, sway=(0.04, 0.05)),
    Scene("rocket.jpg", (0.50, 0.55), 1.15, sway=(0.05, 0.04), turn=0.6),
    Scene("chelsea.png", (0.48, 0.45), 1.12, sway=(0.04, 0.04), turn=1.5),
    Scene("coffee.png", (0.50, 0.44), 1.06, sway=(0.03, 0.04), turn=3.0),
    Scene("hubble_deep_field.jpg", (0.50, 0.50), 1.9, sway=(0.12, 0.10), turn=5.0),
)
BALLOONS = (  # far ones first
    Balloon(((0.95, 0.78, 0.25), (0.16, 0.48, 0.55)), 0.20, start=0.62, level=0.24, speed=0.012),
    Balloon(((0.93, 0.93, 0.88), (0.55, 0.30, 0.62)), 0.27, start=0.05, level=0.33, speed=-0.017),
    Balloon(((0.98, 0.96, 0.90), (0.86, 0.22, 0.18)), 0.46, start=0.16, level=0.42, speed=0.026),
)
MARGIN = 0.25  # picture widths a balloon travels out of sight on either side


def open_source(url: str, size: tuple[int, int] | None, fit: str) -> DemoSource:
    """The demo at `size`, 512×288 without; raises UserError where the photographs are missing."""
    return DemoSource(size or (512, 288))


class DemoSource:
    """Endless pictures at a nominal 30 fps, rendered as fast as they are wanted; deterministic, none comes twice."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.spec = VideoSpec(*size, fps=FPS, live=False, time_base=Fraction(1, 90_000), native=size)
        self.warnings: list[str] = []
        self.skipped = 0
        self._closed = threading.Event()
        self._photos = [_cover(_photograph(scene.file), size, scene.zoom) for scene in SCENES]
        self._sprites = [_sprite(balloon, round(balloon.height * size[1])) for balloon in BALLOONS]

    def frames(self) -> Iterator[Frame]:
        """Frames from time 0 on; ends when closed."""
        seq = 0
        while not self._closed.is_set():
            yield Frame(self.render(seq / FPS), round(seq * 1e6 / FPS), seq, time.monotonic())
            seq += 1

    def render(self, t: float) -> NDArray[np.uint8]:
        """The picture at `t` s."""
        number, local = divmod(t, SCENE_S)
        image = self._view(int(number), t)
        fade = (local - (SCENE_S - FADE_S)) / FADE_S
        if fade > 0:
            weight = fade * fade * (3 - 2 * fade)
            following = self._view(int(number) + 1, t)
            image = np.asarray(cv2.addWeighted(image, 1 - weight, following, weight, 0), np.uint8)
        for index, (balloon, sprite) in enumerate(zip(BALLOONS, self._sprites, strict=True)):
            self._float_by(image, balloon, sprite, t, phase=2.1 * index)
        return image

    def close(self) -> None:
        """End `frames()`."""
        self._closed.set()

    def _view(self, number: int, t: float) -> NDArray[np.uint8]:
        scene, photo = SCENES[number % len(SCENES)], self._photos[number % len(SCENES)]
        width, height = self.spec.width, self.spec.height
        # the periods have no common multiple: a scene that comes again is seen from elsewhere
        x = photo.shape[1] * (scene.centre[0] + scene.sway[0] * sin(2 * pi * t / 13.7 + number))
        y = photo.shape[0] * (scene.centre[1] + scene.sway[1] * sin(2 * pi * t / 17.9 + 2 * number))
        scale = 1 / (1.06 + 0.06 * sin(2 * pi * t / 23.3 + 3 * number))
        angle = np.deg2rad(scene.turn) * sin(2 * pi * t / 19.1 + number)
        x = _clamp(x, 0.5 * width * scale, photo.shape[1])
        y = _clamp(y, 0.5 * height * scale, photo.shape[0])
        c, s = scale * cos(angle), scale * sin(angle)
        matrix = np.array([[c, -s, x - c * width / 2 + s * height / 2], [s, c, y - s * width / 2 - c * height / 2]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        view = cv2.warpAffine(photo, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
        return np.asarray(view, np.uint8)

    def _float_by(
        self, image: NDArray[np.uint8], balloon: Balloon, sprite: NDArray[np.float32], t: float, phase: float
    ) -> None:
        """Blend a premultiplied RGBA sprite over `image` at a place finer than a pixel."""
        height, width = image.shape[:2]
        x = ((balloon.start + balloon.speed * t) % 1.0 * (1 + 2 * MARGIN) - MARGIN) * width
        y = (balloon.level + 0.05 * sin(2 * pi * t / 9.3 + phase)) * height
        high, wide = sprite.shape[:2]
        left, top = max(0, int(x - wide)), max(0, int(y - high))
        right, bottom = min(width, int(x + wide)), min(height, int(y + high))
        if left >= right or top >= bottom:
            return
        matrix = cv2.getRotationMatrix2D((wide / 2, high / 2), 3.0 * sin(2 * pi * t / 6.1 + phase), 1.0)
        matrix[:, 2] += x - wide / 2 - left, y - high / 2 - top
        drawn = cv2.warpAffine(sprite, matrix, (right - left, bottom - top), flags=cv2.INTER_LINEAR)
        region = image[top:bottom, left:right]
        region[:] = drawn[..., :3] + region * (1.0 - drawn[..., 3:])


def _photograph(file: str) -> NDArray[np.uint8]:
    package = find_spec("skimage")
    path = Path(package.origin).parent / "data" / file if package and package.origin else Path(file)
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise UserError(
            f"the demo's photographs are missing ({file})", hint="pip install scikit-image, or run a file of your own"
        )
    return np.ascontiguousarray(image[..., ::-1])


def _cover(photo: NDArray[np.uint8], size: tuple[int, int], zoom: float) -> NDArray[np.uint8]:
    """The photograph as big as the view needs it, so that the view samples about one pixel per pixel."""
    scale = zoom * max(size[0] / photo.shape[1], size[1] / photo.shape[0])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(photo, None, fx=scale, fy=scale, interpolation=method), np.uint8)


def _clamp(centre: float, half: float, length: int) -> float:
    return min(max(centre, half), length - half) if 2 * half < length else length / 2


@lru_cache
def _sprite(balloon: Balloon, height: int) -> NDArray[np.float32]:
    """A balloon of `height` pixels as premultiplied RGBA, (H, W, 4), colour 0–255, alpha 0–1."""
    high, wide = 640, 480  # drawn big, then averaged down: soft edges
    y, x = np.mgrid[0:high, 0:wide].astype(np.float32)
    u, v = (x - wide / 2) / 210, (y - 225) / 210  # the envelope is a unit circle above, a cone below
    below = np.clip(v, 0, None)
    radius = np.where(v < 0, np.sqrt(np.clip(1 - v * v, 0, 1)), np.clip(1 - 0.55 * below**2 - 0.12 * below, 0, 1))
    inside = (np.abs(u) < radius) & (v > -1) & (v < 1.12)
    across = np.clip(u / np.maximum(radius, 1e-3), -1, 1)
    gore = np.floor((np.arcsin(across) / pi + 0.5) * 10).astype(int) % 2
    depth = np.sqrt(np.clip(1 - across**2, 0, 1))
    lit = np.clip(-0.55 * across * radius - 0.55 * v + 0.6 * depth, 0, 1.3)
    shade = 0.42 + 0.6 * lit - 0.10 * (1 - np.abs(((np.arcsin(across) / pi + 0.5) * 10) % 1 - 0.5) * 2) ** 4
    first, second = np.array(balloon.colours, np.float32)
    colour = np.where(gore[..., None] == 0, first, second) * shade[..., None]
    glow = np.exp(-((u + 0.38) ** 2 + (v + 0.42) ** 2) / 0.05)[..., None]
    colour = np.clip(colour + 0.35 * glow, 0, 1)
    rgba = np.dstack([colour * 255, np.ones_like(u)]).astype(np.float32) * inside[..., None]
    for side in (-1, 1):  # ropes and basket
        cv2.line(rgba, (wide // 2 + side * 55, 455), (wide // 2 + side * 30, 560), (60, 45, 35, 1), 5, cv2.LINE_8)
    cv2.rectangle(rgba, (wide // 2 - 36, 555), (wide // 2 + 36, 615), (128, 84, 46, 1), cv2.FILLED)
    cv2.rectangle(rgba, (wide // 2 - 40, 550), (wide // 2 + 40, 566), (92, 58, 32, 1), cv2.FILLED)
    small = cv2.resize(rgba, (max(4, height * wide // high), max(4, height)), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32)
