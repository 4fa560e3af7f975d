"""Image operations that several painters share: flow fields, line extraction, smoothing, grain.

All pictures are float32 RGB (H, W, 3) in [0, 1]; all maps are float32 (H, W). Nothing here is random: every
texture is a function of the picture or of the 8-pixel grid, so that a painted video does not crawl.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]
Map = NDArray[np.float32]

GRID = 8  # screens and dots repeat with the autoencoder's cell, so that a latent network can place them


def luma(picture: Picture) -> Map:
    """Rec. 601 luma of an RGB picture, (H, W) in [0, 1]."""
    return cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)


def blur(image: Picture | Map, sigma: float) -> NDArray[np.float32]:
    """Gaussian blur with reflected borders; sigma in pixels."""
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)


def smoothstep(low: float, high: float, value: Map) -> Map:
    """Hermite step from 0 at low to 1 at high."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def mix(a: NDArray[np.float32], b: NDArray[np.float32] | tuple[float, ...], weight: Map) -> NDArray[np.float32]:
    """Blend from a (weight 0) to b (weight 1), weight being a map over the pixels."""
    w = weight[..., None] if a.ndim == 3 and weight.ndim == 2 else weight
    return a + (np.asarray(b, np.float32) - a) * w


def tangents(picture: Picture, sigma: float = 3.0) -> tuple[Map, Map, Map]:
    """Edge tangent field from the smoothed structure tensor (Kyprianidis & Kang 2011).

    Returns the unit tangent (tx, ty) and the anisotropy in [0, 1].
    """
    gx = cv2.Sobel(picture, cv2.CV_32F, 1, 0, ksize=3) / 4
    gy = cv2.Sobel(picture, cv2.CV_32F, 0, 1, ksize=3) / 4
    e, f, g = (blur((a * b).sum(-1), sigma) for a, b in ((gx, gx), (gx, gy), (gy, gy)))
    root = np.sqrt((e - g) ** 2 + 4 * f * f)
    angle = 0.5 * np.arctan2(2 * f, e - g) + np.pi / 2
    return np.cos(angle), np.sin(angle), root / (e + g + 1e-6)


def along(image: Picture | Map, tx: Map, ty: Map, length: int, step: float = 1.0) -> NDArray[np.float32]:
    """Line integral convolution: average along the tangent streamline, `length` samples each way."""
    h, w = tx.shape
    y0, x0 = np.mgrid[0:h, 0:w].astype(np.float32)
    total, count = image.copy(), 1.0
    for sign in (1.0, -1.0):
        x, y = x0.copy(), y0.copy()
        dx, dy = tx * sign, ty * sign
        for _ in range(length):
            x, y = x + step * dx, y + step * dy
            nx = cv2.remap(tx, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
            ny = cv2.remap(ty, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
            turn = np.sign(nx * dx + ny * dy) + 1e-9  # a tangent has no sign of its own: keep going forward
            dx, dy = nx * turn, ny * turn
            total = total + cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
            count += 1
    return total / count


def xdog(gray: Map, sigma: float, sharpness: float = 20.0, threshold: float = 0.5, softness: float = 8.0) -> Map:
    """Extended difference of Gaussians (Winnemöller 2012), 1 = paper and 0 = ink."""
    d = (1 + sharpness) * blur(gray, sigma) - sharpness * blur(gray, 1.6 * sigma)
    return np.where(d >= threshold, 1.0, 1 + np.tanh(softness * (d - threshold))).astype(np.float32).clip(0, 1)


def smooth_colours(picture: Picture, rounds: int = 2, sigma_colour: float = 0.12, sigma_space: float = 4.0) -> Picture:
    """Edge-keeping abstraction by repeated bilateral filtering in Lab."""
    lab = cv2.cvtColor(picture, cv2.COLOR_RGB2LAB)
    for _ in range(rounds):
        lab = cv2.bilateralFilter(lab, 7, sigma_colour * 100, sigma_space)
    return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB).clip(0, 1)


def quantise(value: Map, levels: int, hardness: float = 10.0) -> Map:
    """Soft luminance quantisation: `levels` bins with smooth steps between them (Winnemöller 2006)."""
    scaled = value * levels
    nearest = np.floor(scaled) + 0.5
    return ((nearest + 0.5 * np.tanh(hardness * (scaled - nearest) / 2.0)) / levels).astype(np.float32).clip(0, 1)


def with_luma(picture: Picture, target: Map) -> Picture:
    """The same colours at another lightness (Lab L replaced by 100·target)."""
    lab = cv2.cvtColor(picture, cv2.COLOR_RGB2LAB)
    lab[..., 0] = 100 * target
    return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB).clip(0, 1)


def saturate(picture: Picture, gain: float) -> Picture:
    """Scale the chroma in Lab by gain."""
    lab = cv2.cvtColor(picture, cv2.COLOR_RGB2LAB)
    lab[..., 1:] *= gain
    return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB).clip(0, 1)


def screen(shape: tuple[int, int], fx: int, fy: int, shift: Map | float = 0.0) -> Map:
    """A sinusoidal line screen with fx, fy whole periods per grid cell, in [-1, 1]; shift in turns."""
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    return np.cos(2 * np.pi * ((fx * x + fy * y) / GRID + shift)).astype(np.float32)
