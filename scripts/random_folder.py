"""Write a model folder of full size and published configuration, with random weights in bf16.

python scripts/random_folder.py sd-turbo FOLDER [--kl]

It has the classes, keys and shapes of the real one, so it shows without a hub that one loads, what it takes and how
fast it is. Pictures are noise, and the tokenizer knows single letters. The autoencoder is TAESD's kind, as livestyle
uses it; `--kl` writes the one of the published folder.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

START, END = 49406, 49407  # CLIP's own numbers, of 49408
SD_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPEN_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
OPEN_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


@dataclass(frozen=True)
class Published:
    """What differs between published models: keyword arguments of the UNet's and the text models' classes."""

    unet: dict[str, Any]
    texts: tuple[dict[str, Any], ...]  # a second one has a projection
    scaling: float = 0.18215  # of the full autoencoder's latents


MODELS = {
    "sd15": Published(
        {**SD_BLOCKS, "cross_attention_dim": 768, "attention_head_dim": 8},
        ({**CLIP_L, "hidden_act": "quick_gelu", "projection_dim": 768},),
    ),
    "sd-turbo": Published(
        {
            **SD_BLOCKS,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),  # heads, in spite of the name
            "use_linear_projection": True,
        },
        ({**OPEN_CLIP_H, "hidden_act": "gelu", "projection_dim": 512},),
    ),
    "sdxl-turbo": Published(
        {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        (
            {**CLIP_L, "hidden_act": "quick_gelu", "projection_dim": 768},
            {**OPEN_CLIP_G, "hidden_act": "gelu", "projection_dim": 1280},
        ),
        scaling=0.13025,
    ),
}


def tokenizer() -> CLIPTokenizer:
    """One that reads letter by letter, with CLIP's numbers for the two ends."""
    letters = [c + end for c in map(chr, range(33, 127)) for end in ("", "</w>")]
    vocab = {symbol: i for i, symbol in enumerate(letters)} | {"<|startoftext|>": START, "<|endoftext|>": END}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def unet(model: Published) -> UNet2DConditionModel:
    return UNet2DConditionModel(sample_size=64, in_channels=4, out_channels=4, layers_per_block=2, **model.unet)


def text_models(model: Published) -> list[nn.Module]:
    configs = [CLIPTextConfig(vocab_size=END + 1, bos_token_id=START, eos_token_id=END, **t) for t in model.texts]
    return [CLIPTextModel(configs[0]), *map(CLIPTextModelWithProjection, configs[1:])]


def autoencoder(model: Published, *, kl: bool) -> nn.Module:
    if not kl:
        return AutoencoderTiny()
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        scaling_factor=model.scaling,
        force_upcast=len(model.texts) > 1,
    )


def write(model: Published, folder: Path, dtype: torch.dtype = torch.bfloat16, *, kl: bool = False) -> Path:
    """Write the folder, part by part, so that no more than one is in memory."""
    torch.manual_seed(0)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if len(model.texts) > 1 else "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL" if kl else "AutoencoderTiny"],
        "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"],
        "force_zeros_for_empty_prompt": True,
    }
    unet(model).to(dtype).save_pretrained(folder / "unet")
    autoencoder(model, kl=kl).to(dtype).save_pretrained(folder / "vae")
    for part, text in zip(("", "_2"), text_models(model), strict=False):
        text.to(dtype).save_pretrained(folder / f"text_encoder{part}")
        tokenizer().save_pretrained(folder / f"tokenizer{part}")
        index[f"text_encoder{part}"] = ["transformers", type(text).__name__]
        index[f"tokenizer{part}"] = ["transformers", "CLIPTokenizer"]
    EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing", steps_offset=1
    ).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kl", action="store_true", help="the full autoencoder")
    arguments = parser.parse_args()
    write(MODELS[arguments.name], arguments.folder, kl=arguments.kl)


if __name__ == "__main__":
    main()
