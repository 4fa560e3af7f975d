"""Colour conversion and resizing on tensors, against the standards' equations, swscale and OpenCV."""

from __future__ import annotations

from typing import get_args

import av
import cv2
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

from models.pixels import Coding, Layout, area_weights, from_rgb, resized, to_rgb

HEIGHT, WIDTH = 48, 64
FORMATS = {"i420": "yuv420p", "nv12": "nv12"}
SPACES = {"bt601": Colorspace.ITU601, "bt709": Colorspace.ITU709}
MATRICES = ("bt601", "bt709")
CODINGS = [Coding(layout, m, full) for layout in get_args(Layout) for m in MATRICES for full in (False, True)]


def smooth() -> NDArray[np.uint8]:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    waves = [np.sin(x / 17 + y / 29), np.cos(y / 13), np.sin((x - y) / 23)]
    return np.stack([128 + 120 * wave for wave in waves], 2).round().astype(np.uint8)


def tensor(image: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(image)[None]


def by_swscale(image: NDArray[np.uint8], coding: Coding) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(image, "rgb24").reformat(
        format=FORMATS[coding.layout],
        dst_colorspace=SPACES[coding.matrix],
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.JPEG if coding.full else ColorRange.MPEG,
    )


def apart(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.abs(a.astype(np.int64) - b)


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_planes_are_swscales_within_two_levels(coding: Coding) -> None:
    found = from_rgb(tensor(smooth()), coding)
    assert (found.shape, found.dtype) == ((HEIGHT * 3 // 2, WIDTH), torch.uint8)
    wanted = by_swscale(smooth(), coding).to_ndarray()
    assert apart(found.numpy()[:HEIGHT], wanted[:HEIGHT]).max() <= 1
    assert apart(found.numpy(), wanted).max() <= 2
    assert apart(found.numpy(), wanted).mean() < 0.5


@pytest.mark.parametrize("coding", CODINGS[:4], ids=str)  # from NV12 swscale's chroma is interpolated
def test_pictures_are_swscales_but_for_its_rounding_down(coding: Coding) -> None:
    frame = by_swscale(smooth(), coding)
    found = to_rgb(torch.from_numpy(frame.to_ndarray()), coding).numpy()[0]
    wanted = frame.reformat(
        format="rgb24",
        src_colorspace=SPACES[coding.matrix],
        dst_colorspace=SPACES[coding.matrix],
        src_color_range=ColorRange.JPEG if coding.full else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
    ).to_ndarray()
    assert apart(found, wanted).max() <= 3
    assert 0 <= (found.astype(float) - wanted).mean() < 1.3  # never darker; see `to_rgb`


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_there_and_back_loses_no_more_than_rounding(coding: Coding) -> None:
    image = cv2.resize(smooth(), (WIDTH // 2, HEIGHT // 2)).repeat(2, 0).repeat(2, 1)  # chroma that 4:2:0 can hold
    again = to_rgb(from_rgb(tensor(image), coding), coding).numpy()[0]
    assert apart(again, image).max() <= (2 if coding.full else 3)
    assert apart(again, image).mean() < 0.8


@pytest.mark.parametrize(("full", "black", "white"), [(False, 16, 235), (True, 0, 255)])
def test_black_and_white_are_where_the_range_has_them(full: bool, black: int, white: int) -> None:
    for level, wanted in ((0, black), (255, white)):
        planes = from_rgb(torch.full((1, 4, 4, 3), level, dtype=torch.uint8), Coding(full=full))
        assert (planes[:4] == wanted).all()
        assert (planes[4:] == 128).all()
        assert (to_rgb(planes, Coding(full=full)) == level).all()


def test_nv12_is_i420_with_its_chroma_side_by_side() -> None:
    i420, nv12 = (from_rgb(tensor(smooth()), Coding(layout)) for layout in get_args(Layout))
    u, v = i420[HEIGHT:].reshape(2, HEIGHT // 2, WIDTH // 2)
    assert torch.equal(nv12[HEIGHT:].view(HEIGHT // 2, WIDTH // 2, 2), torch.stack([u, v], 2))


@pytest.mark.parametrize("size", [(32, 24), (40, 30), (63, 47), (17, 5), (64, 48), (100, 70), (128, 96)])
def test_sizes_are_opencvs_within_a_level(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    smaller = size[0] < WIDTH
    wanted = cv2.resize(image, size, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    found = resized(tensor(image).permute(0, 3, 1, 2).float(), size)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - wanted).max() <= 1
    exact = cv2.resize(image.astype(np.float32), size, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    assert np.abs(found - exact).max() < 1e-2


def test_area_weights_share_out_every_pixel() -> None:
    weights = area_weights(48, 30, torch.device("cpu"))
    assert torch.allclose(weights.sum(1), torch.ones(30))
    assert torch.allclose(weights.sum(0), torch.full((48,), 30 / 48))
