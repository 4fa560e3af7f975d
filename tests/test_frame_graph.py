"""Whole frames as one recording: the same pictures, shared between streams, and only of frames that allow it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from accel import select
from accel.cuda_backend import CudaBackend
from accel.engine import Backend
from accel.torch_backend import TorchBackend
from models import frame_graph as frame_graph_module
from models import load as loading
from models.frame_graph import KEPT, SETTLED, FrameGraph, frame_graph
from models.params import Params
from models.stylizer import LatentStylizer
from tests.folders import random_folder
from tests.test_cuda_backend import Tape

SIZE = (64, 64)
CPU = torch.device("cpu")


def taped() -> CudaBackend:
    return CudaBackend("cpu", mode=None, record=lambda call, device: Tape()(call, device))


def loaded(monkeypatch: pytest.MonkeyPatch, folder: Path, backend: Backend) -> LatentStylizer:
    monkeypatch.setattr(select, "choose", lambda name: select.Choice(backend, backend.name))
    return loading.load(str(folder), SIZE)


def settings(temporal: dict[str, object] | None = None, **style: object) -> Params:
    return Params.model_validate({"style": {"prompt": "oil", "steps": 2, **style}, "temporal": temporal or {}})


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["sd", "ip2p", "lcm"])
def test_recorded_frames_are_those_of_the_networks_one_by_one(kind: str, tmp_path, monkeypatch) -> None:
    folder, found = random_folder(tmp_path / kind, kind), {}
    phases = [settings(), settings(seed=3), settings(prompt="ink", blend_frames=3), settings(seed_mode="per-frame")]
    for backend in (TorchBackend(), taped()):
        stylizer = loaded(monkeypatch, folder, backend)
        states = [stylizer.open(phases[0]) for _ in range(2)]
        found[backend.name] = [
            stylizer.step(state, image(seed + i), params).image()
            for params in phases
            for seed in range(SETTLED)
            for i, state in enumerate(states)
        ]
    wanted, pictures = found.values()
    assert all(np.array_equal(a, b) for a, b in zip(wanted, pictures, strict=True))
    assert stylizer._frames is not None
    assert len(stylizer._frames._replays) == 1  # seeds, prompts and noise are no other kind of frame
    assert all(stylizer._frames._replays.values())


def test_frames_of_several_streams_are_recorded_as_one(tmp_path, monkeypatch) -> None:
    """Whatever their prompts, seeds and steps."""
    monkeypatch.setattr(frame_graph_module, "SETTLED", 2)
    stylizer = loaded(monkeypatch, random_folder(tmp_path / "ip2p", "ip2p"), taped())
    stylizer.widen(4)
    assert stylizer._frames is not None
    wishes = [settings(seed=1, steps=1), settings(prompt="ink", seed_mode="per-frame"), settings(steps=1, guidance=3.0)]
    states = [[stylizer.open(params) for params in wishes] for _ in range(2)]
    for turn in range(3):
        frames = [
            [(state, image(10 * turn + n), params) for n, (state, params) in enumerate(zip(mine, wishes, strict=True))]
            for mine in states
        ]
        together = stylizer.step_together(frames[0])
        pictures = [launched.image() for launched in together]
        recorded = len(stylizer._frames._replays)
        for picture, alone in zip(pictures, frames[1], strict=True):
            wanted = stylizer.step(*alone).image()
            assert picture is not None
            assert wanted is not None
            assert np.abs(picture.astype(int) - wanted).max() <= 1
        assert (recorded > 0) == (turn > 0)
    kinds = [len(key) for key in stylizer._frames._replays if isinstance(key, tuple)]
    assert sorted(kinds) == [1, 1, 1, 3]
    assert all(stylizer._frames._replays.values())


@pytest.mark.parametrize(
    "params",
    [settings({"feedback": 0.3}), settings({"smoothing": 0.3}), settings(seed_mode="flow")],
    ids=["feedback", "smoothing", "flow"],
)
def test_frames_that_remember_are_not_recorded(params: Params, tmp_path, monkeypatch) -> None:
    stylizer = loaded(monkeypatch, random_folder(tmp_path / "sd", "sd"), taped())
    state = stylizer.open(params)
    for seed in range(SETTLED + 1):
        stylizer.step(state, image(seed), params).wait()
    assert stylizer._frames is not None
    assert not stylizer._frames._replays


def test_a_picture_stays_what_it_was_when_the_next_frame_is_drawn(tmp_path, monkeypatch) -> None:
    stylizer = loaded(monkeypatch, random_folder(tmp_path / "sd", "sd"), taped())
    state = stylizer.open(settings())
    for seed in range(SETTLED):
        stylizer.step(state, image(seed), settings()).wait()
    picture = stylizer.step(state, image(1), settings()).image()
    kept = picture.copy()
    stylizer.step(state, image(2), settings()).wait()
    assert np.array_equal(picture, kept)


def double(x: Tensor) -> tuple[Tensor, ...]:
    return (2 * x,)


def test_recordings_are_few_and_only_of_what_comes_often() -> None:
    graphs = FrameGraph(CPU, lambda call, device: Tape()(call, device))
    example = (torch.ones(1),)
    for kind in range(KEPT + 2):
        found = [graphs.of(kind, double, example) for _ in range(SETTLED)]
        assert found[:-1] == [None] * (SETTLED - 1)
        assert found[-1] is not None
        assert found[-1] is graphs.of(kind, double, example)
    assert len(graphs._replays) == KEPT


def test_without_memory_for_a_recording_there_is_none_and_it_is_said_once(caplog) -> None:
    graphs = FrameGraph(CPU, Tape(0, torch.OutOfMemoryError("CUDA out of memory")))
    assert [graphs.of("kind", double, (torch.ones(1),)) for _ in range(SETTLED + 3)] == [None] * (SETTLED + 3)
    assert len(caplog.messages) == 1


def test_engines_that_cannot_be_part_of_a_recording_have_none() -> None:
    from tests.test_cuda_backend import SPEC, Mix

    engine = TorchBackend().load(Mix, SPEC)
    plain = CudaBackend("cpu", mode=None, record=None).load(Mix, SPEC)
    assert frame_graph((engine, engine)) is None
    assert frame_graph((plain, plain)) is None
    assert frame_graph((taped().load(Mix, SPEC),)) is not None


def test_a_frame_is_timed_with_its_networks_apart(tmp_path, monkeypatch) -> None:
    from bench import frame, record

    monkeypatch.setattr(select, "choose", lambda name: select.Choice(taped(), "taped"))
    found = frame.measure(str(random_folder(tmp_path / "sd", "sd")), SIZE, frames=8, trace=tmp_path / "trace.json")
    assert not record.fault(found)
    assert set(found["lanes"]["torch-cuda"]) == {"frame", "networks"}
    assert (tmp_path / "trace.json").stat().st_size > 0
