"""Pose pictures: joints where the network finds them, in OpenPose's colours, whatever the picture's size."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from accel.errors import UserError
from models.control import _poses, control_picture, ready
from models.pose import LIMBS, Picture, Points, Poses, drawn, letterboxed, openpose

SIDE = 160  # of the network's pictures here
STANDING = {0: (0, 5), 1: (1, 4), 2: (-1, 4), 3: (3, 5), 4: (-3, 5), 5: (6, 11), 6: (-6, 11), 7: (9, 19), 8: (-9, 19),
            9: (10, 27), 10: (-10, 27), 11: (4, 29), 12: (-4, 29), 13: (5, 41), 14: (-5, 41), 15: (5, 53),
            16: (-5, 53)}  # fmt: skip
"""COCO's joints of somebody who faces the camera, pixels from above the head: their left is the picture's right."""


def standing(x: float, y: float, scale: float = 1.0, seen: float = 0.9) -> Points:
    """(17, 3)"""
    points = [(x + scale * STANDING[joint][0], y + scale * STANDING[joint][1], seen) for joint in range(17)]
    return np.array(points, np.float32)


def network(folder: Path, scores: tuple[float, ...] = (0.9,), side: int = SIDE) -> Path:
    """An estimator of RTMO's form: people stand, 40 pixels apart, from the reddest pixel on; without one, nobody."""
    bodies = np.array([[0, 0, 9, 9, score] for score in scores], np.float32).reshape(1, -1, 5)
    places = np.array([standing(40 * i, 0)[:, :2] for i in range(len(scores))], np.float32).reshape(1, -1, 17, 2)
    seen = np.full((1, len(scores), 17, 1), 0.9, np.float32)
    constants: dict[str, Any] = {"bodies": bodies, "places": places, "seen": seen, "likely": np.array(scores) > 0.1}
    constants |= {"red": np.array(2), "flat": np.array([-1]), "width": np.array([side]), "much": np.float32(200)}
    nodes = [
        helper.make_node("Gather", ["input", "red"], ["reds"], axis=1),  # of B, G and R
        helper.make_node("Reshape", ["reds", "flat"], ["row"]),
        helper.make_node("ArgMax", ["row"], ["at"], axis=0, keepdims=1),
        helper.make_node("Mod", ["at", "width"], ["x"]),
        helper.make_node("Div", ["at", "width"], ["y"]),
        helper.make_node("Concat", ["x", "y"], ["xy"], axis=0),
        helper.make_node("Cast", ["xy"], ["start"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["places", "start"], ["moved"]),
        helper.make_node("Concat", ["moved", "seen"], ["joints"], axis=-1),
        helper.make_node("ReduceMax", ["row"], ["reddest"], axes=[0], keepdims=0),
        helper.make_node("Greater", ["reddest", "much"], ["somebody"]),
        helper.make_node("And", ["somebody", "likely"], ["kept"]),
        helper.make_node("NonZero", ["kept"], ["listed"]),  # as many as there are, so sizes are not known before
        helper.make_node("Reshape", ["listed", "flat"], ["chosen"]),
        helper.make_node("Gather", ["joints", "chosen"], ["keypoints"], axis=1),
        helper.make_node("Gather", ["bodies", "chosen"], ["dets"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "rtmo",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, side, side])],
        [
            helper.make_tensor_value_info("dets", TensorProto.FLOAT, [1, None, 5]),
            helper.make_tensor_value_info("keypoints", TensorProto.FLOAT, [1, None, 17, 3]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    folder.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    return folder


def marked(x: int, y: int, size: tuple[int, int]) -> Picture:
    """A picture of (height, width) with a red mark around x, y, and a brighter blue one elsewhere."""
    picture = np.full((*size, 3), 60, np.uint8)
    picture[:12, :12, 2] = 255
    half = max(size) // 50
    picture[y - half : y + half + 1, x - half : x + half + 1, 0] = 250
    return picture


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where `livestyle fetch` would put the estimator; nothing is there yet."""
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path))
    _poses.cache_clear()
    yield tmp_path / "rtmo-small"
    _poses.cache_clear()


@pytest.mark.parametrize("size", [(160, 160), (90, 160), (320, 200), (77, 131), (540, 960)])
def test_joints_are_where_the_network_saw_them_in_pixels_of_the_picture(fetched: Path, size: tuple[int, int]) -> None:
    network(fetched)
    x, y = size[1] // 2, size[0] // 3
    (found,) = Poses().people(marked(x, y, size))
    scale = max(size) / SIDE
    expected = standing(x, y, scale)
    assert np.abs(found - expected)[:, :2].max() <= 5 * max(scale, 1)  # a mark's corner, not its middle
    assert found[:, 2] == pytest.approx(0.9)


def test_the_picture_keeps_its_shape_beside_grey_and_is_blue_green_red() -> None:
    shown, scale = letterboxed(np.full((20, 40, 3), (200, 100, 50), np.uint8), (80, 80))
    assert shown.shape == (1, 3, 80, 80)
    assert scale == (2.0, 2.0)
    assert (shown[0, :, :40] == np.array([50, 100, 200])[:, None, None]).all()
    assert (shown[0, :, 40:] == 114).all()


def test_bodies_that_are_unlikely_are_nobody_and_nobody_is_black(fetched: Path) -> None:
    network(fetched, scores=(0.9, 0.8, 0.3))
    picture = marked(20, 10, (160, 160))
    assert len(Poses().people(picture)) == 2
    assert Poses().people(np.zeros((160, 160, 3), np.uint8)).shape == (0, 17, 3)
    assert not Poses()(np.zeros((160, 160, 3), np.uint8)).any()
    network(fetched, scores=(0.3, 0.2))
    assert not Poses()(picture).any()


def test_limbs_have_openposes_colours_and_sides() -> None:
    shown = drawn(standing(100, 40, 4)[None], (300, 200))
    neck = np.array([100, 40 + 44])
    for joint, offset, colour in [("right shoulder", -12, (153, 0, 0)), ("left shoulder", 12, (153, 51, 0))]:
        assert shown[neck[1], neck[0] + offset].tolist() == list(colour), joint
    assert shown[40 + 4 * 8, 100].tolist() == [0, 0, 153]  # neck to nose
    assert shown[40 + 4 * 5, 100].tolist() == [255, 0, 0]  # the nose itself, bright
    assert shown[neck[1], neck[0]].tolist() == [255, 85, 0]
    assert shown[40 + 4 * 35, 82].tolist() == [0, 153, 51]  # the right thigh, on the picture's left
    assert shown[40 + 4 * 35, 118].tolist() == [0, 102, 153]
    assert not shown[:40].any()
    assert not shown[:, :50].any()


def test_what_is_not_seen_is_not_drawn() -> None:
    half = standing(100, 40, 4)
    half[13:, 2] = 0.1  # below the table
    shown = drawn(half[None], (300, 200))
    assert not shown[40 + 4 * 31 :].any()
    assert shown[: 40 + 4 * 28].any()
    half[5, 2] = 0.1  # without a left shoulder there is no neck either, and so no trunk
    assert not drawn(half[None], (300, 200))[40 + 4 * 20 : 40 + 4 * 26, 95:105].any()
    assert not drawn(np.zeros((1, 17, 3), np.float32), (300, 200)).any()


def test_several_people_are_drawn_and_the_rest_stays_as_it_was() -> None:
    one, two = standing(50, 20, 2), standing(150, 40, 3)
    both = drawn(np.stack([one, two]), (240, 200))
    assert (both == np.maximum(drawn(one[None], (240, 200)), drawn(two[None], (240, 200)))).all()


def test_limbs_are_as_thick_as_the_picture_is_large() -> None:
    areas = []
    for scale in (3, 5, 10):
        shown = drawn(standing(50 * scale, 10 * scale, scale)[None], (100 * scale, 100 * scale))
        areas.append((shown.max(2) > 76).mean())
    assert max(areas) < 1.25 * min(areas)
    tiny = drawn(standing(4, 1, 0.1)[None], (8, 8))
    assert tiny.shape == (8, 8, 3)


def test_a_small_step_moves_the_drawing_a_little() -> None:
    """Joints between two pixels are drawn there, or a person who stands still would tremble."""
    before, after = (drawn(standing(100 + step, 40, 4)[None], (300, 200)).astype(int) for step in (0, 0.25))
    assert 0 < np.abs(after - before).max() <= 120


def test_points_that_are_no_numbers_or_far_away_do_no_harm() -> None:
    body = standing(100, 40, 4)
    body[7:9] = [[np.nan, 5, 1], [np.inf, -np.inf, 1]]
    body[9:11] = [[1e30, 5, 1], [-4e4, 4e4, 1]]
    assert drawn(body[None], (300, 200)).any()
    assert (openpose(body)[[3, 6, 7]] == 0).all()


def test_a_neck_is_half_way_between_the_shoulders_and_as_sure_as_the_lesser() -> None:
    body = standing(100, 40, 4)
    body[6, 2] = 0.4
    joints = openpose(body)
    assert joints[1].tolist() == pytest.approx([100, 84, 0.4])
    assert joints[2].tolist() == body[6].tolist()
    assert joints[17].tolist() == body[3].tolist()
    assert {joint for limb in LIMBS for joint in limb} == set(range(18))


def test_the_control_draws_what_was_fetched_from_any_thread(fetched: Path) -> None:
    for ask in (lambda: ready("openpose"), lambda: control_picture("openpose", marked(80, 20, (90, 160)))):
        with pytest.raises(UserError, match=r"rtmo-small is not here yet \(40 MB\)") as caught:
            ask()
        assert caught.value.hint == "`livestyle fetch rtmo-small`"
    network(fetched)
    (fetched / "config.json").write_text("{}")
    pictures = [marked(x, 20, (90, 160)) for x in (40, 80, 120)]
    ready("openpose")
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda picture: control_picture("openpose", picture), pictures))
    for picture, shown in zip(pictures, found, strict=True):
        assert (shown == drawn(Poses().people(picture), (90, 160))).all()
        assert shown.any()


def test_broken_estimators_are_refused_with_a_hint(fetched: Path) -> None:
    file = network(fetched) / "model.onnx"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read") as caught:
        Poses().ready()
    assert caught.value.hint == "fetch it again: `livestyle fetch rtmo-small`"
    model = onnx.load_from_string(whole)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "boxes"
    onnx.save(model, file)
    with pytest.raises(UserError, match="no pose estimator"):
        Poses().ready()
