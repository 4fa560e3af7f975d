"""The frame lane: what is shown between keys, and that nothing upsets it."""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
import pytest

from models.flow import Dis
from models.lane import FrameLane, frame_lane
from models.params import Temporal
from models.reproject import Guide
from models.temporal import refine
from tests.scenes import SIZE, Image, passing, psnr, sliding, texture

W, H = SIZE
RED, BLUE = (np.full((H, W, 3), colour, np.uint8) for colour in ((200, 40, 20), (20, 60, 220)))
MIX = np.array([[0.5, 0.3, -0.1], [-0.2, 0.6, 0.2], [0.1, -0.4, 0.7]])


def lane(*, refined: bool = False) -> FrameLane:
    return FrameLane(Guide(Dis(), Dis(refine=0)), refine if refined else None)


def painted(source: Image) -> Image:
    """A style that only changes colours: an affine map of them."""
    return (source @ MIX.T + (51, 76, 102)).clip(0, 255).astype(np.uint8)


def shown(
    frames: Iterable[Image], keys: Iterable[Image], every: int = 1, refined: bool = False, on: FrameLane | None = None
) -> list[Image]:
    """A clip through a lane, of whose keys every Nth is seen."""
    on, output = on or lane(refined=refined), []
    for number, (frame, key) in enumerate(zip(frames, keys, strict=True)):
        on.advance(frame)
        if number % every == 0:
            on.answer(on.ask(), key, every)
        output.append(on.show())
    return output


def rms(a: Image, b: Image) -> float:
    """In levels."""
    return float(np.sqrt(np.square(a.astype(float) - b).mean()))


