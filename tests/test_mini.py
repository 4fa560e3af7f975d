"""What the shipped model promises: styles, words, strength, steps and seeds have the effect that their names say."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from models.load import load
from models.params import Params, Style
from models.spec import MODELS
from models.stylizer import LatentStylizer
from models.training.captions import NAMES
from models.training.painters import PAINTERS

SIZE = (256, 256)
FOLDER = MODELS["mini"].folder

PAINTED = [s for s in NAMES if s != "photo"]
TOO_SOFT = {"pointillism"}  # its dots are blurred into an oil painting: the card says so

Picture = NDArray[np.float32]  # (H, W, 3) in [0, 1]


@pytest.fixture(scope="module")
def mini() -> LatentStylizer:
    return load("mini", SIZE, engine="torch")


@pytest.fixture(scope="module")
def photo() -> NDArray[np.uint8]:
    from skimage import data

    return np.ascontiguousarray(cv2.resize(data.astronaut()[:440, 20:460], SIZE, interpolation=cv2.INTER_AREA))


def stylized(model: LatentStylizer, photo: NDArray[np.uint8], **style: object) -> Picture:
    params = Params(style=Style.model_validate(style))
    return model.step(model.open(params), photo, params).image().astype(np.float32) / 255


def distance(a: Picture, b: Picture) -> float:
    """Root mean square difference."""
    return float(np.sqrt(np.square(a - b).mean()))


def test_weights_are_fp16_safetensors_of_at_most_16_mb() -> None:
    weights = sorted(FOLDER.rglob("*.safetensors"))
    assert {p.parent.name for p in weights} == {"unet", "vae", "text_encoder", "motion_adapter"}
    assert sum(p.stat().st_size for p in weights) <= 16e6
    assert (FOLDER / "README.md").is_file()


def test_it_is_an_ordinary_diffusers_folder() -> None:
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]


@pytest.mark.parametrize("style", PAINTED)
def test_one_step_goes_from_the_photograph_toward_its_painter(
    mini: LatentStylizer, photo: NDArray[np.uint8], style: str
) -> None:
    source = photo.astype(np.float32) / 255
    painting = PAINTERS[style](source)
    assert distance(stylized(mini, photo, prompt=NAMES[style][0]), painting) < 0.85 * distance(source, painting)


@pytest.mark.parametrize("style", [s for s in PAINTED if s not in TOO_SOFT])
def test_one_step_is_nearest_to_its_own_painter(mini: LatentStylizer, style: str) -> None:
    from skimage import data

    cat = np.ascontiguousarray(cv2.resize(data.chelsea()[:300, 80:380], SIZE, interpolation=cv2.INTER_AREA))
    source, result = cat.astype(np.float32) / 255, stylized(mini, cat, prompt=NAMES[style][0])
    apart = {name: distance(result, PAINTERS[name](source)) for name in PAINTED}
    assert min(apart, key=apart.__getitem__) == style


@pytest.mark.parametrize("style", ["ink", "watercolour", "neon", "oil"])
def test_synonyms_mean_the_same(mini: LatentStylizer, photo: NDArray[np.uint8], style: str) -> None:
    first, second = (stylized(mini, photo, prompt=name) for name in NAMES[style][:2])
    other = stylized(mini, photo, prompt="stained glass")
    assert distance(first, second) < 0.3 * distance(first, other)


def test_a_sentence_about_something_else_keeps_the_style(mini: LatentStylizer, photo: NDArray[np.uint8]) -> None:
    plain = stylized(mini, photo, prompt="watercolour")
    told = stylized(mini, photo, prompt="a watercolour of a rainy city")
    assert distance(plain, told) < 0.5 * distance(plain, stylized(mini, photo, prompt="photo"))


def test_strength_goes_from_the_photograph_to_the_painting(mini: LatentStylizer, photo: NDArray[np.uint8]) -> None:
    source = stylized(mini, photo, prompt="photo")
    away = [distance(stylized(mini, photo, prompt="ink", strength=s), source) for s in (0.1, 0.4, 0.7, 1.0)]
    assert away == sorted(away)
    assert away[0] < 0.5 * away[-1]


def test_seeds_differ_visibly_and_stay_the_same_picture(mini: LatentStylizer, photo: NDArray[np.uint8]) -> None:
    first, second = (stylized(mini, photo, prompt="watercolour", seed=s) for s in (1, 2))
    assert 2 / 255 < distance(first, second) < 0.5 * distance(first, stylized(mini, photo, prompt="ink"))


def test_more_steps_change_the_picture_and_keep_the_style(mini: LatentStylizer, photo: NDArray[np.uint8]) -> None:
    pictures = [stylized(mini, photo, prompt="oil painting", steps=n) for n in (1, 2, 3, 4)]
    far = distance(pictures[0], stylized(mini, photo, prompt="ink"))
    for earlier, later in itertools.pairwise(pictures):
        assert 1 / 255 < distance(earlier, later) < 0.5 * far


def test_adjectives_do_what_they_say(mini: LatentStylizer, photo: NDArray[np.uint8]) -> None:
    plain = stylized(mini, photo, prompt="oil painting")
    warm = stylized(mini, photo, prompt="warm oil painting")
    dark = stylized(mini, photo, prompt="dark oil painting")
    mono = stylized(mini, photo, prompt="monochrome oil painting")
    redness = [float((p[..., 0] - p[..., 2]).mean()) for p in (plain, warm)]
    assert redness[1] > redness[0] + 0.03
    assert dark.mean() < plain.mean() - 0.05
    assert mono.std(-1).mean() < 0.5 * plain.std(-1).mean()


def test_two_styles_in_one_prompt_lie_between_them(mini: LatentStylizer, photo: NDArray[np.uint8]) -> None:
    ink, oil, both = (stylized(mini, photo, prompt=p) for p in ("ink", "oil painting", "oil painting and ink"))
    assert distance(both, ink) < distance(oil, ink)
    assert distance(both, oil) < distance(oil, ink)


def test_unknown_words_are_said(mini: LatentStylizer) -> None:
    def advice(prompt: str) -> str:
        return mini.advice(Params(style=Style(prompt=prompt)))

    assert advice("a watercolour of a rainy city") == ""
    assert "zorblax" in advice("zorblax watercolour")
    assert "no word" in advice("zorblax blimfizz")


def test_the_card_names_every_style() -> None:
    card = Path(FOLDER / "README.md").read_text()
    assert all(f"| {style} |" in card for style in NAMES)
