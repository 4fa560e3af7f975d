"""Frames of several streams in one launch: each has the picture that it has alone, whatever the others do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from accel.engine import EngineSpec, Pending, TensorSpec
from accel.errors import UserError
from accel.torch_backend import TorchBackend
from models.following import followed
from models.load import load
from models.params import Params
from models.state import State
from models.structure import Structure
from models.stylizer import LatentStylizer
from models.together import PAYS, Widths, widths
from stream.config import patched
from tests.folders import random_folder, random_xl_folder

SIZE = (64, 48)  # width, height
Image = NDArray[np.uint8]
Change = dict[str, Any]
FIRST: Change = {"style.prompt": "oil", "style.strength": 0.6}


def settings(change: Change) -> Params:
    return patched(Params(), {**FIRST, **{key: value for key, value in change.items() if "." in key}})


def image(seed: int) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)


def told(model: LatentStylizer, state: State, change: Change) -> Params:
    """The settings of a frame; before it, its stream's memory is told of a cut or of motion."""
    if change.get("cut"):
        model.forget(state)
    elif shift := change.get("moved"):
        model.moved(state, torch.full((1, 2, 24, 32), float(shift)))
    return settings(change)


def alone(model: LatentStylizer, script: Sequence[Change | None], stream: int) -> list[tuple[Image, Tensor]]:
    """Each frame's picture and latents of a stream that nobody else is beside; None: it has no frame then."""
    found, state = [], None
    for turn, change in enumerate(script):
        if change is None:
            continue
        state = state or model.open(settings(change))
        params = told(model, state, change)
        picture = model.step(state, image(100 * stream + turn), params).image()
        assert picture is not None
        assert state.latents is not None
        found.append((picture, state.latents.clone()))
    return found


def in_company(model: LatentStylizer, scripts: Sequence[Sequence[Change | None]]) -> list[list[tuple[Image, Tensor]]]:
    """The same of streams side by side, in as few launches as may be."""
    states: list[State | None] = [None] * len(scripts)
    found: list[list[tuple[Image, Tensor]]] = [[] for _ in scripts]
    for turn in range(max(map(len, scripts))):
        by_company: dict[Any, list[tuple[int, tuple[State, Image, Params]]]] = {}
        for stream, script in enumerate(scripts):
            if turn >= len(script) or (change := script[turn]) is None:
                continue
            state = states[stream] = states[stream] or model.open(settings(change))
            params = told(model, state, change)
            frame = state, image(100 * stream + turn), params
            by_company.setdefault(model.company(params), []).append((stream, frame))
        for frames in by_company.values():
            launched = model.step_together([frame for _, frame in frames])
            assert len({tuple(one.stages_ms) for one in launched}) == 1
            for (stream, (state, *_)), one in zip(frames, launched, strict=True):
                picture = one.image()
                assert picture is not None
                assert state.latents is not None
                found[stream].append((picture, state.latents.clone()))
    return found


def agree(model: LatentStylizer, scripts: Sequence[Sequence[Change | None]]) -> None:
    wanted = [alone(model, script, stream) for stream, script in enumerate(scripts)]
    found = in_company(model, scripts)
    pictures = []
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(ours) == len(theirs)
        for (picture, latents), (expected, expected_latents) in zip(ours, theirs, strict=True):
            assert np.abs(picture.astype(int) - expected).max() <= 1
            assert (latents - expected_latents).abs().max() <= 1e-5 * max(1.0, float(expected_latents.abs().max()))
            pictures.append(expected)
    assert all((a != b).any() for i, a in enumerate(pictures) for b in pictures[:i])  # no two of them would do


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "sd": lambda path: random_folder(path, "sd"),
    "ip2p": lambda path: random_folder(path, "ip2p"),
    "lcm": lambda path: random_folder(path, "lcm"),
    "xl": lambda path: random_xl_folder(path),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LatentStylizer]:
    known: dict[str, LatentStylizer] = {}

    def model(kind: str) -> LatentStylizer:
        if kind not in known:
            known[kind] = load(str(FOLDERS[kind](tmp_path_factory.mktemp(kind))), SIZE, engine="torch")
            known[kind].widen(4)
        return known[kind]

    return model


