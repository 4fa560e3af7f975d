"""The few-step loop, as plain functions over tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.schedule import Schedule, Step, clean

Prompt = tuple[Tensor, ...]  # words (1, L, D), and pooled ones (1, P) where the UNet takes them
Network = Callable[[Tensor, float, Prompt], Tensor]  # (z and what is concatenated to it, t, prompt) → output


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What steers a frame apart from its noise."""

    words: Prompt
    negative: Prompt  # what guidance leads away from
    source: Tensor | None = None  # (1, C, H/8, W/8) source latent, where the UNet takes it concatenated
    guidance: float = 1.0  # classifier-free, ≤ 1 = off
    image_guidance: float = 1.0  # InstructPix2Pix's second scale

    @property
    def passes(self) -> int:
        """How often `guided` runs the network per step."""
        if self.guidance <= 1:
            return 1
        return 2 if self.source is None or self.image_guidance == 1 else 3


def start(source: Tensor, noise: Tensor, step: Step, *, pure: bool) -> Tensor:
    """The first noisy latent: noise alone, or the source latent at the first step's level."""
    return noise if pure else step.signal * source + step.sigma * noise


def guided(network: Network, z: Tensor, t: float, cond: Conditioning) -> Tensor:
    """The network's output under guidance.

    With a concatenated source this is InstructPix2Pix (Brooks et al. 2023, eq. 3): o(∅,∅) + w·(o(words) - o(image)) +
    w_i·(o(image) - o(∅,∅)); at w_i = 1 the unconditional pass cancels and is not made.
    """
    if cond.source is None:
        wanted = network(z, t, cond.words)
        if cond.guidance <= 1:
            return wanted
        unwanted = network(z, t, cond.negative)
        return unwanted + cond.guidance * (wanted - unwanted)
    both = torch.cat([z, cond.source], 1)
    wanted = network(both, t, cond.words)
    if cond.guidance <= 1:
        return wanted
    image = network(both, t, cond.negative)
    out = image + cond.guidance * (wanted - image)
    if cond.image_guidance != 1:
        nothing = network(torch.cat([z, torch.zeros_like(cond.source)], 1), t, cond.negative)
        out = out + (cond.image_guidance - 1) * (image - nothing)
    return out


def denoise(network: Network, z: Tensor, schedule: Schedule, cond: Conditioning, noises: Sequence[Tensor]) -> Tensor:
    """From the first noisy latent to x0, (1, C, H/8, W/8); `noises` are those of the steps after the first."""
    for step, after, noise in zip(schedule.steps, (*schedule.steps[1:], None), (*noises, None), strict=True):
        x0 = clean(guided(network, z, float(step.t), cond), z, step, schedule.prediction)
        x0 = step.c_out * x0 + step.c_skip * z
        z = x0 if after is None or noise is None else after.signal * x0 + after.sigma * noise
    return z
