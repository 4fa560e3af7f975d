"""Published configurations: as large as the real models, and narrow twins of them equal diffusers' own pipelines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.load import load
from models.params import Params, Style
from scripts.random_folder import MODELS, Published, text_models, unet, write

SIZE = (96, 64)  # width, height
TOLERANCE = 1e-3
PROMPT, NEGATIVE = "oil painting of a rainy city", "ink"


def narrow(model: Published) -> Published:
    """The same layers with a tenth of the width or less."""
    few = {5: 2, 10: 4, 20: 8}
    heads = model.unet["attention_head_dim"]
    by = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "projection_dim": 16}
    smaller: dict[str, Any] = {
        "block_out_channels": tuple(width // 10 for width in model.unet["block_out_channels"]),
        "attention_head_dim": heads if isinstance(heads, int) else tuple(few[n] for n in heads),
        "cross_attention_dim": model.unet["cross_attention_dim"] // 16,
        "norm_num_groups": 8,
    }
    if len(model.texts) > 1:
        smaller |= {"addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 2816 // 16}
    texts = tuple(text | {key: text[key] // n for key, n in by.items()} for text in model.texts)
    return replace(model, unet=model.unet | smaller, texts=texts)


@pytest.fixture(scope="module", params=list(MODELS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write(narrow(MODELS[request.param]), tmp_path_factory.mktemp(request.param), torch.float32)
    vae = AutoencoderTiny.from_pretrained(path / "vae")
    last = vae.decoder.layers[-1]
    with torch.no_grad():  # random decoders paint everything nearly black; comparisons need contrast
        last.weight.mul_(20)
        last.bias.fill_(0.5)
    vae.save_pretrained(path / "vae")
    return path


def schedule(folder: Path, kind: Any = LCMScheduler) -> Any:
    return kind.from_config(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()))


def theirs(folder: Path, scheduler: Any, steps: int, guidance: float) -> torch.Tensor:
    parts: dict[str, Any] = {
        "vae": AutoencoderTiny.from_pretrained(folder / "vae"),
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": scheduler,
    }
    if (folder / "text_encoder_2").is_dir():
        parts["text_encoder_2"] = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
        parts["tokenizer_2"] = CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
        pipeline = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    else:
        nothing: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
        pipeline = StableDiffusionImg2ImgPipeline(**parts, **nothing, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        image=picture(),
        num_inference_steps=steps,
        strength=1.0,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images


def picture() -> torch.Tensor:
    return torch.rand(1, 3, SIZE[1], SIZE[0], generator=torch.Generator().manual_seed(7))


def stylized(folder: Path, steps: int, guidance: float) -> torch.Tensor:
    stylizer = load(str(folder), SIZE, engine="torch", as_bytes=False)
    params = Params(style=Style(prompt=PROMPT, negative=NEGATIVE, seed=5, steps=steps, guidance=guidance))
    with torch.inference_mode():
        return stylizer.stylize(stylizer.open(params), picture(), params).clone()


@pytest.mark.parametrize(
    ("name", "network", "texts"),
    [
        ("sd15", 859_520_964, [123_060_480]),
        ("sd-turbo", 865_910_724, [340_387_840]),
        ("sdxl-turbo", 2_567_463_684, [123_060_480, 694_659_840]),
    ],
)
def test_has_as_many_weights_as_the_published_model(name: str, network: int, texts: list[int]) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in unet(MODELS[name]).parameters()) == network
        assert [sum(p.numel() for p in text.parameters()) for text in text_models(MODELS[name])] == texts


@pytest.mark.parametrize(("steps", "guidance"), [(2, 3.0), (4, 1.0)])
def test_a_narrow_twin_equals_diffusers(folder: Path, steps: int, guidance: float) -> None:
    found = stylized(folder, steps, guidance)
    assert found.std() > 0.02  # else anything equals anything
    assert (found - theirs(folder, schedule(folder), steps, guidance)).abs().max() <= TOLERANCE


def test_one_step_is_that_of_eulers_scheduler_too(folder: Path) -> None:
    """What the turbo models were published with."""
    expected = theirs(folder, schedule(folder, EulerDiscreteScheduler), 1, 1.0)
    assert (stylized(folder, 1, 1.0) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("folder", ["sd-turbo"], indirect=True)
def test_v_prediction_down_from_no_signal_at_all(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | zero))
    found = stylized(folder, 2, 3.0)
    assert (found - theirs(folder, schedule(folder), 2, 3.0)).abs().max() <= TOLERANCE
