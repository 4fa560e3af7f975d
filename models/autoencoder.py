"""The autoencoder seam: pixels ↔ latents at 1/8 resolution, whichever class a model folder names.

`PatchAutoencoder` is ours, for CPUs; diffusers' `AutoencoderTiny` (TAESD) and `AutoencoderKL` sit behind the
same two calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


@dataclass
class Encoded:
    """What `PatchAutoencoder.encode` returns, in the shape of diffusers' `AutoencoderTinyOutput`."""

    latents: Tensor  # (B, C, H/8, W/8)


@dataclass
class Decoded:
    """What `PatchAutoencoder.decode` returns, in the shape of diffusers' `DecoderOutput`."""

    sample: Tensor  # (B, 3, H, W)


class Residual(nn.Module):
    """Two 3×3 convolutions around a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.outer(torch.relu(self.inner(torch.relu(x))))
        return x + change


class PatchAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own models are declared so
    """An 8×-down autoencoder that never computes at full resolution.

    Space-to-depth by 4 replaces the expensive first and last stages of TAESD, so that a 512×288 frame costs a
    two-core CPU a few milliseconds. Pictures are (B, 3, H, W) in [-1, 1], H and W multiples of 8.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latent_channels: int = 12,
        quarter_channels: int = 32,
        eighth_channels: int = 64,
        encoder_blocks: tuple[int, int] = (0, 1),
        decoder_blocks: tuple[int, int] = (1, 1),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        block_out_channels: tuple[int, ...] = (1, 1, 1, 1),  # diffusers derives the factor of 8 from its length
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        quarter, eighth = quarter_channels, eighth_channels
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, quarter, 3, padding=1),
            *(Residual(quarter) for _ in range(encoder_blocks[0])),
            nn.ReLU(),
            nn.Conv2d(quarter, eighth, 3, stride=2, padding=1),
            *(Residual(eighth) for _ in range(encoder_blocks[1])),
            nn.Conv2d(eighth, latent_channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, eighth, 3, padding=1),
            *(Residual(eighth) for _ in range(decoder_blocks[0])),
            nn.Conv2d(eighth, quarter * 4, 1),
            nn.PixelShuffle(2),
            *(Residual(quarter) for _ in range(decoder_blocks[1])),
            nn.Conv2d(quarter, 48, 3, padding=1),
            nn.PixelShuffle(4),
        )

    def encode(self, x: Tensor, return_dict: bool = True) -> Encoded | tuple[Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] → latents (B, C, H/8, W/8) of about unit variance."""
        latents = self.encoder(x)
        return Encoded(latents) if return_dict else (latents,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: object = None) -> Decoded | tuple[Tensor]:
        """Latents (B, C, H/8, W/8) → pictures (B, 3, H, W), about [-1, 1]."""
        sample = self.decoder(z)
        return Decoded(sample) if return_dict else (sample,)

    def forward(self, x: Tensor) -> Tensor:
        again: Tensor = self.decoder(self.encoder(x))
        return again
