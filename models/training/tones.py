"""What the colour adjectives of a prompt do to a finished painting; torch, (B, 3, H, W) in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)


def _gain(x: Tensor, red: float, green: float, blue: float) -> Tensor:
    return x * torch.tensor([red, green, blue]).view(1, 3, 1, 1)


def _chroma(x: Tensor, gain: float) -> Tensor:
    gray = (x * LUMA).sum(1, keepdim=True)
    return gray + gain * (x - gray)


def tone(x: Tensor, name: str) -> Tensor:
    """Apply one adjective of `captions.TONES`."""
    match name:
        case "warm":
            out = _gain(x, 1.12, 1.0, 0.78)
        case "cool":
            out = _gain(x, 0.80, 0.97, 1.14)
        case "dark":
            out = 0.85 * x**1.5
        case "bright":
            out = 1 - (1 - x) ** 1.5
        case "vivid":
            out = _chroma(x, 1.5)
        case "muted":
            out = 0.08 + 0.86 * _chroma(x, 0.45)
        case "mono":
            out = _chroma(x, 0.0)
        case "soft":
            out = 0.1 + 0.85 * F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), 5, 1)
        case _:
            raise KeyError(name)
    return out.clamp(0, 1)
