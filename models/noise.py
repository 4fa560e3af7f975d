"""What a frame's latent starts from: noise that moves with the scene, a share of the last result."""

from __future__ import annotations

import torch
from torch import Tensor

from models.filters import sample


def drifted(noise: Tensor, travel: Tensor | None) -> Tensor:
    """Noise (1, C, h, w) that has gone with the scene: taken whole from where each place was when the shot began.

    Values are moved, never mixed, so they stay Gaussian; what comes into view wears noise from the other edge.
    """
    if travel is None:
        return noise
    height, width = noise.shape[2:]
    x = (torch.arange(width, device=noise.device) + travel[0, 0]).round().long() % width
    y = (torch.arange(height, device=noise.device)[:, None] + travel[0, 1]).round().long() % height
    return noise[:, :, y, x]


def fed_back(source: Tensor, before: Tensor | None, moved: Tensor | None, share: float) -> Tensor:
    """The source latent with a share of the last result's, carried along the motion, (1, C, h, w)."""
    if before is None or before.shape != source.shape:
        return source
    if moved is not None:
        before = sample(before, moved)
    return torch.lerp(source, before, share)
