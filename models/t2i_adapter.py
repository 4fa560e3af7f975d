"""T2I-Adapters (Mou et al. 2023, arXiv 2302.08453): small networks that look at the control picture alone.

What one gives is added inside the UNet's way down. It does not depend on the noise, so it is worked out once per frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accel.engine import TensorSpec
from accel.errors import UserError
from models.residuals import hint_specs


class Adapter(nn.Module):
    """Pictures (n, H, W, 3) uint8 and scales (n, hints) → the hints, each times its row's scale."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.channels = int(network.config.in_channels)  # 1: for grey pictures

    def forward(self, picture: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        x = picture.permute(0, 3, 1, 2)[:, : self.channels].to(scales.dtype) / 255  # (n, 1 or 3, H, W) in [0, 1]
        return tuple(hint * scales[:, i, None, None, None] for i, hint in enumerate(self.network(x)))


def check_adapter(kind: str, path: Path, network: Any, unet: Mapping[str, Any]) -> int:
    """How many hints an adapter (on the meta device) gives; UserError where their shapes are not what the UNet takes.

    Its configuration does not name its family: Stable Diffusion 1.x and 2.x, of the same shapes, are not told apart.
    """
    channels = int(network.config.in_channels)
    found = [tuple(hint.shape) for hint in network(torch.zeros(1, channels, 512, 512, device="meta"))]
    expected = [spec.shape for spec in hint_specs(unet, (64, 64), 1, len(found))]
    if found != expected or channels not in (1, 3):
        raise UserError(
            f"{kind} control: {path.name} is a T2I-Adapter for another family of models",
            hint="those for Stable Diffusion 1.5 are full_adapter or light_adapter, those for SDXL full_adapter_xl",
        )
    return len(found)


def adapter_inputs(factor: int, hints: int, size: tuple[int, int], rows: int) -> tuple[TensorSpec, ...]:
    """What `Adapter` takes of pictures of (height, width); UserError for a size that its factor does not divide."""
    if size[0] % factor or size[1] % factor:
        raise UserError(
            f"a T2I-Adapter for SDXL takes sizes in steps of {factor}, not {size[1]}x{size[0]}",
            hint=f"--size {size[1] // factor * factor}x{size[0] // factor * factor}",
        )
    return TensorSpec("picture", (rows, *size, 3), "uint8"), TensorSpec("scales", (rows, hints))
