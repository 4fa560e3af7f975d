"""Small random add-ons of the real classes, for tests: LoRAs, ControlNets, IP-Adapters, and pictures for those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from models.image_prompt import cross_attentions


def random_picture(file: Path, seed: int) -> None:
    """A small style picture, in the format that the name says."""
    cv2.imwrite(str(file), np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8))


def lora(
    network: Any, paths: tuple[str, ...], rank: int = 4, seed: int = 1, prefix: str = "lora_unet_"
) -> dict[str, Tensor]:
    """A LoRA in Kohya's spelling, loud enough to be seen; alpha is half the rank."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for path in paths:
        shape, name = network.get_submodule(path).weight.shape, f"{prefix}{path.replace('.', '_')}"
        found[f"{name}.lora_down.weight"] = torch.randn(rank, *shape[1:], generator=generator) / 8
        found[f"{name}.lora_up.weight"] = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator) / 4
        found[f"{name}.alpha"] = torch.tensor(rank / 2)
    return found


def random_controlnet(path: Path, model: Path, seed: int) -> Path:
    """A ControlNet made of a model's UNet, its last convolutions random instead of zero."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.3)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=1.0)
    net.save_pretrained(path)
    return path


def random_adapter(path: Path, unet: Any, kind: str, name: str = "ip-adapter_sd15.safetensors") -> Path:
    """Write an adapter's folder in h94/IP-Adapter's form: kind "base" or "plus", its image encoder 32 pixels wide."""
    torch.manual_seed(2)
    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=24,
    )
    CLIPVisionModelWithProjection(vision).save_pretrained(path / "image_encoder")
    width = unet.config.cross_attention_dim
    weights = {}
    if kind == "base":
        projection: torch.nn.Module = ImageProjection(24, width, 4)
        weights = {f"image_proj.{k.replace('image_embeds', 'proj')}": t for k, t in projection.state_dict().items()}
    else:
        weights = {f"image_proj.{k}": t for k, t in plus_weights(width).items()}
    for i, attention in enumerate(cross_attentions(unet).values()):
        for part in "kv":
            weights[f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight"] = torch.randn(attention.to_k.weight.shape) / 4
    save_file({k: t.contiguous() for k, t in weights.items()}, path / name)
    return path


def plus_weights(width: int) -> dict[str, Tensor]:
    """A random resampler of 16 tokens under the published names."""
    state = IPAdapterPlusImageProjection(48, width, hidden_dims=64, heads=1, num_queries=16).state_dict()
    found = {k: t for k, t in state.items() if not k.startswith("layers")}
    for i in range(4):
        block, to = f"layers.{i}.", f"layers.{i}.0."
        for norm, own in (("norm1", "ln0"), ("norm2", "ln1")):
            found |= {f"{to}{norm}.{end}": state[f"{block}{own}.{end}"] for end in ("weight", "bias")}
        found[f"{to}to_q.weight"] = state[f"{block}attn.to_q.weight"]
        found[f"{to}to_kv.weight"] = torch.cat([state[f"{block}attn.to_{part}.weight"] for part in "kv"])
        found[f"{to}to_out.weight"] = state[f"{block}attn.to_out.0.weight"]
        found |= {f"{block}1.0.{end}": state[f"{block}ff.0.{end}"] for end in ("weight", "bias")}
        found[f"{block}1.1.weight"] = state[f"{block}ff.1.net.0.proj.weight"]
        found[f"{block}1.3.weight"] = state[f"{block}ff.1.net.2.weight"]
    return found
