"""Following a source, carrying keys along it, and the colours of a style."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models import reproject
from models.filters import halved, resize, to_image, to_picture, to_tensor
from models.flow import Dis
from models.reproject import CELL, GUIDE, Guide, Key, Motion, Track, fit_tint, scaled
from tests.scenes import SIZE, Image, psnr, sliding, texture

W, H = SIZE
SMALL = (W // GUIDE, H // GUIDE)
# An affine style: every colour is mixed from the source's.
MIX = torch.tensor([[0.5, 0.3, -0.1], [-0.2, 0.6, 0.2], [0.1, -0.4, 0.7]])
SHIFT = torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)


def painted(source: Tensor) -> Tensor:
    """In the affine style, (1, 3, H, W)."""
    mixed = torch.einsum("ij,bjhw->bihw", MIX, source) + SHIFT
    return mixed.contiguous(memory_format=torch.channels_last)


def constant(dx: float, dy: float, size: tuple[int, int] = SMALL) -> Tensor:
    return torch.tensor([float(dx), float(dy)]).view(1, 2, 1, 1).expand(1, 2, size[1], size[0]).contiguous()


def moved(dx: float = 0, dy: float = 0, trust: float = 1.0, *, cut: bool = False) -> Motion:
    small = torch.zeros(1, 3, SMALL[1], SMALL[0])
    return Motion(constant(dx, dy), torch.full((1, 1, SMALL[1], SMALL[0]), trust), cut, small, small)


def guide() -> Guide:
    return Guide(Dis(), Dis(refine=0))


def small(picture: Tensor) -> Tensor:
    return resize(picture, SMALL)


def track_of(image: Image) -> Track:
    return Track(halved(image))


def rms(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def test_a_flow_grows_with_its_picture() -> None:
    torch.testing.assert_close(scaled(constant(1.5, -2), (W, H)), constant(1.5 * GUIDE, -2 * GUIDE, (W, H)))
    half = (SMALL[0] // 2, SMALL[1])
    torch.testing.assert_close(scaled(constant(4, 2), half), constant(2, 2, half))


def test_the_first_frame_and_one_of_another_size_have_no_motion() -> None:
    follower = guide()
    assert follower.advance(halved(texture())) is None
    assert follower.advance(halved(texture())) is not None
    assert follower.advance(halved(texture(0, (96, 64)))) is None
    assert follower.advance(halved(texture(0, (96, 64)))) is not None
    assert follower.frame.shape == (1, 3, 32, 48)


def test_a_frozen_source_stands_still() -> None:
    follower = guide()
    follower.advance(halved(texture()))
    motion = follower.advance(halved(texture()))
    assert motion is not None
    assert not motion.cut
    assert float(motion.flow.abs().max()) < 1e-3
    assert float(motion.trust.min()) > 0.999


def test_motion_is_found_at_the_guides_size_and_both_frames_come_with_it() -> None:
    before, now = sliding(2, (4, -2))
    follower = guide()
    follower.advance(halved(before))
    motion = follower.advance(halved(now))
    assert motion is not None
    inner = (..., slice(6, -6), slice(6, -6))
    torch.testing.assert_close(
        motion.flow[inner].mean((2, 3)), torch.tensor([[4 / GUIDE, -2 / GUIDE]]), rtol=0, atol=0.1
    )
    assert float(motion.trust[inner].mean()) > 0.8
    assert torch.equal(motion.now, halved(now))
    assert torch.equal(motion.before, halved(before))


def test_the_way_back_is_only_checked_by_the_second_estimator() -> None:
    calls: list[tuple[str, float, float]] = []

    def estimator(name: str, dx: float) -> object:
        def flow(now: Tensor, before: Tensor) -> Tensor:
            calls.append((name, float(now.mean()), float(before.mean())))
            return constant(dx, 0)

        return flow

    follower = Guide(estimator("back", 1.0), estimator("check", -1.0))  # type: ignore[arg-type]
    for level in (0, 255):
        follower.advance(halved(np.full((H, W, 3), level, np.uint8)))
    assert [(name, round(now), round(before)) for name, now, before in calls] == [("back", 1, 0), ("check", 0, 1)]


@pytest.mark.parametrize("other", [texture(1), np.zeros((H, W, 3), np.uint8), np.full((H, W, 3), 255, np.uint8)])
def test_another_scene_is_a_cut_and_what_follows_is_not(other: Image) -> None:
    follower = guide()
    cuts = []
    for image in (texture(), texture(), other, other, texture()):
        motion = follower.advance(halved(image))
        cuts.append(None if motion is None else motion.cut)
    assert cuts == [None, False, True, False, True]


def test_a_track_adds_up_the_way_back_and_loses_trust_on_it() -> None:
    track = track_of(texture())
    assert track.flow is None
    for _ in range(3):
        track.advance(moved(1, -0.5, trust=0.9))
    assert track.flow is not None
    assert track.trust is not None
    torch.testing.assert_close(track.flow, constant(3, -1.5))
    torch.testing.assert_close(track.trust, torch.full_like(track.trust, 0.9**3))


def test_a_cut_is_not_forgotten() -> None:
    track = track_of(texture())
    track.advance(moved(cut=True))
    track.advance(moved())
    assert track.cut


def test_tracks_are_told_apart_by_what_they_are() -> None:
    """Not by their pictures: comparing those has no truth value."""
    tracks = [track_of(texture(seed)) for seed in range(3)]
    tracks.remove(tracks[1])
    assert len(tracks) == 2


def test_an_affine_style_is_known_exactly_but_for_the_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ridge holds a map's gain back where the source has few colours; measured here: 0.014."""
    source = to_picture(texture())
    assert rms(fit_tint(source, painted(source))(source), painted(source)) < 0.02
    monkeypatch.setattr(reproject, "STIFFNESS", 1e-7)
    assert rms(fit_tint(source, painted(source))(source), painted(source)) < 1e-3