INK, GUIDED = {"style.prompt": "ink"}, {"style.guidance": 3.0, "style.negative": "rainy city"}
SCRIPTS: dict[str, list[list[Change | None]]] = {
    "seeds": [[{"style.seed": seed}] for seed in range(4)],
    "prompts that change, with and without a blend": [
        [{}, INK, {}],
        [{"style.blend_frames": 2}, {"style.blend_frames": 2, **INK}, {"style.blend_frames": 2, **INK}],
    ],
    "steps and strengths": [[{"style.steps": n, "style.strength": 0.3 * n}] for n in (1, 3, 2)],
    "guidance": [
        [GUIDED, {}],
        [{}, GUIDED],
        [{**GUIDED, "style.guidance_mode": "onetime-negative", "style.steps": 2, "style.delta": 0.8}],
        [{**GUIDED, "style.guidance_mode": "self", "style.steps": 2}],
    ],
    "noise anew": [[{"style.seed_mode": "per-frame", "style.seed": n}] * 3 for n in range(2)],
    "noise that moves, and cuts": [
        [{"style.seed_mode": "flow", "moved": n, "cut": n == 2} for n in range(4)],
        [{"moved": 1}, {}, {"cut": True}, {}],
    ],
    "results that count": [
        [{"temporal.feedback": 0.3, "moved": n} for n in range(3)],
        [{"temporal.smoothing": 0.5, "cut": n == 2} for n in range(4)],
        [{}] * 3,
    ],
    "coming and going": [[{}] * 3, [None, {}, None, {}], [None, None, {}], [{}, None, {}]],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_stream_has_the_pictures_that_it_has_alone(models, name: str) -> None:
    agree(models("ip2p"), SCRIPTS[name])


@pytest.mark.parametrize("kind", ["sd", "lcm", "xl"])
def test_models_with_other_inputs_too(models, kind: str) -> None:
    agree(models(kind), [[{}], [{**INK, **GUIDED}]])


def failing(model: LatentStylizer, frames: list[Any], at: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Ways in which one stream's frame goes wrong at different places of a launch."""
    state, picture, params = frames[at]

    def broken(*arguments: Any) -> Any:
        raise ArithmeticError("broken")

    def shape() -> None:
        frames[at] = state, picture[:-8], params

    def steps() -> None:
        monkeypatch.setattr(
            "models.stylizer.followed", lambda net, s, style: (broken if s is state else followed)(net, s, style)
        )

    def words() -> None:
        state.prepared = replace(state.prepared, words=state.prepared.words[:, :-1])

    def before() -> None:
        monkeypatch.setattr(state.calls, "begin", broken)

    def after() -> None:
        monkeypatch.setattr(state.calls, "keep", broken)

    def shown() -> None:
        monkeypatch.setattr(state.download, "__call__", broken, raising=False)
        state.censor = type("Censor", (), {"instead": "blank", "shown": broken, "reset": broken})()

    return {f.__name__: f for f in (shape, steps, words, before, after, shown)}


@pytest.mark.parametrize("how", ["shape", "steps", "words", "before", "after", "shown"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_stream_that_fails_does_so_alone(models, how: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("sd")
    params = [settings({"style.seed": seed}) for seed in range(3)]
    wanted = [model.step(model.open(p), image(n), p).image() for n, p in enumerate(params)]
    frames: list[Any] = [(model.open(p), image(n), p) for n, p in enumerate(params)]
    failing(model, frames, at, monkeypatch)[how]()
    launched = model.step_together(frames)
    for place, (one, picture) in enumerate(zip(launched, wanted, strict=True)):
        if place == at:
            with pytest.raises((ArithmeticError, ValueError)):
                one.wait()
        else:
            found = one.image()
            assert found is not None
            assert np.abs(found.astype(int) - picture).max() <= 1
    assert model.width == 4


class Broken:
    """An engine of several rows whose memory is full."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        raise UserError("the GPU's memory is full", hint="")

    launch: Callable[..., Pending] = __call__  # type: ignore[assignment]


@pytest.mark.parametrize("name", ["encode", "unet", "decode"])
def test_a_launch_that_fails_as_a_whole_is_made_again_one_by_one(
    models, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = LatentStylizer(models("sd").networks)
    model._widths = dict(models("sd")._widths)
    params = [settings({"style.seed": seed}) for seed in range(3)]
    wanted = [model.step(model.open(p), image(n), p).image() for n, p in enumerate(params)]
    known = model._widths[name].engines
    model._widths[name] = Widths((known[0], *(Broken(engine.spec) for engine in known[1:])))
    with caplog.at_level(logging.WARNING):
        launched = model.step_together([(model.open(p), image(n), p) for n, p in enumerate(params)])
    assert all(np.array_equal(one.image(), picture) for one, picture in zip(launched, wanted, strict=True))
    assert model.width == 1  # it is not tried again
    assert "memory is full" in caplog.text


# Engines of several widths


class Sums(nn.Module):
    """Rows, times what comes once."""

    def forward(self, x: Tensor, once: Tensor) -> Tensor:
        return (x * once).sum(1, keepdim=True)


class Counted:
    """An engine that knows what it was given."""

    def __init__(self, rows: int) -> None:
        self.spec = EngineSpec(
            "sums",
            (TensorSpec("x", (rows, 3)), TensorSpec("once", (3,))),
            (TensorSpec("y", (rows, 1)),),
            "sums",
            "fp32",
        )
        self.engine, self.given = TorchBackend().load(Sums, self.spec), list[Tensor]()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.given.append(tensors[0])
        return self.engine(*tensors)

    def launch(self, *tensors: Tensor) -> Pending:
        self.given.append(tensors[0])
        return self.engine.launch(*tensors)


@pytest.mark.parametrize(("frames", "used"), [(1, 1), (2, 2), (3, 4), (4, 4)])
def test_the_smallest_engine_that_holds_them_is_launched_once(frames: int, used: int) -> None:
    engines = {rows: Counted(rows) for rows in (1, 2, 4)}
    network, once = Widths(tuple(engines.values())), torch.tensor([1.0, 0.5, 2.0])
    assert network.most == 4
    calls = [(torch.full((1, 3), float(n + 1)), once) for n in range(frames)]
    found = [output.item() for (output,) in network(calls)]
    assert found == [3.5 * (n + 1) for n in range(frames)]
    assert [one.wait()[0].item() for one in network.launch(calls)] == found
    assert all(one.done() for one in network.launch(calls))
    assert {rows for rows, engine in engines.items() if engine.given} == {used}
    (rest,) = {tuple(row) for row in engines[used].given[0][frames:].tolist()} or {(1.0,) * 3}
    assert rest == (1.0,) * 3  # the first frame again


def test_widths_are_powers_of_two_and_the_number_that_is_asked_for() -> None:
    assert [widths(count) for count in (1, 2, 3, 4, 6)] == [[], [2], [2, 3], [2, 4], [2, 4, 6]]


def test_nothing_is_shared_before_it_is_asked_for_and_on_a_cpu_by_default(models) -> None:
    model = LatentStylizer(models("sd").networks)
    assert model.width == 1
    model.widen()
    assert (model.width, PAYS) == (1, {"cuda": 4})
    model.widen(2)
    model.widen(1)
    assert model.width == 2
    assert [len(of.engines) for of in model._widths.values()] == [2, 2, 2]


def test_a_stream_batch_fills_its_launches_by_itself(tmp_path: Path) -> None:
    model = load(str(random_folder(tmp_path / "sd", "sd")), SIZE, engine="torch", structure=Structure(rows=2))
    model.widen(4)
    assert model.width == 1


def test_openvino_paints_the_same(tmp_path: Path) -> None:
    """In 8-bit integers where it has them: samples for several pictures are those for one."""
    model = load(str(random_folder(tmp_path / "ip2p", "ip2p")), SIZE, engine="openvino")
    model.widen(2)
    scripts = SCRIPTS["seeds"][:2]
    wanted, found = [alone(model, script, n) for n, script in enumerate(scripts)], in_company(model, scripts)
    apart = [
        np.abs(a.astype(int) - b).mean()
        for x, y in zip(wanted, found, strict=True)
        for (a, _), (b, _) in zip(x, y, strict=True)
    ]
    assert max(apart) <= 2.0
