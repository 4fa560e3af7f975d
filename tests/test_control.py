"""Control pictures: lines where the picture has them, and hardly changed by a camera's noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from accel.engine import Backend, Engine
from accel.errors import UserError
from accel.openvino_backend import OpenVINOBackend
from accel.torch_backend import TorchBackend
from models.control import CONTROLS, Picture, canny, control_picture, tile
from models.depth import Shades, depth_graph, inner_size

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


def estimator(folder: Path, **settings: Any) -> Path:
    """A small random depth estimator of Depth Anything's class."""
    torch.manual_seed(3)
    backbone = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=70, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
        head_hidden_size=8, **settings,
    )  # fmt: skip
    network = DepthAnythingForDepthEstimation(config)
    for weight in network.head.parameters():
        torch.nn.init.uniform_(weight, 0, 0.5)  # or the last ReLU would make everything 0
    network.save_pretrained(folder)
    return folder


def drawn(backend: Backend, folder: Path, picture: Picture) -> Picture:
    graph = depth_graph(folder, (picture.shape[1], picture.shape[0]))
    spec = replace(graph.spec, precision="fp32")  # random distances are so alike that bf16 hardly tells them apart
    return Shades(backend.load(graph.build, spec))(picture)


def test_depth_is_transformers_own_over_the_whole_range(tmp_path: Path) -> None:
    folder = estimator(tmp_path / "depth")
    picture = noisy(scene(), 4)[:80, :112]
    found = drawn(TorchBackend(), folder, picture)
    rows, columns = inner_size((80, 112), 14)
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    x = torch.nn.functional.interpolate(x, (rows, columns), mode="bilinear")
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        near = DepthAnythingForDepthEstimation.from_pretrained(folder)(x).predicted_depth
    near = torch.nn.functional.interpolate(near[None], (80, 112), mode="bilinear")[0, 0].numpy()
    expected = 255 * (near - near.min()) / (near.max() - near.min())
    assert np.abs(found[..., 0] - expected).max() <= 0.51
    assert (found.min(), found.max()) == (0, 255)
    assert (found == found[..., :1]).all()


def test_metres_are_turned_round(tmp_path: Path) -> None:
    near = drawn(TorchBackend(), estimator(tmp_path / "depth"), scene()[:80, :112])
    far = drawn(
        TorchBackend(), estimator(tmp_path / "m", depth_estimation_type="metric", max_depth=20), scene()[:80, :112]
    )
    assert np.corrcoef(near.ravel(), far.ravel())[0, 1] < -0.5


def test_openvino_draws_the_same_depth(tmp_path: Path) -> None:
    folder, picture = estimator(tmp_path / "depth"), noisy(scene(), 4)[:56, :84]
    one, other = (drawn(backend, folder, picture) for backend in (TorchBackend(), OpenVINOBackend(threads=1)))
    assert np.abs(one.astype(int) - other).max() <= 1


def test_broken_estimators_are_refused_with_a_hint(tmp_path: Path) -> None:
    folder = estimator(tmp_path / "depth")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="half-downloaded") as caught:
        depth_graph(folder, SIZE)
    assert "livestyle fetch" in caught.value.hint
    weights.write_bytes(whole)
    tensors = load_file(weights)
    del tensors["head.conv1.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"has no head\.conv1\.weight"):
        depth_graph(folder, SIZE).build()
    (folder / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match="cannot be read"):
        depth_graph(folder, SIZE).build()
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        depth_graph(folder, SIZE)


def test_a_streams_depth_pictures_share_a_range_that_follows_slowly() -> None:
    class Reading:
        """An engine that takes one colour for how near all is."""

        def __call__(self, picture: Tensor) -> tuple[Tensor, ...]:
            return (picture[..., 0].float(),)

    def shades() -> Shades:
        return Shades(cast(Engine, Reading()))

    slope = np.arange(0, 128, dtype=np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2)
    hand = slope.copy()
    hand[:, 100:110] = 250  # near the camera
    stream, others = shades(), np.r_[0:100, 110:128]
    first = stream(slope).astype(int)
    assert (first.min(), first.max()) == (0, 255)
    second = stream(hand)
    assert (second[:, 100:110] == 255).all()
    change = np.abs(second - first)[:, others].max()
    assert 0 < change <= 255 * 0.1
    assert np.abs(shades()(hand) - first)[:, others].max() > 4 * change  # as it would be by itself
    for _ in range(60):
        last = stream(hand)
    assert np.abs(last.astype(int) - shades()(hand)).max() <= 1
    stream.reset()
    assert (stream(slope) == first).all()
    assert not shades()(np.full((2, 3, 3), 7, np.uint8)).any()


def test_depth_sees_whole_patches_of_about_its_training_size() -> None:
    assert inner_size((512, 512), 14) == (518, 518)
    assert inner_size((288, 512), 14) == (294, 518)
    assert inner_size((1024, 1024), 14) == (518, 518)


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
