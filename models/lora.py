"""LoRA files, read and fitted to a network: which layers they change, and by how much.

W + scale · (alpha / rank) · up · [mid ·] down, Hu et al. 2021 (arXiv 2106.09685); a `mid` is LoCon's Tucker form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import UserError
from models.tensor_file import FAMILIES, FETCH, read_safetensors

NETWORKS = {"unet.": "unet", "lora_unet_": "unet", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2",
            "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}  # fmt: skip
KEY = re.compile(
    rf"(?:base_model\.model\.)?(?P<network>{'|'.join(map(re.escape, NETWORKS))})?(?P<layer>.+?)"
    r"(?:(?:[._]lora(?:_linear_layer)?)?[._](?P<part>down|up|mid|alpha)|\.lora_(?P<peft>[AB])(?:\.(?!weight|bias)\w+)?)"
    r"(?:\.weight)?"
)
PEFT = {"A": "down", "B": "up"}
OTHERS = {"dora_scale": "DoRA", "magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT",
          "on_input": "IA3", ".diff": "whole difference"}  # fmt: skip
TRANSFORMER = re.compile(r"transformer\.|diffusion_model\.|lora_transformer_|lora_unet_(?:double|single|joint)_blocks")
SGM_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
              "conv_shortcut": "skip_connection"}  # fmt: skip
SGM_ENDS = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
            "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
            "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Update:
    """What one LoRA does to one layer at scale 1; without an alpha the factor before it is 1."""

    up: Tensor  # (out, r[, 1, 1])
    down: Tensor  # (r, in[, k, k])
    mid: Tensor | None = None  # (r, r, k, k), then down is (r, in, 1, 1)
    alpha: float | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """The update as two matrices, up (out, r) and down (r, in·k·k), float32: a middle and the alpha are in them."""
        up, down = (t.float().flatten(1) for t in (self.up, self.down))
        if self.mid is not None:
            down = torch.einsum("abkl,bi->aikl", self.mid.float(), down).flatten(1)
        return (up if self.alpha is None else up * (self.alpha / len(self.down))), down

    def add_to(self, weight: Tensor, scale: float) -> None:
        """Change a weight, contiguous float32 on any device, in place."""
        up, down = (factor.to(weight.device) for factor in self.factors())
        weight.view(len(weight), -1).addmm_(up, down, alpha=scale)

    def fits(self, shape: torch.Size) -> bool:
        """Whether a weight of this shape can be changed by it."""
        up, down = self.up.shape, self.down.shape
        if min(len(up), len(down)) < 2 or not self.down.numel():
            return False
        if self.mid is None:  # 1×1 convolutions and linear layers stand for each other
            return bare(shape) == bare((up[0], *down[1:])) and up[1:].numel() == down[0]
        middle = self.mid.shape
        matched = (
            middle[:2] == (up[1], down[0]) and up.numel() == up[0] * up[1] and self.down.numel() == down[0] * down[1]
        )
        return matched and len(middle) == 4 and tuple(shape) == (up[0], down[1], *middle[2:])


def bare(shape: Sequence[int]) -> list[int]:
    """A shape without the ones at its end."""
    sides = list(shape)
    while sides and sides[-1] == 1:
        sides.pop()
    return sides


def read_lora(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; UserError where it is none, or cut short.

    PEFT's alpha, which diffusers keeps in the file's metadata, joins them under the names that other trainers use.
    """
    tensors, metadata = read_safetensors(path)
    try:
        settings = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
        return alphas(tensors, settings) | tensors
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path.name} has broken metadata ({error})", hint=FETCH) from error


