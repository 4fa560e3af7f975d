"""A single-file Stable Diffusion 1.5 checkpoint, as people trade them, made into a folder in diffusers' format."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accel.errors import UserError
from models.hub import asked, brought, fault, told
from models.rows import models_root
from models.spec import MODELS, WEIGHTS, WORDS

# The published configuration, where it differs from the defaults of its classes.
SD15: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    },
    "scheduler": {
        "_class_name": "PNDMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    },
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
}
FIRST = "model.diffusion_model.input_blocks.0.0.weight"  # (width, 4, 3, 3)
CROSS = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"  # (width, words' width)
HINT = "a Stable Diffusion 1.5 checkpoint of about 2 or 4 GB is wanted"


def converted(path: Path, published: dict[str, dict[str, Any]] = SD15) -> Path:
    """The checkpoint's folder, made on its first use and kept beside the fetched models.

    The network is asked only for the tokenizer (1.6 MB), where none is beside the file or among the fetched models.
    """
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path.name} is not a .safetensors file", hint="convert it first: others may run code when read"
        )
    if problem := fault(path):
        raise UserError(f"{path.name}: {problem}", hint="fetch it again")
    with path.open("rb") as stream:
        head = stream.read(int.from_bytes(stream.read(8), "little"))
    header = json.loads(head)
    family(path.name, header, published)
    state = path.stat()
    key = hashlib.sha256(head + f"{state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:8]
    folder = models_root() / f"{path.stem}-{key}"
    if (folder / "model_index.json").is_file():
        return folder
    words = tokenizer(path)
    beside = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        for part, config in published.items():
            (beside / part).mkdir(parents=True)
            name = "scheduler_config.json" if part == "scheduler" else "config.json"
            (beside / part / name).write_text(json.dumps(config, indent=1))
        convert(path, beside, published)
        (beside / "tokenizer").mkdir()
        for file in words:
            shutil.copyfile(file, beside / "tokenizer" / file.name)
        index = INDEX | {"_diffusers_version": version("diffusers")}
        (beside / "model_index.json").write_text(json.dumps(index, indent=1))
        return beside.rename(folder)
    except OSError as error:
        raise UserError(
            f"{path.name} could not be converted: {error}",
            hint=f"{state.st_size >> 20} MB of room are needed in {folder.parent}",
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def family(name: str, header: dict[str, Any], published: dict[str, dict[str, Any]]) -> None:
    """UserError where a checkpoint's tensors are not those of Stable Diffusion 1.5."""
    if any("lora" in key for key in header):
        raise UserError(f"{name} is a LoRA, not a whole checkpoint", hint=HINT)
    if any(key.startswith("conditioner.embedders.1") for key in header):
        raise UserError(f"{name} is a Stable Diffusion XL checkpoint", hint=HINT)
    if FIRST not in header or CROSS not in header:
        raise UserError(f"{name} holds no Stable Diffusion UNet", hint=HINT)
    if (channels := header[FIRST]["shape"][1]) != 4:
        raise UserError(f"{name} takes {channels} latent channels: an inpainting or editing checkpoint", hint=HINT)
    if (width := header[CROSS]["shape"][1]) != published["unet"]["cross_attention_dim"]:
        raise UserError(f"{name} reads words of width {width}, as Stable Diffusion 2 does", hint=HINT)


def convert(path: Path, folder: Path, published: dict[str, dict[str, Any]]) -> None:
    """Write the networks of a checkpoint under the names that diffusers gives their weights, each in its own type."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    # The functions behind `from_single_file`, which would make all weights one type, and fill in for missing ones.
    rename: Any = single_file_utils
    state, unet, vae = load_file(path), published["unet"], published["vae"]
    unets: Any = UNet2DConditionModel
    vaes: Any = AutoencoderKL
    with torch.device("meta"):
        models: dict[str, Any] = {
            "unet": unets.from_config(unet),
            "vae": vaes.from_config(vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**published["text_encoder"])),
        }
    for part, model in models.items():
        try:
            if part == "text_encoder":
                named = rename.convert_ldm_clip_checkpoint(state)
                named = {key.removeprefix("text_model."): tensor for key, tensor in named.items()}
            elif part == "vae":
                named = rename.convert_ldm_vae_checkpoint(state, vae)
            else:
                named = rename.convert_ldm_unet_checkpoint(state, unet)
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{path.name} is not laid out as Stable Diffusion 1.5 ({error})", hint=HINT) from error
        kept = {}
        for name, wanted in model.state_dict().items():
            if name not in named:
                raise UserError(f"{path.name} has no {part} {name}", hint=HINT)
            if named[name].shape != wanted.shape:
                raise UserError(f"{path.name}: {part} {name} is {tuple(named[name].shape)}", hint=HINT)
            kept[name] = named[name].contiguous()
        file = "model.safetensors" if part == "text_encoder" else WEIGHTS
        save_file(kept, folder / part / file, metadata={"format": "pt"})


def tokenizer(path: Path) -> list[Path]:
    """The files of CLIP's tokenizer: beside the checkpoint, of a fetched model, or from the hub."""
    for folder in (
        path.parent / "tokenizer",
        *(models_root() / f"{row}/tokenizer" for row in ("sd15-lcm", "sd15-hyper", "animatediff-lcm")),
    ):
        if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
            return sorted(file for file in folder.iterdir() if file.is_file())
    spec = MODELS["sd15-lcm"]
    source = next(source for source in spec.sources if source.part == "tokenizer")
    try:
        with told(spec):
            return [brought(asked(source, file, None), None, lambda n: None) for file in source.files]
    except UserError as error:
        raise UserError(
            f"{path.name} brings no tokenizer: {error.message}",
            hint=f"{error.hint}; or put a tokenizer folder with {', '.join(WORDS)} beside it",
        ) from error
