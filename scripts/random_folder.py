"""Write a model folder of full size and published configuration, or an add-on's, with random weights in bf16.

python scripts/random_folder.py sd-turbo FOLDER [--kl]

It has the classes, keys and shapes of the real one, so it shows without a hub that one loads, what it takes and how
fast it is. Pictures are noise, and the tokenizer knows single letters. The autoencoder is TAESD's kind, as livestyle
uses it; `--kl` writes the one of the published folder. Weights are drawn in the format that they are stored in, so no
network takes more memory than its file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    PNDMScheduler,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from models.spec import MODELS as ROWS

START, END = 49406, 49407  # CLIP's own numbers, of 49408
SD_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPEN_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
OPEN_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
RANK, ALPHA = 64, 8.0  # of the LCM-LoRAs
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
           "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")  # fmt: skip
TOKENS = 4  # of an IP-Adapter's picture
ADDONS = ("controlnet", "ip-adapter", "safety-checker")


@dataclass(frozen=True)
class Published:
    """What differs between published models: keyword arguments of the UNet's and the text models' classes."""

    unet: dict[str, Any]
    texts: tuple[dict[str, Any], ...]  # a second one has a projection
    scheduler: Any  # class in diffusers; livestyle's sampler follows from it
    scaling: float = 0.18215  # of the full autoencoder's latents
    row: str = ""  # in models.spec: has that one's LoRA and schedule
    motion: bool = False  # has a motion adapter


SD15 = Published(
    {**SD_BLOCKS, "cross_attention_dim": 768, "attention_head_dim": 8},
    ({**CLIP_L, "hidden_act": "quick_gelu", "projection_dim": 768},),
    PNDMScheduler,
)
MODELS = {
    "sd15": SD15,
    "sd15-lcm": replace(SD15, row="sd15-lcm"),
    "animatediff-lcm": replace(SD15, row="animatediff-lcm", motion=True),
    "sd-turbo": Published(
        {
            **SD_BLOCKS,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),  # heads, in spite of the name
            "use_linear_projection": True,
        },
        ({**OPEN_CLIP_H, "hidden_act": "gelu", "projection_dim": 512},),
        EulerDiscreteScheduler,
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
        EulerAncestralDiscreteScheduler,
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


def motion_adapter(model: Published) -> MotionAdapter:
    """AnimateLCM's, which has v2's layout: a mid block, 32 positions."""
    return MotionAdapter(
        block_out_channels=model.unet["block_out_channels"],
        motion_layers_per_block=2,
        motion_mid_block_layers_per_block=1,
        motion_norm_num_groups=model.unet.get("norm_num_groups", 32),
        motion_num_attention_heads=8,
        motion_max_seq_length=32,
        use_motion_mid_block=True,
    )


def lora(model: Published) -> dict[str, Tensor]:
    """An LCM-LoRA: every attention, feed-forward and convolution inside the blocks, under Kohya's names."""
    with torch.device("meta"):
        layers = [(path, m.weight) for path, m in unet(model).named_modules() if path.endswith(ADAPTED)]
    tensors: dict[str, Tensor] = {}
    for path, weight in layers:
        name, (out, width, *kernel) = f"lora_unet_{path.replace('.', '_')}", weight.shape
        fan_in = width * prod(kernel)
        tensors |= {
            f"{name}.alpha": torch.tensor(ALPHA),
            f"{name}.lora_down.weight": torch.randn(RANK, width, *kernel) / fan_in**0.5,
            f"{name}.lora_up.weight": torch.randn(out, RANK, *(1 for _ in kernel)) / 20,
        }
    return tensors


def controlnet(model: Published = SD15) -> ControlNetModel:
    """ControlNet 1.1's. What is zero at the start of training is drawn too, or it would do nothing."""
    found = ControlNetModel(
        in_channels=4, **{key: value for key, value in model.unet.items() if key != "up_block_types"}
    )
    for layer in (*found.controlnet_down_blocks, found.controlnet_mid_block, found.controlnet_cond_embedding.conv_out):
        nn.init.normal_(layer.weight, std=0.02)
    return found


def image_encoder(**other: Any) -> CLIPVisionModelWithProjection:
    """CLIP ViT-H/14, which most IP-Adapters look at pictures with."""
    settings = {**VIT_H, "patch_size": 14, "image_size": 224, "projection_dim": 1024, "hidden_act": "gelu", **other}
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**settings))


