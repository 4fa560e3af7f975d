"""SDXL's kind of model equals diffusers' own pipeline on the same folder, steps and seed (≤ 1e-3 in float32)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    LCMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from accel.errors import UserError
from models.load import compiled_graphs, load
from models.params import Params, Style
from models.stylizer import LatentStylizer
from models.text_xl import DoubleTextEncoder, size_ids
from tests.folders import random_folder, random_xl_folder

SIZE = (96, 64)  # width, height
TOLERANCE = 1e-3
PROMPT, NEGATIVE = "oil painting of a rainy city", "ink"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_xl_folder(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def ours(folder: Path) -> LatentStylizer:
    return load(str(folder), SIZE, engine="torch", as_bytes=False)


def pipeline(folder: Path) -> Any:
    index = json.loads((folder / "model_index.json").read_text())
    autoencoder: Any = AutoencoderKL if index["vae"][1] == "AutoencoderKL" else AutoencoderTiny
    made = StableDiffusionXLImg2ImgPipeline(
        vae=autoencoder.from_pretrained(folder / "vae"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        scheduler=LCMScheduler.from_pretrained(folder / "scheduler"),
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def picture() -> torch.Tensor:
    return torch.rand(1, 3, SIZE[1], SIZE[0], generator=torch.Generator().manual_seed(7))


def stylized(stylizer: LatentStylizer, **style: Any) -> torch.Tensor:
    params = Params(style=Style(**({"prompt": PROMPT, "seed": 5} | style)))
    with torch.inference_mode():
        return stylizer.stylize(stylizer.open(params), picture(), params).clone()


def theirs(
    pipeline: Any, steps: int, strength: float = 1.0, image: torch.Tensor | None = None, **arguments: Any
) -> torch.Tensor:
    """Their steps are those of the whole way, of which the strength leaves some out; ours are the ones made."""
    image = picture() if image is None else image
    arguments = {"guidance_scale": 1.0, "generator": torch.Generator().manual_seed(5)} | arguments
    count = round(steps / strength)
    return pipeline(
        PROMPT, image=image, num_inference_steps=count, strength=strength, output_type="pt", **arguments
    ).images


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_equals_stable_diffusion_xl_img2img(
    folder: Path, ours: LatentStylizer, steps: int, strength: float, guidance: float
) -> None:
    expected = theirs(pipeline(folder), steps, strength, guidance_scale=guidance, negative_prompt=NEGATIVE)
    found = stylized(ours, negative=NEGATIVE, steps=steps, strength=strength, guidance=guidance)
    assert (found - expected).abs().max() <= TOLERANCE


def test_no_negative_prompt_means_zeros_where_the_folder_says_so(folder: Path, ours: LatentStylizer) -> None:
    expected = theirs(pipeline(folder), 2, guidance_scale=3.0)
    assert (stylized(ours, steps=2, guidance=3.0) - expected).abs().max() <= TOLERANCE
    empty = theirs(pipeline(folder), 2, guidance_scale=3.0, negative_prompt="")
    assert (empty - expected).abs().max() > TOLERANCE


def test_the_comparison_would_notice(ours: LatentStylizer) -> None:
    """Neither words, pooled words nor size ids may be so weak that leaving them out is not seen."""
    base = stylized(ours)
    assert base.std() > 0.02
    assert (stylized(ours, prompt="ink") - base).abs().max() > 10 * TOLERANCE
    text, unet = ours.networks.text, ours.networks.unet
    assert isinstance(text, DoubleTextEncoder)
    one, other = text.read(PROMPT), text.read("ink")
    z, t = torch.zeros(unet.spec.inputs[0].shape), torch.tensor([999.0])
    (wanted,) = unet(z, t, one.words, one.pooled, size_ids(SIZE))
    assert (unet(z, t, other.words, one.pooled, size_ids(SIZE))[0] - wanted).abs().max() > TOLERANCE
    assert (unet(z, t, one.words, other.pooled, size_ids(SIZE))[0] - wanted).abs().max() > TOLERANCE
    assert (unet(z, t, one.words, one.pooled, size_ids((512, 512)))[0] - wanted).abs().max() > TOLERANCE


def test_prompt_marks_tell_on_the_words_and_blends_on_both(ours: LatentStylizer) -> None:
    text = ours.networks.text
    assert isinstance(text, DoubleTextEncoder)
    plain, other = text.read("oil city"), text.read("ink")
    heavy = text.read("oil (city:1.4)")
    assert not torch.equal(heavy.words, plain.words)
    assert torch.equal(heavy.pooled, text.read("oil (city:0.5)").pooled)
    half = text.read("oil city | ink")
    assert all(not torch.equal(b, a) and not torch.equal(b, c) for a, b, c in zip(plain, half, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(text.read("oil city :1 | ink :0"), plain, strict=True))
    assert text.is_cut("ink " * 100)
    assert not text.is_cut("ink")


def test_equals_it_with_a_guidance_embedding(tmp_path: Path) -> None:
    folder = random_xl_folder(tmp_path, guidance_width=32)
    expected = theirs(pipeline(folder), 2, guidance_scale=7.5)
    found = stylized(load(str(folder), SIZE, engine="torch", as_bytes=False), steps=2, guidance=7.5)
    assert (found - expected).abs().max() <= TOLERANCE


def test_equals_it_with_the_full_autoencoder_and_keeps_that_in_float32(tmp_path: Path) -> None:
    folder = random_xl_folder(tmp_path, "v_prediction", kl=True)
    reference = pipeline(folder)
    with torch.inference_mode():  # they draw from the latent's distribution, we take its middle
        middle = reference.vae.encode(picture() * 2 - 1).latent_dist.mode() * reference.vae.config.scaling_factor
    expected = theirs(reference, 2, 0.5, image=middle)
    found = stylized(load(str(folder), SIZE, engine="torch", as_bytes=False), steps=2, strength=0.5)
    assert (found - expected).abs().max() <= TOLERANCE
    precisions = {name: graph.spec.precision for name, graph in compiled_graphs(str(folder), SIZE).items()}
    assert precisions == {"encode": "fp32", "unet": "fast", "decode": "fp32"}


def test_openvino_takes_the_added_inputs(folder: Path) -> None:
    stylizer = load(str(folder), SIZE, engine="openvino")
    params = Params(style=Style(prompt=PROMPT, guidance=3.0))
    image = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
    assert stylizer.step(stylizer.open(params), image, params).image().shape == image.shape


def test_other_models_take_no_added_inputs(tmp_path: Path) -> None:
    spec = compiled_graphs(str(random_folder(tmp_path, "sd")), SIZE)["unet"].spec
    assert [tensor.name for tensor in spec.inputs] == ["z", "t", "words"]


def changed(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("unet/config.json", {"addition_embed_type": "image"}, "no image model of a known kind"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 104}, "does not fit the text models"),
        ("text_encoder_2/config.json", {"projection_dim": 32}, "does not fit the text models"),
        ("model_index.json", {"text_encoder": [None, None]}, "no image model of a known kind"),
        ("model_index.json", {"text_encoder": None}, "no image model of a known kind"),
        ("vae/config.json", {"latents_mean": [0.0, 0.0, 0.0, 0.0]}, "mean per channel"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "predicts the noise"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, file: str, values: dict[str, Any], message: str) -> None:
    folder = random_xl_folder(tmp_path)
    changed(folder, file, **values)
    with pytest.raises(UserError, match=message):
        load(str(folder), SIZE, engine="torch")


def test_a_missing_second_text_model_is_named(tmp_path: Path) -> None:
    folder = random_xl_folder(tmp_path)
    (folder / "text_encoder_2" / "config.json").unlink()
    with pytest.raises(UserError, match=r"text_encoder_2/config\.json"):
        load(str(folder), SIZE, engine="torch")