def alphas(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The alpha of each layer by PEFT's settings, such as "unet.lora_alpha"; a layer is named by how its path ends."""
    found: dict[str, Tensor] = {}
    for key, down in tensors.items():
        layer, peft, _ = key.partition(".lora_A")
        network, _, name = layer.partition(".")
        if peft and f"{network}.lora_alpha" in settings and down.dim():
            patterns = settings.get(f"{network}.alpha_pattern") or {}
            own = (alpha for end, alpha in patterns.items() if f".{name}".endswith(f".{end}"))
            alpha = float(next(own, settings[f"{network}.lora_alpha"]))
            over_root = settings.get(f"{network}.use_rslora")  # alpha / √rank there
            found[f"{layer}.alpha"] = torch.tensor(alpha * len(down) ** 0.5 if over_root else alpha)
    return found


def fitted(network: nn.Module, lora: Mapping[str, Tensor], part: str = "unet") -> dict[str, Update]:
    """What a LoRA does to this network: its updates by the names of layers; `part` is the network's name in a pipeline.

    Reads the names of diffusers, PEFT, Kohya (both layouts of SDXL) and AnimateDiff. Empty where the file has nothing
    for this part; UserError where it is another kind of file, incomplete, or made for another family.
    """
    layers = {spelled(path): path for path, m in network.named_modules() if hasattr(m, "weight")}
    layers = {spelled(theirs): path for theirs, path in sgm_names(network)} | layers
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in lora.items():
        if TRANSFORMER.match(key):
            raise UserError("the LoRA is for a diffusion transformer (Flux, SD 3 and later)", hint=wanted(network))
        if other := next((kind for mark, kind in OTHERS.items() if mark in key), None):
            raise UserError(f"the file is a {other}, not a LoRA: {key}", hint="LoRA and LoCon can be merged")
        name = re.sub(r"temporal_transformer\.|processor\.", "", key)
        name = re.sub(r"attention_blocks\.(\d)", lambda found: f"attn{int(found[1]) + 1}", name)
        if (match := KEY.fullmatch(name)) is None:
            raise UserError(f"not a LoRA that can be merged: {key}", hint="its up, down and alpha are known, no others")
        if NETWORKS.get(match["network"] or "unet.") == part:
            pairs.setdefault(match["layer"], {})[match["part"] or PEFT[match["peft"]]] = tensor

    if pairs and not any("motion_modules" in path for path in layers.values()):
        if any("motion_modules" in layer for layer in pairs):
            raise UserError("the file is a motion LoRA, for a motion adapter", hint="temporal.window uses adapters")
        check_family(network, pairs)
    updates: dict[str, Update] = {}
    for layer, pair in pairs.items():
        found = layers.get(spelled(layer)) or layers.get(f"{spelled(layer)}_0")  # to_out: a linear layer and a dropout
        if found is None:
            raise UserError(f"the LoRA is for another model: no layer {layer} here", hint=wanted(network))
        if not pair.keys() >= {"up", "down"}:
            raise UserError(f"the LoRA is incomplete: {layer} has {' and '.join(pair)} alone", hint=FETCH)
        if "alpha" in pair and pair["alpha"].numel() != 1:
            raise UserError(f"the LoRA is broken: the alpha of {layer} is not one number", hint=FETCH)
        alpha = float(pair["alpha"]) if "alpha" in pair else None
        updates[found] = update = Update(pair["up"], pair["down"], pair.get("mid"), alpha)
        shape = weight_of(network, found).shape
        if not update.fits(shape):
            change = f"{tuple(update.up.shape)}·{tuple(update.down.shape)}"
            raise UserError(
                f"the LoRA does not fit: {layer} is {tuple(shape)} here, not {change}", hint=wanted(network)
            )
        if not all(bool(t.isfinite().all()) for t in pair.values()):
            raise UserError(f"the LoRA is broken: {layer} is not finite", hint=FETCH)
    return updates


def weight_of(network: nn.Module, path: str) -> Tensor:
    layer: Any = network.get_submodule(path)
    weight: Tensor = layer.weight
    return weight


def spelled(path: str) -> str:
    """A layer's name as Kohya's files have it; transformers has dropped CLIP's outermost name, the files have not."""
    return path.replace(".", "_").removeprefix("text_model_")


def check_family(network: nn.Module, pairs: Mapping[str, Mapping[str, Tensor]]) -> None:
    """UserError where a LoRA's width of words, which tells the families apart, is not the network's."""
    config: Any = getattr(network, "config", None)
    width = getattr(config, "cross_attention_dim", None) or getattr(config, "hidden_size", None)
    for layer, pair in pairs.items():
        if isinstance(width, int) and re.search(r"attn2.to_[kv]$|self_attn.q_proj$", layer) and "down" in pair:
            theirs = pair["down"].shape[1]
            if theirs != width:
                made_for = FAMILIES.get(theirs, "another family")
                raise UserError(f"the LoRA is for {made_for} (width {theirs}, here {width})", hint=wanted(network))


def wanted(network: nn.Module) -> str:
    """What kind of LoRA this network takes, as a hint."""
    config: Any = getattr(network, "config", None)
    family = FAMILIES.get(getattr(config, "cross_attention_dim", None) or getattr(config, "hidden_size", None) or 0)
    return f"take one made for {family}" if family else "take one made for this model's family"


def sgm_names(unet: nn.Module) -> Iterator[tuple[str, str]]:
    """Where a diffusers UNet's layers stand in the original layout, in which SDXL's trainers name them."""
    places: dict[str, str] = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
                              "mid_block.resnets.1": "middle_block.2"}  # fmt: skip
    for side, block_name in (("input", "down_blocks"), ("output", "up_blocks")):
        at = 1 if side == "input" else 0  # input_blocks.0 is conv_in
        for i, block in enumerate(getattr(unet, block_name, ())):
            attends = bool(getattr(block, "attentions", None))
            for j in range(len(getattr(block, "resnets", ()))):
                places[f"{block_name}.{i}.resnets.{j}"] = f"{side}_blocks.{at}.0"
                places[f"{block_name}.{i}.attentions.{j}"] = f"{side}_blocks.{at}.1"
                at += 1
            if getattr(block, "downsamplers", None):
                places[f"{block_name}.{i}.downsamplers.0.conv"] = f"input_blocks.{at}.0.op"
                at += 1
            places[f"{block_name}.{i}.upsamplers.0.conv"] = f"output_blocks.{at - 1}.{1 + attends}.conv"
    for path, _ in unet.named_modules():
        parts = path.split(".")
        for n in range(len(parts), 1, -1):
            if theirs := places.get(".".join(parts[:n])):
                rest = ".".join(parts[n:])
                yield f"{theirs}.{SGM_RESNET.get(rest, rest) if 'resnets' in parts else rest}".rstrip("."), path
        if path in SGM_ENDS:
            yield SGM_ENDS[path], path
