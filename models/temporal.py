"""The refiner: takes flicker out of stylized frames without smearing what moves or washing out what is drawn.

The last output is carried along the source's motion to the present frame, and the new picture is moved towards it as
far as the motion can be trusted and the place has been in view. Two bands are weighed apart. In each, how much the
picture as a whole wavers from frame to frame tells flicker from a real change: what differs by far more than that is
kept as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.filters import blur, box, chosen, on_cpu, resize, sample, total, warp, weigh
from models.reproject import Motion, scaled

CHANCE = np.random.default_rng()
COARSE = 2.0  # σ between the bands, guide pixels


@dataclass(frozen=True, slots=True)
class Blend:
    """How strongly the past holds."""

    coarse: float = 0.9  # most that the carried picture weighs, coarse band
    fine: float = 0.86  # the same, fine band
    surprise: float = 2.0  # times the usual wavering that a real change exceeds
    floor: float = 0.035  # wavering of the coarse band that is always allowed for
    floor_fine: float = 0.015  # of the fine band
    clean: float = 0.3  # share of the wavering's variance that is taken to be the new picture's
    memory: float = 32.0  # frames a place's age is counted to


@dataclass(slots=True)
class Past:
    """What a refiner remembers of a stream."""

    output: Tensor | None = None  # (1, 3, H, W)
    age: Tensor | None = None  # frames each place has agreed for, (1, 1, h, w)
    _carried: tuple[Motion, Tensor] | None = None

    def since(self, motion: Motion | None, stylized: Tensor) -> Motion | None:
        """The motion since the last output; None where nothing of that holds: the first frame, a cut, another size."""
        if motion is None or motion.cut or self.output is None or self.output.shape != stylized.shape:
            return None
        return motion

    def begin(self, stylized: Tensor) -> Tensor:
        """Forget all, and take this picture as it is."""
        self.output, self.age = stylized, None
        return stylized

    def take(self, output: Tensor, age: Tensor, stylized: Tensor, motion: Motion, *, new: float) -> Tensor:
        """The next output, and its age; where it is not finite (a model's NaN must not stay) the stylized picture.

        That too, with an age of `new`, where the device alone knows that the scene is another.
        """
        holds = output.sum().isfinite()
        if motion.lost is not None:
            holds = holds & ~motion.lost
        self.age = chosen(holds, age, torch.full_like(age, new))
        self.output = chosen(holds, output, stylized)
        return self.output

    def carried(self, motion: Motion) -> Tensor:
        """The last output as it lies now, (1, 3, H, W); worked out once per frame."""
        assert self.output is not None
        if self._carried is None or self._carried[0] is not motion:
            size = (self.output.shape[3], self.output.shape[2])
            self._carried = motion, warp(self.output, scaled(motion.flow, size))
        return self._carried[1]


def refine(stylized: Tensor, motion: Motion | None, past: Past, blend: Blend = Blend()) -> Tensor:
    """The steadied picture (1, 3, H, W); `past` moves on by one frame."""
    motion = past.since(motion, stylized)
    if motion is None:
        return past.begin(stylized)
    small = (motion.flow.shape[3], motion.flow.shape[2])
    apart = past.carried(motion) - stylized
    bands = resize(apart, small)
    coarse = blur(bands, COARSE)
    agree, _ = likely(total(coarse.square()), motion.trust, blend.surprise, blend.floor)
    trust = ((motion.trust * agree - 0.2) / 0.5).clamp_(0, 1)
    age = torch.ones_like(trust) if past.age is None else sample(past.age, motion.flow) + 1
    age = (age * trust).clamp_max_(blend.memory)
    hold = age / (age + 1)
    agree, usual = likely(power(bands - coarse, 1), motion.trust, blend.surprise, blend.floor_fine)
    hold_fine = hold.clamp_max(blend.fine) * agree
    steadied = stylized + weigh(hold_fine, apart)
    moved = (hold.clamp_max(blend.coarse) - hold_fine) * coarse
    if not calm(usual, blend):
        # Where the past is of no use, as much of the detail as is usually wavering goes (Wiener's rule).
        wavering, smooth = noise_in(resize(stylized, small), usual, hold, blend)
        steadied -= weigh(wavering, stylized)
        moved += wavering * smooth
    steadied += resize(moved, (stylized.shape[3], stylized.shape[2]))
    return past.take(steadied, age, stylized, motion, new=0)


def calm(usual: Tensor, blend: Blend) -> bool:
    """Whether nothing wavers that could be cleaned; False also on devices that are not asked, and `noise_in` is 0."""
    return on_cpu(usual.device) and bool(usual <= blend.floor_fine**2)


def noise_in(picture: Tensor, usual: Tensor, hold: Tensor, blend: Blend) -> tuple[Tensor, Tensor]:
    """The share of a picture's fine band that is taken for noise where the past does not `hold`, and its coarse band.

    By Wiener's rule: variance of the noise, `clean` · `usual`, over that of the band.
    """
    smooth = blur(picture, COARSE)
    noise = (blend.clean * usual / (power(picture - smooth, 2) + 1e-6)).clamp_max_(1)
    return noise.mul_((1 - 1.6 * hold).clamp_min_(0)).mul_(usual > blend.floor_fine**2), smooth


def power(band: Tensor, radius: int) -> Tensor:
    """Local mean of squares of a picture's band, summed over channels, (1, 1, h, w)."""
    return box(total(band.square()), radius)


def likely(change: Tensor, trust: Tensor, surprise: float, floor: float) -> tuple[Tensor, Tensor]:
    """How likely squared changes (1, 1, h, w) are mere wavering, 0–1, and the wavering's usual variance, ()."""
    sure = trust[..., ::4, ::4].flatten() > 0.5
    ordered = change[..., ::4, ::4].flatten().masked_fill(~sure, torch.inf).sort().values
    count = sure.sum()
    usual = 1.7 * ordered.gather(0, ((count - 1) * 2 // 5).clamp_min_(0)[None])[0]  # the 0.4-quantile of those
    usual = usual.masked_fill(count == 0, 0)
    return torch.exp(-change / (2 * surprise**2 * (usual + floor**2))), usual


def flickered(image: NDArray[np.uint8], value: float) -> NDArray[np.uint8]:
    """The picture (H, W, 3) with fresh flicker, for tests and demonstrations.

    Gaussian noise per colour channel: σ = 18/255 on a grid of 1/8 size, cubic-upsampled, and σ = 6/255 on a grid of
    1/2 size, bilinear; times `value`.
    """
    height, width = image.shape[:2]
    noisy = image.astype(np.float32)
    for step, sigma, how in ((8, 18.0, cv2.INTER_CUBIC), (2, 6.0, cv2.INTER_LINEAR)):
        grid = CHANCE.standard_normal((height // step, width // step, 3)).astype(np.float32)
        noisy += value * sigma * cv2.resize(grid, (width, height), interpolation=how)
    return noisy.round().clip(0, 255).astype(np.uint8)
