"""The stylizer equals diffusers' own pipelines on the same folder, steps and seed (≤ 1e-3 in float32)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    LatentConsistencyModelImg2ImgPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from models.autoencoder import PatchAutoencoder
from models.load import load
from models.params import Params, Style
from models.spec import MODELS
from models.stylizer import LatentStylizer
from tests.folders import random_folder

SIZE = (96, 64)  # width, height
TOLERANCE = 1e-3
PROMPT, NEGATIVE = "oil painting of a rainy city", "ink"


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def prediction(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, prediction: str, kind: str) -> Path:
    return random_folder(tmp_path_factory.mktemp(kind), kind, prediction)


@pytest.fixture(scope="module")
def ours(folder: Path) -> LatentStylizer:
    return load(str(folder), SIZE, engine="torch", as_bytes=False)


def parts(folder: Path) -> dict[str, Any]:
    """What diffusers' pipelines are built from."""
    autoencoder = PatchAutoencoder if folder == MODELS["mini"].folder else AutoencoderTiny
    return {
        "vae": autoencoder.from_pretrained(folder / "vae"),
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": LCMScheduler.from_pretrained(folder / "scheduler"),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def picture() -> torch.Tensor:
    return torch.rand(1, 3, SIZE[1], SIZE[0], generator=torch.Generator().manual_seed(7))


def stylized(stylizer: LatentStylizer, style: Style) -> torch.Tensor:
    params = Params(style=style)
    with torch.inference_mode():
        return stylizer.stylize(stylizer.open(params), picture(), params).clone()


def run(pipeline: Any, **arguments: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    image = picture()
    return pipeline(
        PROMPT, image=image, generator=torch.Generator().manual_seed(5), output_type="pt", **arguments
    ).images


@pytest.mark.parametrize("kind", ["lcm"], scope="module")
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_equals_latent_consistency_img2img(
    folder: Path, ours: LatentStylizer, steps: int, strength: float, guidance: float
) -> None:
    pipeline = LatentConsistencyModelImg2ImgPipeline(**parts(folder))
    theirs = run(pipeline, num_inference_steps=steps, strength=strength, guidance_scale=guidance)
    style = Style(prompt=PROMPT, steps=steps, strength=strength, guidance=guidance, seed=5)
    assert (stylized(ours, style) - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["sd"], scope="module")
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_equals_stable_diffusion_img2img(folder: Path, ours: LatentStylizer, steps: int, guidance: float) -> None:
    pipeline = StableDiffusionImg2ImgPipeline(**parts(folder))
    theirs = run(pipeline, num_inference_steps=steps, strength=1.0, guidance_scale=guidance, negative_prompt=NEGATIVE)
    style = Style(prompt=PROMPT, negative=NEGATIVE, steps=steps, guidance=guidance, seed=5)
    assert (stylized(ours, style) - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["ip2p"], scope="module")
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(("guidance", "image_guidance"), [(1.0, 1.0), (4.0, 1.0), (4.0, 1.5)])
def test_equals_instruct_pix2pix(
    folder: Path, ours: LatentStylizer, steps: int, guidance: float, image_guidance: float
) -> None:
    pipeline = StableDiffusionInstructPix2PixPipeline(**parts(folder))
    theirs = run(
        pipeline,
        num_inference_steps=steps,
        guidance_scale=guidance,
        image_guidance_scale=image_guidance,
        negative_prompt=NEGATIVE,
    )
    style = Style(
        prompt=PROMPT, negative=NEGATIVE, steps=steps, guidance=guidance, image_guidance=image_guidance, seed=5
    )
    assert (stylized(ours, style) - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["sd"], scope="module")
def test_the_comparison_would_notice(ours: LatentStylizer) -> None:
    """Outputs must not be so flat that anything equals anything."""
    base = stylized(ours, Style(prompt=PROMPT, seed=5))
    assert base.std() > 0.02
    assert (stylized(ours, Style(prompt=PROMPT, seed=6)) - base).abs().max() > 20 * TOLERANCE
    assert (stylized(ours, Style(prompt="ink", seed=5)) - base).abs().max() > TOLERANCE


@pytest.mark.parametrize("steps", [1, 4])
def test_mini_runs_in_diffusers_own_pipeline_and_is_the_same_there(steps: int) -> None:
    folder = MODELS["mini"].folder
    pipeline = StableDiffusionInstructPix2PixPipeline(**parts(folder)).to(torch.float32)
    theirs = run(pipeline, num_inference_steps=steps, guidance_scale=1.0)
    style = Style(prompt=PROMPT, steps=steps, seed=5)
    assert (stylized(load("mini", SIZE, engine="torch", as_bytes=False), style) - theirs).abs().max() <= TOLERANCE
