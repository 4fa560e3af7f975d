"""The slate: a calm still with words, shown while there is no picture of its own."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MARGIN = 0.09  # of the width, kept free left and right
LETTER = 0.068  # height of the letters' line, of the shorter side
LEAST = 13  # pixels: smaller letters cannot be read after video coding
LIGHT = (238, 240, 244)
TRACK = (255, 255, 255, 56)  # of the progress bar, RGBA
TOP, BOTTOM = (34, 38, 52), (14, 15, 21)  # of the gradient
DIM = 0.34  # light that is left of the picture beneath


def slate(
    size: tuple[int, int], words: str, under: NDArray[np.uint8] | None = None, progress: float | None = None
) -> NDArray[np.uint8]:
    """An (H, W, 3) RGB still of `size` (W, H): `words` centred over the blurred, darkened picture `under`, or over a
    soft gradient; with `progress` (0–1) a thin bar below them.

    >>> slate((512, 288), "waiting for a source").shape
    (288, 512, 3)
    """
    width, height = size
    ground = _gradient(size) if under is None else _beneath(under, size)
    image = Image.fromarray(ground)
    draw = ImageDraw.Draw(image, "RGBA")
    lines, font, line = _typeset(words, round(width * (1 - 2 * MARGIN)), round(height * 0.7), min(size))
    block = line * len(lines)
    top = (height - block) / 2 - (line * 0.35 if progress is not None else 0)
    for number, text in enumerate(lines):
        at = (width / 2, top + line * (number + 0.5))
        draw.text((at[0], at[1] + max(1, line // 24)), text, font=font, fill=(0, 0, 0, 150), anchor="mm")
        draw.text(at, text, font=font, fill=LIGHT, anchor="mm")
    if progress is not None:
        _bar(draw, size, top + block + line * 0.5, max(3, round(line * 0.16)), min(max(progress, 0.0), 1.0))
    return np.asarray(image)


def _typeset(words: str, width: int, height: int, side: int) -> tuple[list[str], ImageFont.FreeTypeFont, int]:
    """Lines that fit into `width` and `height` pixels, their font, and the height of a line; the last one is cut short
    where even the smallest letters do not fit."""
    letter = max(LEAST, round(side * LETTER))
    while True:
        font = _font(letter)
        line = round(letter * 1.45)
        lines = _wrap(words, font, width)
        fits = len(lines) * line <= height and all(font.getlength(text) <= width for text in lines)
        if fits or letter <= LEAST:
            break
        letter = max(LEAST, round(letter * 0.9))
    room = max(1, height // line)
    if len(lines) > room:
        lines = [*lines[: room - 1], lines[room - 1] + "…"]
    return [_shortened(text, font, width) for text in lines], font, line


def _wrap(words: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = []
    for paragraph in words.splitlines() or [""]:
        text = ""
        for word in paragraph.split():
            longer = f"{text} {word}" if text else word
            if text and font.getlength(longer) > width:
                lines.append(text)
                longer = word
            text = longer
        lines.append(text)
    return lines


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    text = text.rstrip("…")
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


@lru_cache(maxsize=32)
def _font(letter: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(letter)
    assert isinstance(font, ImageFont.FreeTypeFont)  # every wheel of Pillow carries FreeType
    return font


def _bar(draw: ImageDraw.ImageDraw, size: tuple[int, int], top: float, thick: int, progress: float) -> None:
    long = round(size[0] * 0.42)
    left = (size[0] - long) // 2
    draw.rounded_rectangle((left, top, left + long, top + thick), thick / 2, fill=TRACK)
    done = max(thick, round(long * progress))
    draw.rounded_rectangle((left, top, left + done, top + thick), thick / 2, fill=LIGHT)


@lru_cache(maxsize=8)
def _gradient(size: tuple[int, int]) -> NDArray[np.uint8]:
    """From slate blue to nearly black, lighter in the upper middle; with a little noise, so that it shows no steps."""
    width, height = size
    y = np.linspace(0, 1, height)[:, None, None]
    x = np.linspace(-1, 1, width)[None, :, None]
    colour = np.array(TOP) * (1 - y) + np.array(BOTTOM) * y  # (H, 1, 3)
    glow = np.exp(-(((y - 0.38) / 0.45) ** 2) - (x / 0.75) ** 2) * np.array((16, 18, 28))
    noise = np.random.default_rng(0).uniform(-1.0, 1.0, (height, width, 1))
    return np.asarray(np.clip(colour + glow + noise, 0, 255), np.uint8)


def _beneath(under: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The picture out of focus and dim: blurred in a small copy, which costs a millisecond."""
    share = 64 / min(size)
    small = cv2.resize(under, (round(size[0] * share), round(size[1] * share)), interpolation=cv2.INTER_AREA)
    soft = cv2.GaussianBlur(small, (0, 0), 1.6).astype(np.float32)
    grey = soft.mean(axis=2, keepdims=True)
    dim = (soft * 0.75 + grey * 0.25) * DIM
    large = cv2.resize(dim, size, interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(large, 0, 255), np.uint8)