def test_a_plain_style_is_an_offset() -> None:
    source = to_picture(texture())
    flat = torch.full_like(source, 0.25)
    torch.testing.assert_close(fit_tint(source, flat)(source), flat, rtol=0, atol=1e-5)
    grey = torch.full_like(source, 0.5)
    torch.testing.assert_close(fit_tint(grey, source * 0 + 0.7)(grey), source * 0 + 0.7, rtol=0, atol=1e-5)


def test_the_maps_of_colours_move_with_what_they_colour() -> None:
    """Left half painted red, right half blue: the border goes where the source's goes."""
    source = to_picture(texture())
    style = torch.zeros_like(source)
    style[:, 0, :, : W // 2], style[:, 2, :, W // 2 :] = 1, 1
    tint = fit_tint(source, style, 0)
    shift = 2 * CELL  # px, to the left
    carried = tint.carried(constant(shift / GUIDE, 0))(source)
    part = W // 2 + CELL
    blue, before = carried[0, 2].mean(0), tint(source)[0, 2].mean(0)
    torch.testing.assert_close(blue[:part], before[shift : shift + part], rtol=0, atol=0.15)


def test_a_key_that_nothing_moved_away_from_is_shown_to_the_byte() -> None:
    image, stylized = texture(), texture(5)
    key = Key(track_of(image), to_picture(stylized))
    picture, trust = key.now(key.track.frame, (W, H))
    assert trust is None
    assert torch.equal(picture, to_picture(stylized))
    for _ in range(10):
        key.track.advance(moved())
    picture, trust = key.now(key.track.frame, (W, H))
    assert trust is not None
    assert bool((trust == 1).all())
    assert (to_image(picture) == stylized).all()


def test_a_style_of_colours_needs_no_track() -> None:
    """Where no motion can be trusted, colours are still those of the present source."""
    before, now = to_picture(texture(0)), to_picture(texture(1))
    key = Key(Track(small(before)), painted(before))
    key.track.advance(moved(trust=0))
    picture, trust = key.now(small(now), (W, H))
    assert trust is not None
    assert float(trust.max()) == 0
    assert rms(picture, painted(now)) < 0.04  # measured: 0.026, the ridge's
    assert rms(painted(before), painted(now)) > 0.1  # holding the key would be far off


def test_after_a_cut_the_colours_of_the_style_are_left_and_nothing_of_its_picture() -> None:
    before, now = to_picture(texture(0)), to_picture(texture(1))
    strokes = to_tensor(0.2 * np.random.default_rng(3).standard_normal((H, W, 3), np.float32))
    key = Key(Track(small(before)), painted(before) + strokes)
    key.track.advance(moved(cut=True))
    picture, trust = key.now(small(now), (W, H))
    assert trust is not None
    assert float(trust.max()) == 0
    assert rms(picture, painted(now)) < 0.03
    left = (picture - painted(now)).flatten()
    assert abs(float(torch.corrcoef(torch.stack([left, strokes.flatten()]))[0, 1])) < 0.05
    # One map for the whole picture: two places of one colour get one colour.
    same = torch.full_like(now, 0.4)
    assert float(key.now(small(same), (W, H))[0].std(dim=(2, 3)).max()) < 0.01


def test_what_the_source_does_not_show_any_more_is_not_carried() -> None:
    """The flow holds, yet the colours there have changed: the residual goes with the trust."""
    image = texture()
    key = Key(track_of(image), to_picture(texture(5)))
    key.track.advance(moved())
    inverted = to_picture(255 - image)
    _, trust = key.now(small(inverted), (W, H))
    assert trust is not None
    apart = (small(inverted) - key.track.frame).square().sum(1, keepdim=True)
    torch.testing.assert_close(trust, torch.exp(-10 * apart), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [(4, 2), (-6, 0)])
def test_a_key_is_carried_along_the_motion(step: tuple[int, int]) -> None:
    """Exact motion, strokes that hang on the source: what was in view is as the key shows it."""
    frames, strokes = sliding(4, step), sliding(4, step, seed=7)
    key = Key(track_of(frames[0]), to_picture(strokes[0]))
    for _ in range(3):
        key.track.advance(moved(step[0] / GUIDE, step[1] / GUIDE))
    now = to_picture(frames[3])
    picture, _ = key.now(small(now), (W, H))
    inner = (slice(24, -24), slice(24, -24))
    assert psnr(to_image(picture)[inner], strokes[3][inner]) > 30