def zooming(count: int, seed: int) -> list[Image]:
    """Into the middle of a texture, 2 % a frame."""
    wide = texture(seed, (2 * W, 2 * H), blur=3.0)
    pictures = []
    for i in range(count):
        place = cv2.getRotationMatrix2D((W, H), 0, 1.02**i)
        pictures.append(cv2.warpAffine(wide, place, (2 * W, 2 * H))[H // 2 : H // 2 + H, W // 2 : W // 2 + W].copy())
    return pictures


def test_nothing_is_shown_before_the_first_key() -> None:
    one = lane()
    one.advance(texture())
    assert not one.ready
    with pytest.raises(AssertionError, match="before the first answer"):
        one.show()
    one.answer(one.ask(), RED)
    assert one.ready
    assert (one.show() == RED).all()


def test_a_key_takes_over_in_thirds_at_cadence_three() -> None:
    keys = [RED, RED, RED, BLUE, BLUE, BLUE, RED]
    output = shown([texture()] * 7, keys, 3)
    for image in output[:3]:
        assert (image == RED).all()  # nothing to fade from
    for image, weight in zip(output[3:6], (1 / 3, 2 / 3, 1), strict=True):
        assert np.abs(image - (RED + weight * (BLUE.astype(float) - RED))).max() <= 1
    assert np.abs(output[6] - (BLUE + (RED.astype(float) - BLUE) / 3)).max() <= 1


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_still_scene_shows_its_key_to_the_byte(every: int, refined: bool) -> None:
    key = texture(5)
    assert all((image == key).all() for image in shown([texture()] * 11, [key] * 11, every, refined=refined))


def test_where_every_frame_is_diffused_and_not_refined_the_bytes_pass_as_they_are() -> None:
    frames = [*sliding(4), *sliding(4, seed=8)]
    keys = [texture(seed) for seed in range(8)]
    assert all((image == key).all() for image, key in zip(shown(frames, keys), keys, strict=True))


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("step", [(2, 0), (-4, 2)])
def test_a_key_is_carried_along_a_known_shift(step: tuple[int, int], refined: bool) -> None:
    """Strokes that hang on the source; 30 dB is what one pixel of slip would not leave."""
    frames, strokes = sliding(5, step), sliding(5, step, seed=7)
    output = shown(frames, strokes, 5, refined=refined)
    inner = (slice(24, -24), slice(24, -24))
    assert psnr(output[4][inner], strokes[4][inner]) >= 30
    assert psnr(strokes[3][inner], strokes[4][inner]) < 30


def test_colours_of_the_style_are_right_where_nothing_can_be_followed() -> None:
    """A square comes in from the left: nothing of it is in the key."""
    frames, places = passing(8, step=6)
    output = shown(frames, [painted(frame) for frame in frames], 8)
    new = places[7] & ~places[0]
    apart = np.abs(output[7].astype(float) - painted(frames[7]))[new].mean()
    held = np.abs(painted(frames[0]).astype(float) - painted(frames[7]))[new].mean()
    assert apart < 0.5 * held


@pytest.mark.parametrize("refined", [False, True])
def test_after_a_cut_nothing_of_the_scene_before_is_seen(refined: bool) -> None:
    frames = [texture(0)] * 3 + [texture(1)] * 3
    keys = [painted(texture(0))] * 3 + [BLUE] * 3
    output = shown(frames, keys, 6, refined=refined)
    for image in output[3:]:
        assert rms(image, painted(texture(1))) < 8  # the style's colours; measured: 4
        left = image.astype(float) - painted(texture(1))
        before = painted(texture(0)).astype(float)
        assert abs(np.corrcoef(left.ravel(), (before - before.mean()).ravel())[0, 1]) < 0.2
    assert (output[2] == painted(texture(0))).all()


def test_a_key_of_the_scene_before_a_cut_gives_its_colours_and_not_its_picture() -> None:
    """It was asked for before, and is there after."""
    one = lane()
    one.advance(texture(0))
    one.answer(one.ask(), painted(texture(0)))
    one.show()
    late = one.ask()
    one.advance(texture(1))
    one.show()
    one.answer(late, painted(texture(0)), 4)
    for _ in range(4):
        assert rms(one.show(), painted(texture(1))) < 8
        one.advance(texture(1))


def test_keys_may_come_in_any_order() -> None:
    one, tracks = lane(), []
    for _ in range(3):
        one.advance(texture())
        tracks.append(one.ask())
    for track, key in zip((tracks[1], tracks[2], tracks[0]), (RED, BLUE, texture(5)), strict=True):
        one.answer(track, key)
        assert (one.show() == key).all()


@pytest.mark.parametrize("late", [1, 3, 6])
def test_a_late_key_is_caught_up_with_now(late: int) -> None:
    frames, strokes = sliding(late + 1, (2, 0)), sliding(late + 1, (2, 0), seed=7)
    one = lane()
    one.advance(frames[0])
    one.answer(one.ask(), RED)
    track = one.ask()
    for frame in frames[1:]:
        one.advance(frame)
        one.show()
    one.answer(track, strokes[0])
    inner = (slice(24, -24), slice(24, -24))
    assert psnr(one.show()[inner], strokes[-1][inner]) >= 30


def test_where_a_key_shows_nothing_of_its_own_the_last_output_stays_for_a_while() -> None:
    one = lane()
    one.advance(texture())
    one.answer(one.ask(), RED)
    one.show()
    late = one.ask()
    one.advance(texture())
    one.show()
    assert late.trust is not None
    late.trust = late.trust.clone()
    late.trust[..., SIZE[0] // 4 :] = 0  # its right half was lost on the way
    one.answer(late, BLUE)
    left, right = (slice(None), slice(0, W // 2 - 8)), (slice(None), slice(W // 2 + 8, W))
    image = one.show()
    assert (image[left] == BLUE[left]).all()
    assert (image[right] == RED[right]).all()
    for _ in range(100):
        one.advance(texture())
        image = one.show()
    assert (image == BLUE).all()


SCENES = {
    "still": ([texture()] * 12, [texture(7)] * 12),
    "slow": (sliding(12, (1, 0)), sliding(12, (1, 0), seed=7)),
    "fast": (sliding(12, (5, -3)), sliding(12, (5, -3), seed=7)),
    "zoom": (zooming(12, 0), zooming(12, 7)),
    "colours": (passing(12)[0], [painted(image) for image in passing(12)[0]]),
    "strokes": (passing(12)[0], passing(12)[0]),
    "cuts": ([texture(i // 3) for i in range(12)], [painted(texture(i // 3)) for i in range(12)]),
}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("every", [2, 4])
@pytest.mark.parametrize("refined", [False, True])
def test_it_is_never_worse_than_holding_the_last_key(every: int, refined: bool, scene: str) -> None:
    """Strokes here have nothing to do with the source but that they move with it: the most that carrying can be asked.

    Of the picture without its rim, where the source shows what no key has strokes for.
    """
    frames, ideal = SCENES[scene]
    rim = (slice(16, -16), slice(16, -16))
    output = shown(frames, ideal, every, refined)
    apart = np.mean([rms(image[rim], other[rim]) for image, other in zip(output, ideal, strict=True)])
    held = np.mean([rms(ideal[i - i % every][rim], other[rim]) for i, other in enumerate(ideal)])
    assert apart <= held


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("level", [0, 255])
def test_plain_frames_are_no_trouble(level: int, refined: bool) -> None:
    plain, key = np.full((H, W, 3), level, np.uint8), texture(5)
    one = lane(refined=refined)
    assert all((image == key).all() for image in shown([plain] * 6, [key] * 6, 3, on=one))
    after = shown([texture()] * 3, [painted(texture())] * 3, on=one)
    assert (after[0] == painted(texture())).all()  # in and out of black is a cut


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_a_cut_every_frame_shows_each_in_the_styles_colours(every: int, refined: bool) -> None:
    frames = [texture(seed) for seed in range(9)]
    output = shown(frames, [painted(frame) for frame in frames], every, refined=refined)
    for number, (image, frame) in enumerate(zip(output, frames, strict=True)):
        assert rms(image, painted(frame)) < 10, number
    if every == 1:
        assert all((image == painted(frame)).all() for image, frame in zip(output, frames, strict=True))


@pytest.mark.parametrize("refined", [False, True])
def test_another_size_in_mid_stream_is_a_cut(refined: bool) -> None:
    one = lane(refined=refined)
    shown(sliding(4), [painted(frame) for frame in sliding(4)], 4, on=one)
    asked = one.ask()
    smaller = sliding(4, size=(96, 64))
    for number, frame in enumerate(smaller):
        one.advance(frame)
        if number == 2:
            one.answer(asked, painted(sliding(4)[-1]), 4)  # of the size before
        image = one.show()
        assert image.shape == frame.shape
        assert rms(image, painted(frame)) < 12
    one.answer(one.ask(), painted(smaller[-1]))
    assert rms(one.show(), painted(smaller[-1])) < (6 if refined else 1)


@pytest.mark.parametrize("size", [(64, 48), (127, 95), (40, 24)])
def test_other_sizes_run(size: tuple[int, int]) -> None:
    frames = sliding(5, size=size)
    assert all(image.shape == (size[1], size[0], 3) for image in shown(frames, frames, 2, refined=True))


def test_what_is_shown_belongs_to_the_caller() -> None:
    one = lane(refined=True)
    frames = sliding(3)
    first = shown(frames[:1], frames[:1], on=one)[0]
    kept = first.copy()
    first[:] = 0
    one.advance(frames[1])
    assert rms(one.show(), frames[1]) < 12
    assert (kept == frames[0]).all()


def test_each_stage_of_a_frame_is_timed() -> None:
    one = lane(refined=True)
    shown(sliding(3), sliding(3), on=one)
    assert set(one.stages.ms) == {"flow", "key", "warp", "refine"}
    assert all(ms >= 0 for ms in one.stages.ms.values())


def test_the_settings_choose_the_parts() -> None:
    assert frame_lane(Temporal(refiner="off"), SIZE).refiner is None
    assert frame_lane(Temporal(refiner="analytic"), SIZE).refiner is refine
    assert isinstance(frame_lane(Temporal(), SIZE).guide.estimator, Dis)


def test_a_cut_is_told() -> None:
    one, told = lane(), []
    for frame in (*sliding(2), *sliding(2, seed=8), *sliding(2)):
        one.advance(frame)
        told.append(one.cut)
    assert told == [False, False, True, False, True, False]
