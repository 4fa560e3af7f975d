"""Small random model folders of the real classes, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, LCMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = ["oil", "painting", "of", "a", "rainy", "city", "in", "ink"]


def tokenizer() -> CLIPTokenizer:
    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz,." for end in ("", "</w>")]
    vocab = {symbol: i for i, symbol in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def random_folder(path: Path, kind: str, prediction: str = "epsilon") -> Path:
    """Write a folder: kind "sd" (latent input), "ip2p" (source latent concatenated) or "lcm" (guidance embedding)."""
    torch.manual_seed(0)
    tokens = tokenizer()
    vae = AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16, 16),
        decoder_block_out_channels=(16, 16, 16, 16),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
        latent_channels=4,
    )
    last = vae.decoder.layers[-1]
    with torch.no_grad():  # random decoders paint everything nearly black; comparisons need contrast
        last.weight.mul_(10)
        last.bias.fill_(0.5)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=8 if kind == "ip2p" else 4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        time_cond_proj_dim=32 if kind == "lcm" else None,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
        )
    )
    vae.save_pretrained(path / "vae")
    unet.save_pretrained(path / "unet")
    text.save_pretrained(path / "text_encoder")
    tokens.save_pretrained(path / "tokenizer")
    LCMScheduler(prediction_type=prediction, steps_offset=1).save_pretrained(path / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderTiny"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "LCMScheduler"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def random_xl_folder(
    path: Path, prediction: str = "epsilon", *, kl: bool = False, guidance_width: int | None = None
) -> Path:
    """Write a folder of SDXL's classes: two text models, the second with a projection, and pooled words and time ids
    as added conditioning; `kl` = with SDXL's own kind of autoencoder.
    """
    random_folder(path, "sd", prediction)
    torch.manual_seed(1)
    tokens = tokenizer()
    second = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=24,
        hidden_act="gelu",
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2, 3),
        cross_attention_dim=32 + 48,
        attention_head_dim=(1, 2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=24 + 6 * 16,
        time_cond_proj_dim=guidance_width,
    )
    CLIPTextModelWithProjection(second).save_pretrained(path / "text_encoder_2")
    CLIPTokenizer(vocab=tokens.get_vocab(), merges=[], model_max_length=77, pad_token="a").save_pretrained(
        path / "tokenizer_2"
    )
    unet.save_pretrained(path / "unet")
    if kl:
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.13025,
            force_upcast=True,
        )
        vae.save_pretrained(path / "vae")
    index = json.loads((path / "model_index.json").read_text()) | {
        "_class_name": "StableDiffusionXLPipeline",
        "vae": ["diffusers", "AutoencoderKL" if kl else "AutoencoderTiny"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": True,
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path
