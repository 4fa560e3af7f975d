"""A small folder of Stable Diffusion's classes with random weights, where `bench.peers` is given none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WIDTHS = (64, 128, 192)  # channels of the UNet per level: 8.7 million weights
WORDS = 64  # width of the text model


def random_folder(path: Path, widths: tuple[int, ...] = WIDTHS) -> Path:
    """Write a folder in diffusers' format: a small UNet and text model, and TAESD at its real size."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    library: Any = diffusers
    random = torch.get_rng_state()
    torch.manual_seed(0)
    vae = library.AutoencoderTiny(latent_magnitude=3, scaling_factor=1.0)
    last = vae.decoder.layers[-1]
    with torch.no_grad():  # random decoders paint nearly black, and pictures that are all alike compare well
        last.weight.mul_(10)
        last.bias.fill_(0.5)
    deeper = len(widths) - 1
    unet = library.UNet2DConditionModel(
        sample_size=64,
        block_out_channels=widths,
        down_block_types=(*("CrossAttnDownBlock2D",) * deeper, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * deeper),
        layers_per_block=1,
        cross_attention_dim=WORDS,
        attention_head_dim=8,
    )
    words = tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WORDS,
            intermediate_size=4 * WORDS,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
        )
    )
    torch.set_rng_state(random)
    schedule = library.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    parts = {"vae": vae, "unet": unet, "text_encoder": text, "tokenizer": words, "scheduler": schedule}
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline"}
    for name, part in parts.items():
        part.save_pretrained(path / name)
        package = "transformers" if name in ("text_encoder", "tokenizer") else "diffusers"
        index[name] = [package, "CLIPTokenizer" if name == "tokenizer" else type(part).__name__]
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def tokenizer() -> Any:
    """A CLIP tokenizer that spells: letters, digits and marks, no merges."""
    from transformers import CLIPTokenizer

    letters = [chr(code) + end for code in range(33, 127) for end in ("", "</w>")]
    vocab = {symbol: place for place, symbol in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
