"""Stream batch in a loaded model and through a session: the pictures of the sequential loop, steps - 1 frames later."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from accel.errors import UserError
from models.load import load
from models.params import Params
from models.structure import Structure, structure_of
from models.stylizer import LatentStylizer
from stream.clocks import Clocks, StyleLane
from stream.config import patched
from stream.pump import start_pump
from stream.worker import Worker
from tests.fakes import PATIENCE, FakeLaunched, FakeSink, FakeSource, FakeStylizer, turned
from tests.folders import random_folder
from tests.scenes import sliding

SIZE = (64, 48)  # width, height
STEPS = 4
Image = NDArray[np.uint8]


@pytest.fixture(scope="module", params=["sd", "ip2p"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_folder(tmp_path_factory.mktemp("model"), request.param)


def settings(**changes: Any) -> Params:
    first = {"style.steps": STEPS, "style.strength": 0.6, "style.seed_mode": "per-frame", "temporal.stream_batch": True}
    return patched(Params(), {**first, **{key.replace("__", "."): value for key, value in changes.items()}})


def play(model: LatentStylizer, script: list[tuple[Image, Params, bool]]) -> list[Image]:
    """Every picture that comes out, the rest at the end; a True in the script is a cut."""
    state, found = model.open(script[0][1]), []
    for image, params, cut in script:
        if cut:
            model.forget(state)
        picture = model.step(state, image, params).image()
        if picture is not None:
            found.append(picture)
    return found + model.drain(state)


def clip(count: int) -> list[Image]:
    return [np.random.default_rng(i).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8) for i in range(count)]


SCRIPTS: dict[str, list[dict[str, Any]]] = {
    "plain": [{}] * 7,
    "prompts": [{}, {}, *[{"style__prompt": "ink"}] * 3, *[{"style__prompt": "rainy city"}] * 3],
    "guidance": [{}, {}, *[{"style__guidance": 3.0, "style__negative": "ink"}] * 4, {}, {}],
    "smoothed": [{"temporal__smoothing": 0.5}] * 7,
}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("cuts", [(), (3,)], ids=["one shot", "a cut"])
def test_pictures_are_those_of_the_sequential_loop(folder: Path, name: str, cuts: tuple[int, ...]) -> None:
    one = load(str(folder), SIZE, engine="torch")
    many = load(str(folder), SIZE, engine="torch", structure=structure_of(settings()))
    assert (one.delay, many.delay) == (0, STEPS - 1)
    changes = zip(clip(8), SCRIPTS[name], strict=False)
    script = [(image, settings(**change), i in cuts) for i, (image, change) in enumerate(changes)]
    wanted, found = play(one, script), play(many, script)
    assert len(found) == len(wanted) == len(script)
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(wanted, found, strict=True)) <= 1


def test_openvino_paints_the_same(folder: Path) -> None:
    script = [(image, settings(), False) for image in clip(6)]
    one = load(str(folder), SIZE, engine="openvino")
    many = load(str(folder), SIZE, engine="openvino", structure=structure_of(settings()))
    wanted, found = play(one, script), play(many, script)
    apart = [np.abs(a.astype(int) - b).mean() for a, b in zip(wanted, found, strict=True)]
    others = [np.abs(a.astype(int) - b).mean() for a, b in zip(wanted[1:], found, strict=False)]
    assert max(apart) <= min(1.0, 0.2 * min(others))  # no other frame's picture, nor a mixture


def test_what_needs_the_last_result_is_refused() -> None:
    assert structure_of(settings()) == Structure(rows=STEPS)
    for key in ("temporal__feedback", "temporal__refresh"):
        with pytest.raises(UserError) as caught:
            structure_of(settings(**{key: 1 if "refresh" in key else 0.2}))
        assert caught.value.hint


class Delayed(FakeStylizer):
    """A stream batch of three: each step gives the picture of two frames before."""

    delay = 2

    def open(self, params: Params) -> Any:
        state = super().open(params)
        state.inside = deque()
        return state

    def step(self, state: Any, image: Image, params: Params) -> FakeLaunched:
        state.inside.append(super().step(state, image, params).picture)
        return FakeLaunched(state.inside.popleft() if len(state.inside) > self.delay else None, {"unet": 1.0})  # type: ignore[arg-type]

    def drain(self, state: Any) -> list[Image]:
        rest = list(state.inside)
        state.inside.clear()
        return rest


def test_every_frame_of_a_file_gets_its_own_picture_and_time() -> None:
    sink = FakeSink()
    with Worker(Delayed()) as worker:
        session = worker.open(Params(), live=False)
        session.attach(sink, lossless=True)
        start_pump(lambda: FakeSource(9), session)
        assert session.join(PATIENCE)
    assert session.error is None
    originals = list(FakeSource(9).frames())
    assert sink.seqs == list(range(9))
    assert [frame.pts for frame in sink.frames] == [frame.pts for frame in originals]
    assert all((a.image == 255 - b.image).all() for a, b in zip(sink.frames, originals, strict=True))
    assert session.meter.dropped == 0


@pytest.mark.parametrize("mode", ["cadence", "reproject", "every-frame"])
def test_under_a_frame_lane_no_frame_waits_for_the_batch(mode: str) -> None:
    params = patched(Params(), {"temporal.mode": mode, "temporal.cadence": 2, "temporal.refiner": "analytic"})
    frames = sliding(8)
    height, width = frames[0].shape[:2]
    clocks = Clocks(StyleLane(Delayed((width, height))), live=True, period_ms=1e9)
    state = clocks.style.stylizer.open(params)
    turns = [turned(clocks, state, frame, params) for frame in frames]
    assert all(turn.image is not None and turn.ago == 0 for turn in turns)
    assert clocks.rest(state) == []
    clocks.style.close()


@pytest.mark.parametrize("extra", [{}, {"temporal__bank": 1}], ids=["plain", "with a bank"])
def test_onetime_negative_takes_one_call_a_frame_where_it_was_asked_for_at_the_start(
    tmp_path: Path, extra: dict[str, Any]
) -> None:
    """Its second pass, of the first step alone, has a row of its own; other guidance goes on as before."""
    folder = random_folder(tmp_path / "model", "sd")
    told: dict[str, Any] = {"style__guidance": 2.0, "style__guidance_mode": "onetime-negative", "style__delta": 0.8}
    full = {"style__guidance": 2.0, "style__negative": "ink"}
    one = load(
        str(folder), SIZE, engine="torch", structure=structure_of(settings(temporal__stream_batch=False, **extra))
    )
    many = load(str(folder), SIZE, engine="torch", structure=structure_of(settings(**told, **extra)))
    assert many.networks.unet.spec.inputs[1].shape == (STEPS + 1,)
    assert many.delay == STEPS - 1
    plain = structure_of(settings(**extra))
    assert structure_of(settings(**told, **extra)).covers(plain)
    assert plain.covers(structure_of(settings(**told, **extra)))  # in two calls
    calls: list[int] = []
    unet = many.networks.unet

    class Counted:
        spec, launch = unet.spec, unet.launch

        def __call__(self, *tensors: Any) -> Any:
            calls.append(len(tensors[0]))
            return unet(*tensors)

    many.networks = replace(many.networks, unet=Counted())
    changes = [told] * 5 + [{}] * 3 + [full] * 5
    script = [(image, settings(**change, **extra), False) for image, change in zip(clip(13), changes, strict=True)]
    sequential = [(image, patched(params, {"temporal.stream_batch": False}), cut) for image, params, cut in script]
    state, made = many.open(script[0][1]), []
    for image, params, _ in script[:5]:
        made.append(many.step(state, image, params).image())
    assert calls == [STEPS + 1] * 5
    many.drain(state)
    wanted, found = play(one, sequential), play(many, script)
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(wanted, found, strict=True)) <= 1
