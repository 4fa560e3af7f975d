"""Prompt, LoRA, control weight and style picture change while frames run: same engines, no frame lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from safetensors.torch import save_file

from accel.errors import UserError
from models.load import load
from models.params import Params
from models.structure import structure_of
from models.stylizer import LatentStylizer
from stream.config import patched
from stream.hub import Hub, LiveSettings
from tests.addons import lora, random_adapter, random_controlnet, random_picture
from tests.fakes import PATIENCE
from tests.folders import random_folder
from tests.test_live import Camera, until

SIZE = (64, 48)  # width, height
Image = NDArray[np.uint8]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two LoRAs, two style pictures, an IP-Adapter and a ControlNet."""
    home = tmp_path_factory.mktemp("home")
    model = random_folder(home / "model", "sd")
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    layer = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    for seed, name in enumerate(("ink", "oil")):
        save_file(lora(unet, (layer,), seed=seed), home / f"{name}.safetensors")
        random_picture(home / f"{name}.png", seed)
    random_adapter(model / "ip_adapter", unet, "base")
    random_controlnet(home / "canny", model, seed=3)
    return home


@pytest.fixture(scope="module")
def settings(home: Path) -> Callable[..., Params]:
    def make(**changes: Any) -> Params:
        first = {
            "style.strength": 0.6,
            "style.lora": f"{home / 'ink.safetensors'}:0.5",
            "style.picture": str(home / "ink.png"),
            "style.control": f"tile={home / 'canny'}:0.5",
        }
        return patched(Params(), {**first, **{f"style.{key}": value for key, value in changes.items()}})

    return make


@pytest.fixture(scope="module")
def model(home: Path, settings: Callable[..., Params]) -> LatentStylizer:
    return load(str(home / "model"), SIZE, engine="torch", structure=structure_of(settings()))


def frame() -> Image:
    return np.random.default_rng(9).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)


def changes_of(home: Path) -> dict[str, dict[str, Any]]:
    return {
        "prompt": {"prompt": "ink"},
        "lora": {"lora": f"{home / 'oil.safetensors'}:0.9"},
        "lora off": {"lora": ""},
        "control weight": {"control": f"tile={home / 'canny'}:1.5"},
        "control off": {"control": ""},
        "picture": {"picture": str(home / "oil.png")},
        "picture scale": {"picture_scale": 1.0},
        "picture off": {"picture": ""},
    }


CHANGES = tuple(changes_of(Path()))


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_counts_from_the_next_frame_on_and_no_engine_is_built(
    model: LatentStylizer, settings: Callable[..., Params], home: Path, name: str
) -> None:
    before, after = settings(), settings(**changes_of(home)[name])
    assert structure_of(before).covers(structure_of(after))
    state = model.open(before)
    first = model.step(state, frame(), before).image()
    model.prepare(after)
    found = model.step(state, frame(), after).image()
    fresh = model.step(model.open(after), frame(), after).image()
    assert first is not None
    assert found is not None
    assert np.array_equal(found, fresh)  # nothing of before is left
    assert not np.array_equal(found, first)
    back = model.step(state, frame(), before).image()
    assert np.array_equal(back, first)


def test_everything_off_is_the_plain_model(model: LatentStylizer, home: Path) -> None:
    """The graph with room for all of it, with nothing in it, and the model without."""
    params = patched(Params(), {"style.strength": 0.6})
    plain = load(str(home / "model"), SIZE, engine="torch")
    wanted = plain.step(plain.open(params), frame(), params).image()
    assert np.array_equal(model.step(model.open(params), frame(), params).image(), wanted)
    silent = {"style.picture": str(home / "ink.png"), "style.picture_scale": 0.0}
    silent |= {"style.lora": f"{home / 'ink.safetensors'}:0", "style.control": f"tile={home / 'canny'}:0"}
    params = patched(params, silent)
    assert np.array_equal(model.step(model.open(params), frame(), params).image(), wanted)


@pytest.fixture
def loaded() -> list[str]:
    return []


@pytest.fixture
def hub(home: Path, settings: Callable[..., Params], loaded: list[str]) -> Iterator[Hub]:
    def loading(name: str, size: tuple[int, int], engine: str, say: Callable[[str], None], **more: Any) -> Any:
        loaded.append(name)
        return load(name, size, engine, say, **more)

    wanted = LiveSettings(model=str(home / "model"), engine="torch", box=SIZE, params=settings(), stall_s=30.0)
    hub = Hub(wanted, load=loading)
    yield hub
    hub.close()


def test_a_stream_goes_on_through_every_change(hub: Hub, home: Path, loaded: list[str]) -> None:
    stream, camera = hub.open("cam"), Camera(SIZE)
    box = stream.outlets.subscribe(1000)
    stream.feed(lambda size, fit: camera, "a test", retry=False)
    camera.show(100)
    until(lambda: (camera.show(100), stream.phase == "live")[1])
    for change in changes_of(home).values():
        stream.patch({f"style.{key}": value for key, value in change.items()})
        seen = stream.meter.frames_out
        until(lambda seen=seen: (camera.show(100), stream.meter.frames_out > seen + 1)[1])  # type: ignore[misc]
        assert stream.phase == "live"
        assert stream.error is None
    assert loaded == [str(home / "model")]
    assert box.get(PATIENCE).image.shape == (SIZE[1], SIZE[0], 3)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("style.lora", "nowhere.safetensors", "no such LoRA"),
        ("style.lora", "model/unet/diffusion_pytorch_model.safetensors", "not a LoRA"),
        ("style.picture", "ink.safetensors", "picture"),
        ("style.picture", "nowhere.png", "nowhere"),
        ("style.control", "zebra:0.5", "zebra"),
        ("style.prompt", "x" * 2001, "2000"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str, told: str
) -> None:
    monkeypatch.chdir(home)
    stream, camera = hub.open("cam"), Camera(SIZE)
    stream.feed(lambda size, fit: camera, "a test", retry=False)
    until(lambda: (camera.show(100), stream.phase == "live")[1])
    before = stream.params
    with pytest.raises(UserError, match=told):
        stream.patch({key: value})
    assert stream.params == before
    until(lambda: (camera.show(100), stream.phase == "live")[1])


def test_what_the_model_cannot_have_is_said_and_the_picture_goes_on(tmp_path: Path) -> None:
    model = random_folder(tmp_path / "plain", "sd")
    hub = Hub(LiveSettings(model=str(model), engine="torch", box=SIZE, stall_s=30.0))
    try:
        stream, camera, events = hub.open("cam"), Camera(SIZE), hub.events.subscribe(100)
        stream.feed(lambda size, fit: camera, "a test", retry=False)
        until(lambda: (camera.show(100), stream.phase == "live")[1])
        stream.patch({"temporal.window": 4})  # it has no motion adapter
        said = next(event for event in iter(lambda: events.get(PATIENCE), None) if event.kind == "error")
        assert "no motion adapter" in said.text
        assert "goes on as before" in said.text
        seen = stream.meter.frames_out
        until(lambda: (camera.show(100), stream.meter.frames_out > seen + 1)[1])
        assert (stream.phase, stream.error) == ("live", None)
    finally:
        hub.close()
