"""The refiner: how much flicker it takes out, what it leaves alone, and when it forgets."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from models import temporal
from models.filters import halved, to_image, to_picture, to_tensor
from models.flow import Dis
from models.reproject import Guide, Motion
from models.temporal import Blend, Past, flickered, likely, refine
from tests.scenes import SIZE, Image, passing, sliding, texture

W, H = SIZE


def motion(trust: float = 1.0, *, cut: bool = False) -> Motion:
    """Nothing moved."""
    small = torch.zeros(1, 3, H // 2, W // 2)
    return Motion(torch.zeros(1, 2, H // 2, W // 2), torch.full((1, 1, H // 2, W // 2), trust), cut, small, small)


def noisy(picture: Tensor, sigma: float, seed: int) -> Tensor:
    grain = np.random.default_rng(seed).standard_normal((H, W, 3), np.float32)
    return picture + to_tensor(sigma * grain)


def refined(sources: list[Image], stylized: list[Image]) -> list[Image]:
    """A clip through guide and refiner."""
    guide, past, output = Guide(Dis(), Dis(refine=0)), Past(), []
    for source, picture in zip(sources, stylized, strict=True):
        output.append(to_image(refine(to_picture(picture), guide.advance(halved(source)), past)))
    return output


def error(clip: list[Image], reference: list[Image]) -> float:
    """Mean squared, in levels."""
    return float(np.mean([np.square(a.astype(float) - b).mean() for a, b in zip(clip, reference, strict=True)]))


def detail(clip: list[Image]) -> float:
    """Mean absolute Laplacian."""
    greys = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) for image in clip]
    return float(np.mean([np.abs(cv2.Laplacian(grey, cv2.CV_32F)).mean() for grey in greys]))


@pytest.fixture(autouse=True)
def _same_flicker_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporal, "CHANCE", np.random.default_rng(5))


@pytest.mark.parametrize("sigma", [0.02, 0.05])
def test_noise_over_a_still_picture_falls_as_the_recursion_says(sigma: float) -> None:
    """A running mean at first, 1/n of the variance; in the long run (1 - w) / (1 + w).

    With w = 0.9 that is 0.053, with 0.86 0.075. The fine band holds a little less, as part of any noise is taken for
    a change; measured: 0.07-0.1. The second frame is cleaned within itself too, as its past says little yet.
    """
    clean, past = to_picture(texture()), Past()
    left = []
    for i in range(60):
        output = refine(noisy(clean, sigma, i), motion() if i else None, past)
        left.append(float((output - clean).square().mean()) / sigma**2)
    np.testing.assert_allclose(left[:6], 1 / np.arange(1, 7), rtol=0.2)
    assert left[1] < 0.5
    assert 0.05 < np.mean(left[30:]) < 0.12


@pytest.mark.parametrize("step", [(0, 0), (2, -1), (3, 2)])
def test_flicker_over_what_moves_fades_and_detail_stays(step: tuple[int, int]) -> None:
    sources = sliding(24, step)
    clean = [255 - image for image in sources]
    wavering = [flickered(image, 1.0) for image in clean]
    output = refined(sources, wavering)
    assert error(output[8:], clean[8:]) < 0.35 * error(wavering[8:], clean[8:])
    assert detail(output[8:]) == pytest.approx(detail(clean[8:]), rel=0.1)


def test_a_steady_picture_stays_as_it_is() -> None:
    picture, past = to_picture(texture()), Past()
    for i in range(5):
        output = refine(picture.clone(), motion() if i else None, past)
        torch.testing.assert_close(output, picture, rtol=0, atol=1e-6)


def test_where_no_motion_is_trusted_the_new_picture_stands() -> None:
    past = Past()
    refine(to_picture(texture(1)), None, past)
    picture = to_picture(texture(2))
    assert torch.equal(refine(picture, motion(trust=0), past), picture)


@pytest.mark.parametrize("reset", [None, motion(cut=True)])
def test_a_cut_shows_the_new_picture_and_forgets_the_old_one(reset: Motion | None) -> None:
    past, picture = Past(), to_picture(texture(9))
    for i in range(5):
        refine(noisy(to_picture(texture()), 0.02, i), motion() if i else None, past)
    assert past.age is not None
    assert torch.equal(refine(picture, reset, past), picture)
    assert past.age is None
    refine(noisy(picture, 0.02, 9), motion(), past)
    assert float(past.age.max()) <= 1  # counted from the cut on


def test_another_size_starts_afresh() -> None:
    past, smaller = Past(), to_picture(texture(3, (64, 48)))
    refine(to_picture(texture()), None, past)
    refine(to_picture(texture()), motion(), past)
    assert torch.equal(refine(smaller, motion(), past), smaller)
    assert past.output is not None
    assert past.output.shape == smaller.shape
    assert past.age is None


def test_there_is_no_ghost_of_what_has_passed() -> None:
    """Places that a square uncovered two frames ago look as they do without it, to 3 levels (measured: 1.7)."""
    frames, places = passing(24)
    output = refined(frames, frames)
    looked_at = 0
    for i in range(4, len(frames)):
        uncovered = places[i - 2] & ~places[i - 1] & ~places[i]
        if uncovered.any():
            looked_at += 1
            assert np.abs(output[i].astype(int) - frames[i])[uncovered].mean() < 3
    assert looked_at > 10


def test_a_real_change_of_the_style_is_shown_at_once() -> None:
    """Half of the picture is painted anew: far more than it usually wavers."""
    clean, past = to_picture(texture()), Past()
    for i in range(8):
        refine(noisy(clean, 0.01, i), motion() if i else None, past)
    changed = clean.clone()
    changed[..., W // 2 :] = 1 - changed[..., W // 2 :]
    output = refine(changed, motion(), past)
    painted_anew = (..., slice(W // 2 + 8, W))
    left, change = (output - changed)[painted_anew].abs().mean(), (clean - changed)[painted_anew].abs().mean()
    assert float(left) < 0.1 * float(change)


def test_nothing_of_a_broken_picture_stays() -> None:
    clean, past = to_picture(texture()), Past()
    for i in range(4):
        refine(clean, motion() if i else None, past)
    broken = clean.clone()
    broken[..., 10:14, 10:14] = torch.nan
    refine(broken, motion(), past)
    for _ in range(3):
        output = refine(clean, motion(), past)
        assert bool(output.isfinite().all())
    torch.testing.assert_close(output, clean, rtol=0, atol=1e-6)
    assert past.age is not None
    assert bool(past.age.isfinite().all())


def test_the_bounds_of_a_blend_are_kept() -> None:
    past, black, grey = Past(), torch.zeros(1, 3, H, W), torch.full((1, 3, H, W), 0.02)
    refine(grey, None, past)
    for _ in range(40):
        past.output = grey
        output = refine(black, motion(), past, Blend(coarse=0.5, fine=0.0))
    torch.testing.assert_close(output, torch.full_like(output, 0.01), rtol=0.01, atol=0)
    assert past.age is not None
    assert float(past.age.max()) <= Blend().memory


def test_what_exceeds_the_usual_wavering_is_unlikely() -> None:
    change = torch.full((1, 1, 40, 40), 1e-3)
    change[..., :8, :8] = 1.0
    agree, usual = likely(change, torch.ones_like(change), surprise=3.0, floor=0.0)
    assert usual == pytest.approx(1.7e-3, rel=1e-4)  # a χ² variable's 0.4-quantile is about 1/1.7 of its mean
    assert float(agree[..., :8, :8].max()) < 1e-6
    assert float(agree[..., 8:, 8:].min()) > 0.9
    agree, usual = likely(change, torch.zeros_like(change), surprise=3.0, floor=0.02)
    assert usual == 0  # nothing that is trusted to tell it by
    assert bool(agree.isfinite().all())


def test_flicker_is_as_strong_as_asked_for_and_new_each_time() -> None:
    grey = np.full((288, 512, 3), 128, np.uint8)
    assert (flickered(grey, 0.0) == grey).all()
    whole, half = (flickered(grey, value).astype(float) - 128 for value in (1.0, 0.5))
    # Between the points of a grid there is less than σ: the mean squared sum of OpenCV's cubic weights (A = -3/4) is
    # 0.735, of the bilinear ones 0.391.
    expected = np.sqrt(0.735 * 18**2 + 0.391 * 6**2)
    assert whole.std() == pytest.approx(expected, rel=0.05)
    assert half.std() == pytest.approx(expected / 2, rel=0.05)
    assert abs(whole.mean()) < 1
    assert np.corrcoef(whole[..., 0].ravel(), whole[..., 1].ravel())[0, 1] < 0.1  # per channel
    assert (flickered(grey, 1.0) != flickered(grey, 1.0)).mean() > 0.9
