"""Colour and size of pictures on tensors: what a device does with a camera's bytes, and with those for an encoder.

Planes are 4:2:0 bytes, (H·3/2, W): 1.5 bytes per pixel, half of what RGB takes on the way to the device and back. They
are what decoders write and encoders read. No constant is made from numbers at run time, nothing is read back: all of
it can be recorded in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Layout = Literal["i420", "nv12"]  # U, then V, each whole; or U and V side by side
KR_KB = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}


@dataclass(frozen=True, slots=True)
class Coding:
    """What the bytes of the planes mean."""

    layout: Layout = "i420"
    matrix: Literal["bt601", "bt709"] = "bt709"
    full: bool = False  # luma 0–255; else 16–235, and chroma 16–240

    @property
    def scales(self) -> tuple[float, float, float]:
        """Of luma, its offset, and of chroma."""
        return (1.0, 0.0, 1.0) if self.full else (219 / 255, 16.0, 224 / 255)


def to_rgb(planes: Tensor, coding: Coding = Coding()) -> Tensor:
    """Planes (H·3/2, W) uint8 → a picture (1, H, W, 3) uint8, by the standards' equations, rounded.

    Each chroma sample serves its four pixels, as in swscale's quickest path from I420, which rounds down: it is up to
    three levels darker, one on average.
    """
    kr, kb = KR_KB[coding.matrix]
    scale, offset, chroma_scale = coding.scales
    height = planes.shape[0] * 2 // 3
    luma = (planes[:height].float() - offset) / scale
    u, v = (
        ((plane.float() - 128) / chroma_scale).repeat_interleave(2, 0).repeat_interleave(2, 1)
        for plane in chroma_of(planes, coding.layout)
    )
    red, blue = luma + 2 * (1 - kr) * v, luma + 2 * (1 - kb) * u
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    return to_bytes(torch.stack([red, green, blue], 2)[None])


def from_rgb(picture: Tensor, coding: Coding = Coding()) -> Tensor:
    """A picture (1, H, W, 3) uint8, H and W even → planes (H·3/2, W) uint8; chroma is the mean of its four pixels."""
    kr, kb = KR_KB[coding.matrix]
    scale, offset, chroma_scale = coding.scales
    red, green, blue = picture[0].float().unbind(2)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    planes = [to_bytes(luma * scale + offset)]
    chroma = torch.stack([(blue - luma) / (2 * (1 - kb)), (red - luma) / (2 * (1 - kr))])  # (2, H, W)
    chroma = to_bytes(F.avg_pool2d(chroma, 2) * chroma_scale + 128)
    if coding.layout == "nv12":
        chroma = chroma.permute(1, 2, 0)
    return torch.cat([*planes, chroma.reshape(-1, luma.shape[1])])


def chroma_of(planes: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The two chroma planes (H/2, W/2) of planes (H·3/2, W)."""
    height, width = planes.shape[0] * 2 // 3, planes.shape[1]
    rest = planes[height:]
    if layout == "nv12":
        pairs = rest.view(height // 2, width // 2, 2)
        return pairs[..., 0], pairs[..., 1]
    u, v = rest.reshape(2, height // 2, width // 2)
    return u, v


def to_bytes(levels: Tensor) -> Tensor:
    """0–255 as uint8, rounded."""
    return levels.round().clamp(0, 255).to(torch.uint8)


def resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A float picture (1, C, H, W) at (width, height): every source pixel counts by its area, or bilinear when larger.

    Equal to OpenCV's INTER_AREA and INTER_LINEAR. PyTorch's own "area" weighs all pixels alike, which is another thing
    unless the ratio is whole.
    """
    width, height = size
    if picture.shape[2:] == (height, width):
        return picture
    if width > picture.shape[3] or height > picture.shape[2]:
        return F.interpolate(picture, (height, width), mode="bilinear")
    down = area_weights(picture.shape[2], height, picture.device)
    across = area_weights(picture.shape[3], width, picture.device)
    return down @ picture @ across.mT


@lru_cache(maxsize=16)
def area_weights(before: int, after: int, device: torch.device) -> Tensor:
    """How far each of `before` pixels lies in each of the `after` larger ones, (after, before); rows sum to 1."""
    ratio = before / after
    with torch.inference_mode(False):
        left = torch.arange(after, dtype=torch.float64)[:, None] * ratio
        place = torch.arange(before, dtype=torch.float64)
        covered = (torch.minimum(left + ratio, place + 1) - torch.maximum(left, place)).clamp_min(0)
        return (covered / ratio).float().to(device)
