"""The painters are what `mini` learned: local, deterministic, anchored to the picture, and in the right range."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.training.captions import BOLD_WORDS, FINE_WORDS, NAMES, SCENES, TONES, corpus, sentence
from models.training.painters import PAINTERS
from models.training.tones import tone

Picture = NDArray[np.float32]
REACH = 56  # pixels: how far a painter may look


@pytest.fixture(scope="module")
def photo() -> Picture:
    from skimage import data

    return cv2.resize(data.astronaut(), (256, 256), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def test_every_style_has_a_painter_and_a_name() -> None:
    assert set(NAMES) == set(PAINTERS)
    assert len(PAINTERS) - 1 >= 10


@pytest.mark.parametrize("name", PAINTERS)
def test_painting_is_a_picture_and_repeatable(photo: Picture, name: str) -> None:
    kept = photo.copy()
    painted = PAINTERS[name](photo)
    assert painted.shape == photo.shape
    assert painted.dtype == np.float32
    assert painted.min() >= 0
    assert painted.max() <= 1
    assert np.array_equal(painted, PAINTERS[name](photo))
    assert np.array_equal(photo, kept)


@pytest.mark.parametrize("name", PAINTERS)
def test_a_crop_on_the_grid_is_painted_as_in_the_whole(photo: Picture, name: str) -> None:
    """So that latent crops can teach it, and that a moved picture is not painted anew."""
    y, x, size = 48, 80, 160
    whole = PAINTERS[name](photo)[y : y + size, x : x + size]
    alone = PAINTERS[name](np.ascontiguousarray(photo[y : y + size, x : x + size]))
    inner = slice(REACH, size - REACH)
    assert np.abs(whole[inner, inner] - alone[inner, inner]).max() < 0.02


@pytest.mark.parametrize("name", [n for n in PAINTERS if n != "photo"])
def test_a_painting_moves_with_the_picture(photo: Picture, name: str) -> None:
    """Shifted by one grid cell, the same strokes come out, shifted."""
    moved = PAINTERS[name](np.roll(photo, 8, axis=1))
    still = np.roll(PAINTERS[name](photo), 8, axis=1)
    inner = slice(REACH, -REACH)
    assert np.abs(moved[inner, inner] - still[inner, inner]).max() < 0.02


@pytest.mark.parametrize("name", [n for n in PAINTERS if n != "photo"])
def test_sensor_noise_does_not_make_it_flicker(photo: Picture, name: str) -> None:
    rng = np.random.default_rng(0)
    noisy = [(photo + rng.normal(0, 0.01, photo.shape)).clip(0, 1).astype(np.float32) for _ in range(2)]
    source = np.abs(noisy[0] - noisy[1]).mean()
    painted = np.abs(PAINTERS[name](noisy[0]) - PAINTERS[name](noisy[1])).mean()
    assert painted < 2.5 * source


@pytest.mark.parametrize("name", ["ink", "toon", "neon", "glass"])
def test_lines_get_thicker(name: str) -> None:
    """Around a disc a little darker than its ground there is nothing but a line to be changed."""
    y, x = np.mgrid[0:128, 0:128]
    disc = np.where(np.hypot(x - 64, y - 64) < 36, 0.6, 0.85).astype(np.float32)
    picture = cv2.GaussianBlur(np.repeat(disc[..., None], 3, axis=2), (0, 0), 1.0)
    changed = [
        np.abs(PAINTERS[name](picture, thickness=t) - np.median(PAINTERS[name](picture))) for t in (0.6, 1.0, 1.7)
    ]
    area = [float((c.mean(-1) > 0.25).mean()) for c in changed]
    assert area == sorted(area)
    assert area[2] > area[0]


@pytest.mark.parametrize("name", TONES)
def test_tones_stay_in_range_and_change_something(name: str) -> None:
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    toned = tone(picture, name)
    assert toned.shape == picture.shape
    assert toned.min() >= 0
    assert toned.max() <= 1
    assert (toned - picture).abs().mean() > 0.01


def test_captions_are_made_of_known_words() -> None:
    rng = np.random.default_rng(0)
    words = {w for phrase in corpus() for w in phrase.replace(",", " ").split()}
    for style in NAMES:
        text = sentence(style, [BOLD_WORDS[0], FINE_WORDS[0]], rng)
        assert any(n in text for n in NAMES[style])
        assert sum(w.strip(",") in words for w in text.split()) >= len(text.split()) - 1  # one may be made up
    assert SCENES