def ip_adapter(model: Published = SD15, embedding: int = 1024) -> dict[str, Tensor]:
    """The base IP-Adapter's file for SD 1.5: a projection to four tokens, keys and values of each cross-attention."""
    words = model.unet["cross_attention_dim"]
    with torch.device("meta"):
        network = unet(model)
    tensors = {
        "image_proj.proj.weight": torch.randn(TOKENS * words, embedding) / embedding**0.5,
        "image_proj.proj.bias": torch.zeros(TOKENS * words),
        "image_proj.norm.weight": torch.ones(words),
        "image_proj.norm.bias": torch.zeros(words),
    }
    crossing = [name.removesuffix(".processor") for name in network.attn_processors if "attn2" in name]
    for i, name in enumerate(crossing):
        width = network.get_submodule(name).to_k.out_features
        for part in "kv":
            tensors[f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight"] = torch.randn(width, words) / words**0.5
    return tensors


def safety_checker(**other: Any) -> StableDiffusionSafetyChecker:
    """Stable Diffusion's, on CLIP ViT-L/14; its thresholds let every picture pass."""
    text = {key: CLIP_L[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = CLIPConfig(projection_dim=768, text_config=text, vision_config={**VIT_L, "patch_size": 14, **other})
    return StableDiffusionSafetyChecker(config)


@contextmanager
def drawn_in(dtype: torch.dtype) -> Iterator[None]:
    """New networks have such weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def write(model: Published, folder: Path, dtype: torch.dtype = torch.bfloat16, *, kl: bool = False) -> Path:
    """Write a model's folder, part by part, so that no more than one is in memory."""
    torch.manual_seed(0)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if len(model.texts) > 1 else "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL" if kl else "AutoencoderTiny"],
        "scheduler": ["diffusers", model.scheduler.__name__],
        "force_zeros_for_empty_prompt": True,
    }
    with drawn_in(dtype):
        unet(model).save_pretrained(folder / "unet")
        autoencoder(model, kl=kl).save_pretrained(folder / "vae")
        for part, text in zip(("", "_2"), text_models(model), strict=False):
            text.save_pretrained(folder / f"text_encoder{part}")
            tokenizer().save_pretrained(folder / f"tokenizer{part}")
            index[f"text_encoder{part}"] = ["transformers", type(text).__name__]
            index[f"tokenizer{part}"] = ["transformers", "CLIPTokenizer"]
    few: dict[str, Any] = {} if model.scheduler is PNDMScheduler else {"timestep_spacing": "trailing"}
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    model.scheduler(**betas, **few, steps_offset=1).save_pretrained(folder / "scheduler")
    if model.motion:  # its position tables are computed, which takes float32
        motion_adapter(model).to(dtype).save_pretrained(folder / "motion_adapter")
    if model.row:
        write_recipe(model, folder, dtype)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def write_recipe(model: Published, folder: Path, dtype: torch.dtype) -> None:
    """What `livestyle fetch` adds to a checkpoint for a row: the LoRA, and changes to the scheduler."""
    spec = ROWS[model.row]
    file = Path(next(source.files[0] for source in spec.sources if source.part == "lora")).name
    (folder / "lora").mkdir(exist_ok=True)
    save(lora(model), folder / "lora" / file, dtype)
    (folder / "lora" / "lora.json").write_text(json.dumps({"file": file, "scale": spec.recipe.lora_scale}))
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(spec.recipe.scheduler), indent=1))


def save(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    stored = {name: t.to(dtype) for name, t in tensors.items()}
    save_file(stored, path, metadata={"format": "pt"})


def write_addon(
    name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, model: Published = SD15, **vision: Any
) -> Path:
    """Write an add-on's folder, of `ADDONS`, for this kind of model; `vision` changes CLIP's image encoder."""
    torch.manual_seed(0)
    with drawn_in(dtype):
        match name:
            case "controlnet":
                controlnet(model).save_pretrained(folder)
            case "ip-adapter":
                encoder = image_encoder(**vision)
                encoder.save_pretrained(folder / "image_encoder")
                tensors = ip_adapter(model, encoder.config.projection_dim)
                save(tensors, folder / "ip-adapter_sd15.safetensors", dtype)
            case "safety-checker":
                safety_checker(**vision).save_pretrained(folder)
    return folder


def listing(folder: Path) -> Iterator[str]:
    """A line per file of weights: its path, how many million values, how many megabytes."""
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            values = sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
        yield f"{path.relative_to(folder)}: {values / 1e6:.1f} M values, {path.stat().st_size / 1e6:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*MODELS, *ADDONS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kl", action="store_true", help="the full autoencoder")
    arguments = parser.parse_args()
    if arguments.name in ADDONS:
        write_addon(arguments.name, arguments.folder)
    else:
        write(MODELS[arguments.name], arguments.folder, kl=arguments.kl)
    for line in listing(arguments.folder):
        print(line)


if __name__ == "__main__":
    main()
