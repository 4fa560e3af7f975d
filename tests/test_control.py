"""Control pictures: lines where the picture has them, and hardly changed by a camera's noise."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from accel.errors import UserError
from models.control import CONTROLS, Picture, canny, control_picture, tile

SIZE = (512, 288)  # width, height
DRAWN = ["canny", "lineart", "softedge"]


def scene() -> Picture:
    """A dark disc, a bright bar and a slope of brightness without edges, slightly blurred as cameras do."""
    slope = np.linspace(110, 190, SIZE[0])[None].repeat(SIZE[1], 0)
    picture = np.repeat(slope[..., None], 3, 2).astype(np.uint8)
    cv2.circle(picture, (140, 140), 80, (20, 30, 60), -1)
    cv2.rectangle(picture, (300, 60), (420, 240), (250, 230, 200), -1)
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), 0.8), np.uint8)


def noisy(picture: Picture, sigma: float) -> Picture:
    noise = np.random.default_rng(3).normal(0, sigma, picture.shape)
    return np.clip(picture + noise, 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("name", DRAWN)
def test_lines_are_light_where_the_picture_has_edges_and_nowhere_else(name: str) -> None:
    drawn = control_picture(name, scene())
    assert drawn.shape == (SIZE[1], SIZE[0], 3)
    assert drawn.dtype == np.uint8
    assert (drawn == drawn[..., :1]).all()
    edge = drawn[140, 52:68].max(), drawn[150, 292:308].max()  # the disc's and the bar's left edges
    assert min(edge) >= 128
    assert drawn[130:150, 130:150].max() <= 8  # inside the disc
    assert drawn[:40, 200:].max() <= 40  # the slope


@pytest.mark.parametrize(("name", "most"), [("canny", 2.0), ("lineart", 0.5), ("softedge", 2.0)])
def test_a_cameras_noise_changes_little(name: str, most: float) -> None:
    """Two noisy takes of one scene, sigma 2 grey levels: mean change in grey levels of 255."""
    picture = scene()
    one, other = (control_picture(name, noisy(p, 2)).astype(int) for p in (picture, picture[:, ::-1]))
    assert np.abs(one - other[:, ::-1]).mean() <= most


def test_canny_is_opencvs_with_the_usual_thresholds() -> None:
    picture = noisy(scene(), 12)
    assert (canny(picture)[..., 0] == cv2.Canny(picture, 100, 200)).all()
    assert canny(picture, 20, 40).sum() > canny(picture).sum()


def test_canny_can_be_steadied_by_a_blur() -> None:
    picture = scene()
    switched = [
        (canny(noisy(picture, 8), blur=blur) != canny(noisy(picture[::-1], 8)[::-1], blur=blur)).mean()
        for blur in (0.0, 1.0)
    ]
    assert switched[1] < switched[0]


def test_tile_is_the_picture_itself_unless_blurred() -> None:
    picture = noisy(scene(), 20)
    assert tile(picture) is picture
    assert tile(picture, blur=2).std() < picture.std()


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 2)])
def test_any_size_and_a_flat_picture_will_do(name: str, size: tuple[int, int]) -> None:
    assert not control_picture(name, np.full((*size, 3), 200, np.uint8)).any()


@pytest.mark.parametrize("name", ["depth", "openpose"])
def test_controls_that_need_a_network_say_what_to_fetch(name: str) -> None:
    with pytest.raises(UserError, match="not built in") as caught:
        control_picture(name, scene())
    assert "which needs none" in caught.value.hint


def test_wrong_names_and_settings_are_refused() -> None:
    for name, settings, message in [
        ("sketch", {}, "no such control"),
        ("canny", {"low": 200, "high": 100}, "thresholds"),
        ("lineart", {"low": 1}, "no such setting"),
    ]:
        with pytest.raises(UserError, match=message):
            control_picture(name, scene(), **settings)
    assert all(callable(control) for control in CONTROLS.values())
    with pytest.raises(ValueError, match="uint8"):
        control_picture("canny", scene()[..., 0])
