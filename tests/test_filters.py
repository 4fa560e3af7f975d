"""The picture operations against their definitions, and OpenCV's against torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import filters
from models.filters import (
    area_weights,
    blur,
    box,
    chosen,
    erode,
    grey,
    halved,
    resize,
    sample,
    to_image,
    to_picture,
    to_pixels,
    to_tensor,
    total,
    warp,
)

H, W = 48, 64


class _Place(str):
    """Where torch takes it for the CPU, and `models.filters` does not."""

    type = "elsewhere"


class Elsewhere(Tensor):
    """A CPU tensor that takes the path of all other devices."""

    @property
    def device(self) -> Any:
        return _Place("cpu")


def elsewhere(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Elsewhere)


def noise(channels: int = 3, seed: int = 0) -> Tensor:
    return to_tensor(np.random.default_rng(seed).random((H, W, channels), np.float32))


def constant(dx: float, dy: float) -> Tensor:
    return torch.tensor([float(dx), float(dy)]).view(1, 2, 1, 1).expand(1, 2, H, W).contiguous()


def anywhere(reach: float, grid: int = 0, seed: int = 1) -> Tensor:
    """Another place for every pixel, up to `reach` away; with a `grid`, multiples of 1/grid."""
    flow = np.random.default_rng(seed).uniform(-reach, reach, (H, W, 2))
    return to_tensor((np.round(flow * grid) / grid if grid else flow).astype(np.float32))


def kernel(t: NDArray[Any]) -> NDArray[Any]:
    """Catmull-Rom: the cubic convolution kernel of Keys 1981 with A = -1/2."""
    t = np.abs(t)
    near = 1.5 * t**3 - 2.5 * t**2 + 1
    far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return np.where(t < 1, near, np.where(t < 2, far, 0))


def catmull_rom(picture: Tensor, flow: Tensor) -> NDArray[Any]:
    """The warp by its definition, in double precision."""
    pixels, motion = to_pixels(picture).astype(np.float64), to_pixels(flow).astype(np.float64)
    y, x = np.mgrid[:H, :W]
    x, y = x + motion[..., 0], y + motion[..., 1]
    warped = np.zeros_like(pixels)
    for down in range(-1, 3):
        for across in range(-1, 3):
            column, row = np.floor(x).astype(int) + across, np.floor(y).astype(int) + down
            weight = kernel(x - column) * kernel(y - row)
            warped += weight[..., None] * pixels[row.clip(0, H - 1), column.clip(0, W - 1)]
    return warped


def test_bytes_come_back_as_they_were() -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3 * 4).reshape(32, 32, 3)
    odd = np.random.default_rng(0).integers(0, 256, (13, 7, 3), np.uint8)
    for image in (every, odd):
        picture = to_picture(image)
        assert picture.shape == (1, 3, *image.shape[:2])
        assert picture.dtype == torch.float32
        assert (to_image(picture) == image).all()
        np.testing.assert_allclose(to_pixels(picture), image / 255, atol=1e-7)


def test_values_out_of_range_clamp_and_the_others_are_rounded() -> None:
    levels = np.array([-3.0, -0.1, 0.4, 0.6, 127.4, 127.6, 254.6, 256.0, 1e6], np.float32)
    picture = to_tensor(np.repeat(levels[:, None, None] / 255, 3, 2))
    assert to_image(picture)[:, 0, 0].tolist() == [0, 0, 0, 1, 127, 128, 255, 255, 255]


def test_pixels_and_tensors_share_their_memory() -> None:
    picture = to_picture(np.zeros((H, W, 3), np.uint8))
    to_pixels(picture)[3, 5] = 1
    assert picture[0, :, 3, 5].tolist() == [1, 1, 1]


@pytest.mark.parametrize("place", [lambda tensor: tensor, elsewhere])
class TestWarp:
    def test_along_one_axis_is_catmull_rom(self, place: Callable[[Tensor], Tensor]) -> None:
        picture = noise()
        for axis in (0, 1):
            flow = anywhere(6, grid=32)
            flow[:, axis] = 0
            expected = catmull_rom(picture, flow)
            np.testing.assert_allclose(to_pixels(warp(place(picture), place(flow))), expected, atol=1e-5)

    def test_along_both_axes_is_catmull_rom_but_for_the_finest_detail(self, place: Callable[[Tensor], Tensor]) -> None:
        """The kernel is linear in A along each axis, so their product is not.

        What is left is an eighth of a product of two second differences: at most 1/64 of the range, and next to nothing
        where neighbours are alike.
        """
        flow, white = anywhere(6, grid=32), noise()
        for picture, apart in ((white, 1 / 64), (blur(white, 1.0), 1 / 1024)):
            expected = catmull_rom(picture, flow)
            np.testing.assert_allclose(to_pixels(warp(place(picture), place(flow))), expected, atol=apart)

    def test_whole_pixels_move_as_they_are(self, place: Callable[[Tensor], Tensor]) -> None:
        picture = noise()
        moved = warp(place(picture), place(constant(3, -2)))
        torch.testing.assert_close(Tensor(moved[..., 2:, :-3]), picture[..., :-2, 3:], rtol=0, atol=5e-6)

    @pytest.mark.parametrize("look_up", [sample, warp])
    def test_edges_are_repeated(
        self, look_up: Callable[[Tensor, Tensor], Tensor], place: Callable[[Tensor], Tensor]
    ) -> None:
        picture = noise()
        moved = look_up(place(picture), place(constant(-1000, 1000)))
        corner = picture[..., -1:, :1].expand_as(picture)
        torch.testing.assert_close(Tensor(moved), corner, rtol=0, atol=1e-5)


def test_no_motion_is_the_identity_to_the_bit() -> None:
    picture = noise()
    assert torch.equal(sample(picture, constant(0, 0)), picture)
    assert torch.equal(warp(picture, constant(0, 0)), picture)


def test_sample_is_bilinear() -> None:
    ramp = to_tensor(np.mgrid[:H, :W].transpose(1, 2, 0).astype(np.float32))
    found = sample(ramp, constant(0.25, -0.5))
    torch.testing.assert_close(found[..., 1:, :-1], (ramp + torch.tensor([-0.5, 0.25]).view(1, 2, 1, 1))[..., 1:, :-1])


@pytest.mark.parametrize(
    "operation",
    [
        lambda p, f: resize(p, (W // 2, H // 2)),
        lambda p, f: resize(p, (W // 8, H // 8)),
        lambda p, f: resize(p, (W * 2, H * 2)),
        lambda p, f: resize(p, (W * 8, H * 8)),
        lambda p, f: box(p, 1),
        lambda p, f: box(p, 5),
        lambda p, f: blur(p, 2.0),
        lambda p, f: erode(p[:, :1], 1),
        lambda p, f: erode(p[:, :1], 3),
        lambda p, f: total(p),
        lambda p, f: grey(p),
        sample,
        warp,
    ],
)
def test_a_cpu_and_any_other_device_agree(operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    picture, flow = noise(), anywhere(20)
    here, there = operation(picture, flow), operation(elsewhere(picture), elsewhere(flow))
    assert isinstance(there, Elsewhere)
    assert here.shape == there.shape
    torch.testing.assert_close(here, Tensor(there), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 24), (40, 30), (63, 47), (17, 5), (64, 48), (100, 70), (128, 96)])
def test_sizes_elsewhere_are_opencvs(size: tuple[int, int]) -> None:
    torch.testing.assert_close(Tensor(resize(elsewhere(noise()), size)), resize(noise(), size), rtol=0, atol=4e-5)


def test_area_weights_share_out_every_pixel() -> None:
    weights = area_weights(48, 30, torch.device("cpu"))
    torch.testing.assert_close(weights.sum(1), torch.ones(30))
    torch.testing.assert_close(weights.sum(0), torch.full((48,), 30 / 48))


@pytest.mark.parametrize("size", [(64, 48), (63, 47)])
def test_pictures_go_to_another_device_and_back_within_rounding(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    here, small = to_picture(image), halved(image)
    monkeypatch.setattr(filters, "HOSTS", ())
    torch.testing.assert_close(to_picture(image), here, rtol=0, atol=1e-6)
    assert (to_image(to_picture(image)) == image).all()
    assert float((halved(image) - small).abs().max()) <= 0.51 / 255  # OpenCV halves bytes


def test_of_two_pictures_one_is_chosen_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = noise(), noise(seed=1)
    for hosts in (("cpu",), ()):
        monkeypatch.setattr(filters, "HOSTS", hosts)
        assert torch.equal(chosen(torch.tensor(True), one, other), one)
        assert torch.equal(chosen(torch.tensor(False), one, other), other)


def test_means_sums_and_least_values_are_what_they_say() -> None:
    picture = noise()
    middle = (0, slice(None), 20, 30)
    around = picture[0, :, 18:23, 28:33]
    torch.testing.assert_close(box(picture, 2)[middle], around.mean((1, 2)))
    assert erode(picture[:, :1], 2)[0, 0, 20, 30] == around[0].min()
    torch.testing.assert_close(total(picture), picture.sum(1, keepdim=True))
    torch.testing.assert_close(grey(picture)[0, 0, 20, 30], picture[middle] @ torch.tensor([0.299, 0.587, 0.114]))
    assert resize(picture, (W, H)) is picture
    torch.testing.assert_close(resize(picture, (W // 8, H // 8))[0, 0, 0, 0], picture[0, 0, :8, :8].mean())
