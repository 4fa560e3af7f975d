"""Style pictures take hold over `style.blend_frames`, as prompts do; depth is drawn by the engine that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray

from accel.errors import UserError
from models.load import load
from models.params import Params
from models.structure import structure_of
from models.stylizer import LatentStylizer
from stream.config import patched
from tests.addons import random_adapter, random_controlnet, random_picture
from tests.folders import random_folder
from tests.test_control import estimator

SIZE = (64, 48)  # width, height
Image = NDArray[np.uint8]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an IP-Adapter, a ControlNet and two style pictures."""
    home = tmp_path_factory.mktemp("home")
    model = random_folder(home / "model", "sd")
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    random_adapter(model / "ip_adapter", unet, "base")
    random_controlnet(home / "net", model, seed=3)
    for seed, name in enumerate(("ink", "oil")):
        random_picture(home / f"{name}.png", seed)
    return home


def settings(home: Path, picture: str = "ink", **changes: Any) -> Params:
    first = {"strength": 0.6, "picture": str(home / f"{picture}.png") if picture else ""}
    return patched(Params(), {f"style.{key}": value for key, value in {**first, **changes}.items()})


@pytest.fixture(scope="module")
def model(home: Path) -> LatentStylizer:
    return load(str(home / "model"), SIZE, engine="torch", structure=structure_of(settings(home)))


def frame() -> Image:
    return np.random.default_rng(9).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)


def play(model: LatentStylizer, *script: Params) -> list[Image]:
    """The pictures of one stream, the same frame again and again."""
    state, found = model.open(script[0]), []
    for params in script:
        model.prepare(params)
        image = model.step(state, frame(), params).image()
        assert image is not None
        found.append(image)
    return found


def far(one: Image, other: Image) -> float:
    return float(np.abs(one.astype(int) - other).mean())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"picture": "oil"}),
        ({}, {"picture_scale": 1.0}),
        ({}, {"picture": ""}),
        ({"picture": ""}, {}),
        ({}, {"picture": "oil", "picture_scale": 1.0, "prompt": "ink"}),
    ],
    ids=["picture", "scale", "off", "on", "with the prompt"],
)
def test_a_change_takes_hold_frame_by_frame_and_is_whole_at_both_ends(
    model: LatentStylizer, home: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    one, other = (settings(home, **change, blend_frames=4) for change in (before, after))
    (start,), (end,) = play(model, one), play(model, other)
    found = play(model, one, one, *[other] * 6)
    assert np.array_equal(found[0], start)
    assert np.array_equal(found[1], start)
    for shown in found[5:]:
        assert np.array_equal(shown, end)
    way = [far(shown, end) for shown in found[1:6]]
    assert way == sorted(way, reverse=True)
    assert way[0] > way[1] > way[2] > way[3] > way[4] == 0
    at_once = play(model, *(settings(home, **change) for change in (before, after)))
    assert np.array_equal(at_once[1], end)


def test_streams_of_one_model_have_their_own_way(model: LatentStylizer, home: Path) -> None:
    one, other = (settings(home, picture, blend_frames=3) for picture in ("ink", "oil"))
    alone = play(model, one, other, other)
    first, second = model.open(one), model.open(other)
    model.step(first, frame(), one).wait()
    for wanted in alone[1:]:
        assert np.array_equal(model.step(first, frame(), other).image(), wanted)
        model.step(second, frame(), one).wait()


def test_a_stream_batch_shows_each_frame_what_the_sequential_loop_does(home: Path) -> None:
    script = [settings(home, picture, steps=3, blend_frames=3) for picture in ("ink", "ink", *["oil"] * 5, "")]
    batched = [patched(params, {"temporal.stream_batch": True}) for params in script]
    one, many = (
        load(str(home / "model"), SIZE, engine="torch", structure=structure_of(params[0]))
        for params in (script, batched)
    )
    state, found = many.open(batched[0]), []
    for params in batched:
        image = many.step(state, frame(), params).image()
        found += [] if image is None else [image]
    found += many.drain(state)
    for wanted, shown in zip(play(one, *script), found, strict=True):
        assert np.abs(wanted.astype(int) - shown).max() <= 1


def test_depth_is_drawn_by_the_engine_that_was_asked_for(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path))
    params = settings(home, "", control=f"depth={home / 'net'}:1")
    with pytest.raises(UserError, match="depth-anything-small is not here yet"):
        load(str(home / "model"), SIZE, engine="torch", structure=structure_of(params))
    estimator(tmp_path / "depth-anything-small")
    monkeypatch.setattr("accel.select.choose", None)  # nobody chooses another
    from accel.torch_backend import TorchBackend

    said: list[str] = []
    model = load(
        str(home / "model"), SIZE, structure=structure_of(params), backend=TorchBackend(),
        progress=lambda network, done: said.append(network),
    )  # fmt: skip
    assert "depth" in said
    shown, bare = (play(model, settings(home, "", control=control)) for control in (params.style.control, ""))
    assert far(shown[0], bare[0]) > 1


def test_pose_says_what_to_fetch_before_anything_is_built(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path))
    params, said = settings(home, "", control=f"openpose={home / 'net'}:1"), list[str]()
    with pytest.raises(UserError, match="rtmo-small is not here yet") as caught:
        load(
            str(home / "model"), SIZE, engine="torch", structure=structure_of(params),
            progress=lambda network, done: said.append(network),
        )  # fmt: skip
    assert caught.value.hint == "`livestyle fetch rtmo-small`"
    assert not said
