"""Similar frames are skipped: only where nothing has moved, the same each time, never for long."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from models.params import Params, Style, Temporal
from models.similar import MOST, Similar, likeness, patches
from stream.clocks import Clocks, StyleLane
from tests.fakes import FakeStylizer, turned
from tests.media import CLIPS
from tests.scenes import passing, texture

Image = NDArray[np.uint8]
SIZE = (512, 288)  # width, height
USUAL = 0.98


def noisy(image: Image, sigma: float, seed: int) -> Image:
    noise = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return (image + noise).clip(0, 255).round().astype(np.uint8)


def decoded(path: Path, count: int) -> list[Image]:
    with av.open(str(path)) as container:
        frames = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
        return [np.asarray(cv2.resize(f, SIZE, interpolation=cv2.INTER_AREA)) for f in islice(frames, count)]


def skipped(frames: Iterable[Image], threshold: float = USUAL) -> list[bool]:
    similar = Similar()
    return [similar.skip(frame, threshold) for frame in frames]


def test_a_still_scene_is_diffused_every_eleventh_frame() -> None:
    still = texture(size=SIZE)
    assert MOST == 10
    assert skipped([still] * 33) == ([False] + [True] * 10) * 3
    assert skipped([still] * 33, 1.0) == ([False] + [True] * 10) * 3


def test_off_is_off() -> None:
    assert not any(skipped([texture(size=SIZE)] * 20, 0.0))


@pytest.mark.parametrize("sigma", [3.0, 10.0])
def test_camera_noise_is_no_change(sigma: float) -> None:
    still = texture(size=SIZE)
    assert skipped([noisy(still, sigma, seed) for seed in range(11)]) == [False] + [True] * 10


def test_a_hand_in_a_corner_is_a_change() -> None:
    still = texture(size=SIZE)
    moved = still.copy()
    moved[-24:, -24:] = moved[:24, :24]  # 0.4 % of the picture
    assert skipped([still, moved, still, moved]) == [False] * 4


def test_what_moves_is_diffused_each_frame_and_what_stands_again_is_not() -> None:
    crossing, _ = passing(12, step=16, side=48, size=SIZE)
    found = skipped(crossing[2:] + [crossing[-1]] * 5)
    assert found == [False] * 10 + [True] * 5


def test_a_change_of_colour_alone_counts() -> None:
    grey = np.full((*SIZE[::-1], 3), 120, np.uint8)
    tinted = grey.copy()
    tinted[100:150, 100:150] = (140, 110, 120)  # the same brightness, to a level
    assert skipped([grey, tinted]) == [False, False]


def test_what_changes_slowly_adds_up() -> None:
    """Each frame differs from the one before by less than a skipped frame may."""
    found = skipped([np.full((*SIZE[::-1], 3), 100 + level, np.uint8) for level in range(30)])
    assert found == ([False] + [True] * 5) * 5


def test_the_count_begins_anew_with_each_diffused_frame() -> None:
    """Nine skipped, then a change: ten more may follow, not one."""
    one, two = texture(1, SIZE), texture(2, SIZE)
    assert skipped([one] * 10 + [two] * 12) == [False] + [True] * 9 + [False] + [True] * 10 + [False]


def test_a_changed_setting_is_never_skipped() -> None:
    still, similar = texture(size=SIZE), Similar()
    before, after = Params(), Params(style=Style(prompt="ink"))
    asked = [before, Params(), after, after, before]
    assert [similar.skip(still, USUAL, settings) for settings in asked] == [False, True, False, True, False]


def test_neither_is_a_cut_nor_another_size() -> None:
    still, similar = texture(size=SIZE), Similar()
    assert [similar.skip(still, USUAL) for _ in range(2)] == [False, True]
    similar.reset()  # what the frame lane does at a cut
    assert not similar.skip(still, USUAL)
    assert not similar.skip(np.ascontiguousarray(still[::2, ::2]), USUAL)
    assert skipped([texture(1, SIZE), texture(2, SIZE)], 0.9) == [False, False]


def test_it_is_causal_and_the_same_each_time() -> None:
    crossing, _ = passing(20, step=3, size=SIZE)
    found = skipped(crossing)
    assert skipped(crossing) == found
    assert skipped(crossing[:9] + crossing[::-1])[:9] == found[:9]


def test_memory_is_constant_and_none_of_the_stream_is_kept() -> None:
    similar = Similar()
    image = texture(size=SIZE)
    for seed in range(40):
        similar.skip(noisy(image, 30, seed), 0.999)
    image[:] = 0  # a source may use its memory again
    assert not similar.skip(image, USUAL)
    assert patches(image).shape == (18, 32, 3)
    assert patches(image.transpose(1, 0, 2)).shape == (32, 18, 3)


def test_likeness_is_what_it_says() -> None:
    dark, light = np.full((288, 512, 3), 10, np.uint8), np.full((288, 512, 3), 61, np.uint8)
    assert likeness(patches(dark), patches(dark)) == 1.0
    assert likeness(patches(dark), patches(light)) == pytest.approx(0.8)


def test_deciding_takes_no_time_to_speak_of() -> None:
    """Measured 0.1 ms; the best of some rounds, as other tests run beside."""
    similar, image = Similar(), texture(size=SIZE)
    best = float("inf")
    for _ in range(30):
        started = time.perf_counter()
        for _ in range(10):
            similar.skip(image, USUAL)
        best = min(best, (time.perf_counter() - started) / 10)
    print(f"{best * 1e3:.3f} ms a frame")
    assert best < 0.3e-3


@pytest.mark.skipif(not CLIPS, reason="the shared clips are not here (LIVESTYLE_SHARED)")
@pytest.mark.parametrize(
    ("clip", "least", "most"), [("webcam_talk_man", 0.3, 0.7), ("bike_ride", 0, 0), ("highway_dashcam", 0, 0.02)]
)
def test_real_clips(clip: str, least: float, most: float) -> None:
    found = skipped(decoded(next(path for path in CLIPS if path.stem == clip), 120))
    rate = sum(found) / len(found)
    print(f"{clip}: {rate:.0%} skipped")
    assert least <= rate <= most


def turns(params: Params, frames: list[Image], style: StyleLane, clocks: Clocks, state: Any) -> list[Image | None]:
    """What is shown for frames in turn, each key awaited."""
    shown = []
    for frame in frames:
        shown.append(turned(clocks, state, frame, params).image)
        if clocks._under_way:
            clocks._under_way.result()
    return shown


@pytest.mark.parametrize("mode", ["every-frame", "cadence", "reproject"])
def test_a_session_diffuses_a_still_scene_three_times_in_two_dozen_frames(mode: str) -> None:
    style = StyleLane(FakeStylizer((128, 96)))
    clocks = Clocks(style, live=False, period_ms=40.0)
    params = Params(temporal=Temporal(mode=mode, cadence=int(mode == "cadence"), skip_similar=USUAL))
    state = style.stylizer.open(params)
    still = texture(size=(128, 96))
    shown = turns(params, [still] * 24, style, clocks, state)
    assert len(state.params) == 3
    if mode == "every-frame":
        assert all(picture is not None and np.array_equal(picture, 255 - still) for picture in shown)
    changed = params.model_copy(update={"style": Style(prompt="ink")})
    turns(changed, [still] * 2, style, clocks, state)
    assert state.params[-1] is changed
    style.close()


def test_a_picture_from_before_another_mode_is_not_shown_again() -> None:
    style = StyleLane(FakeStylizer((128, 96)))
    clocks = Clocks(style, live=False, period_ms=40.0)
    every, cadence = (
        Params(temporal=Temporal(mode=mode, cadence=1, skip_similar=USUAL)) for mode in ("every-frame", "cadence")
    )
    state = style.stylizer.open(every)
    one, two = texture(0, (128, 96)), texture(5, (128, 96))
    turns(every, [one] * 3, style, clocks, state)
    turns(cadence, [two] * 4, style, clocks, state)
    (shown,) = turns(every, [two], style, clocks, state)
    assert shown is not None
    assert np.array_equal(shown, 255 - two)
    style.close()
