"""A frame on its way through a device other than the CPU: everything stays there, and nothing on the way is read back.

PyTorch's "meta" device stands for a GPU: its tensors have shapes and no numbers. So a tensor left on the CPU, a branch
on a value, an `.item()` or a picture fetched early is an error there, as it would be a stall on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from accel import select, transfer
from accel.cuda_backend import CudaBackend
from accel.engine import Backend
from accel.torch_backend import TorchBackend
from models import load as loading
from models.params import Params
from models.state import State
from models.structure import Structure
from models.stylizer import LatentStylizer
from tests.folders import random_folder, random_xl_folder
from tests.test_cuda_backend import Tape
from tests.test_stylizer_rolling import with_adapter

SIZE = (64, 64)
META = torch.device("meta")


def loaded(
    monkeypatch: pytest.MonkeyPatch, folder: Path, backend: Backend, rows: int = 1, structure: Structure | None = None
) -> LatentStylizer:
    monkeypatch.setattr(select, "choose", lambda name: select.Choice(backend, backend.name))
    return loading.load(str(folder), SIZE, structure=structure or Structure(rows=rows))


def settings(**style: object) -> Params:
    return Params.model_validate({"style": {"prompt": "oil", **style}})


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)


def through(stylizer: LatentStylizer, state: State, params: Params, frames: int = 3) -> None:
    """Frames up to the decoder's launch; fetching the picture is the one thing that a meta tensor cannot."""
    for seed in range(frames):
        launched = stylizer.step(state, image(seed), params)
        assert launched.done()


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "sd": lambda path: random_folder(path, "sd"),
    "ip2p": lambda path: random_folder(path, "ip2p"),
    "lcm": lambda path: random_folder(path, "lcm"),
    "xl": lambda path: random_xl_folder(path),
}


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> TorchBackend:
    monkeypatch.setattr(transfer.Verdict, "refused", lambda self, answer: False)  # its own test reads it a frame later
    return TorchBackend("meta")


@pytest.mark.parametrize("kind", ["ip2p", "lcm", "xl"])
def test_a_frame_stays_on_the_device_and_is_not_read_on_the_way(kind: str, tmp_path, monkeypatch, meta) -> None:
    stylizer = loaded(monkeypatch, FOLDERS[kind](tmp_path / kind), meta)
    assert stylizer.networks.device == META
    cases = [
        settings(steps=2, guidance=3.0, image_guidance=1.5, guidance_mode="four-way" if kind == "ip2p" else "full"),
        settings(steps=2, seed_mode="flow"),
        settings(steps=2, guidance=3.0, seed_mode="per-frame"),
    ]
    for params in cases[: 1 if kind == "xl" else None]:  # that one is large
        params = params.model_copy(update={"temporal": params.temporal.model_copy(update={"feedback": 0.3})})
        state = stylizer.open(params)
        through(stylizer, state, params, 1)
        stylizer.moved(state, torch.zeros(1, 2, 32, 32))
        through(stylizer, state, params, 2)
        assert state.latents is not None
        assert state.latents.device == META


def test_a_changed_prompt_is_carried_over_frame_by_frame(tmp_path, monkeypatch, meta) -> None:
    stylizer = loaded(monkeypatch, random_folder(tmp_path / "sd", "sd"), meta)
    state = stylizer.open(settings())
    through(stylizer, state, settings())
    through(stylizer, state, settings(prompt="ink", blend_frames=2))


def test_a_stream_batch_stays_on_the_device(tmp_path, monkeypatch, meta) -> None:
    stylizer = loaded(monkeypatch, random_folder(tmp_path / "sd", "ip2p"), meta, rows=2)
    params = settings(steps=2)
    through(stylizer, stylizer.open(params), params, 4)


@pytest.mark.parametrize(
    "structure",
    [Structure(window=4), Structure(window=6, refresh=2), Structure(bank=2, fused=True), Structure(lora_rank=8)],
    ids=["window", "refresh", "bank", "slots"],
)
def test_what_widens_the_unet_keeps_its_memory_on_the_device(structure, tmp_path, monkeypatch, meta) -> None:
    stylizer = loaded(monkeypatch, with_adapter(random_folder(tmp_path / "sd", "sd")), meta, structure=structure)
    params = settings(steps=2)
    state = stylizer.open(params)
    through(stylizer, state, params, 4)
    stylizer.forget(state)
    through(stylizer, state, params, 1)


@pytest.mark.parametrize(
    "structure", [Structure(), Structure(window=4), Structure(lora_rank=8)], ids=["plain", "window", "slots"]
)
def test_frames_of_several_streams_stay_on_the_device(structure, tmp_path, monkeypatch, meta) -> None:
    stylizer = loaded(monkeypatch, with_adapter(random_folder(tmp_path / "sd", "sd")), meta, structure=structure)
    stylizer.widen(4)
    params = [settings(steps=2, guidance=3.0), settings(prompt="ink"), settings(seed_mode="flow")]
    states = [stylizer.open(one) for one in params]
    for turn in range(3):
        for state in states:
            stylizer.moved(state, torch.zeros(1, 2, 32, 32))
        frames = [(state, image(turn), one) for state, one in zip(states, params, strict=True)]
        assert all(launched.done() for launched in stylizer.step_together(frames))
        assert all(state.latents is not None and state.latents.device == META for state in states)


def test_noise_is_the_same_on_every_device(tmp_path, monkeypatch) -> None:
    folder = random_folder(tmp_path / "sd", "sd")
    here = loaded(monkeypatch, folder, TorchBackend())
    there = LatentStylizer(replace(here.networks, device=torch.device("cpu", 0)))  # not the default: all is moved
    found = [stylizer.open(settings(seed=9)).noises for stylizer in (here, there)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("kind", "rows"), [("ip2p", 1), ("ip2p", 2), ("xl", 1)])
def test_engines_that_write_their_outputs_anew_give_the_same_pictures(kind, rows, tmp_path, monkeypatch) -> None:
    """As recorded ones do: whoever keeps an output beyond the next launch without a copy sees another frame's."""
    folder, params = FOLDERS[kind](tmp_path / kind), settings(steps=2, guidance=2.0)

    def pictures(backend: Backend) -> list[np.ndarray]:
        stylizer = loaded(monkeypatch, folder, backend, rows)
        state = stylizer.open(params)
        found = [stylizer.step(state, image(seed), params).image() for seed in range(5)]
        return [picture for picture in [*found, *stylizer.drain(state)] if picture is not None]

    wanted = pictures(TorchBackend())
    found = pictures(CudaBackend("cpu", mode=None, record=lambda call, device: Tape()(call, device)))
    assert len(found) == len(wanted) == 5
    for a, b in zip(found, wanted, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("kind", ["ip2p", "xl"])
def test_so_do_those_that_several_streams_share(kind: str, tmp_path, monkeypatch) -> None:
    params = [settings(steps=steps, guidance=2.0, seed=steps) for steps in (1, 2, 2)]
    backend = CudaBackend("cpu", mode=None, record=lambda call, device: Tape()(call, device))
    stylizer = loaded(monkeypatch, FOLDERS[kind](tmp_path / kind), backend)
    stylizer.widen(3)
    states = [[stylizer.open(one) for one in params] for _ in range(2)]
    for turn in range(2):
        frames = [
            [(state, image(10 * n + turn), one) for n, (state, one) in enumerate(zip(mine, params, strict=True))]
            for mine in states
        ]
        wanted = [stylizer.step(*frame).image() for frame in frames[0]]
        found = [launched.image() for launched in stylizer.step_together(frames[1])]
        for a, b in zip(found, wanted, strict=True):
            assert a is not None
            assert b is not None
            assert np.abs(a.astype(int) - b).max() <= 1


def test_a_verdict_comes_at_once_on_a_cpu_and_with_the_next_question_elsewhere() -> None:
    yes, no = torch.tensor(True), torch.tensor(False)
    assert [transfer.Verdict().refused(answer) for answer in (yes, no)] == [False, True]


class Elsewhere(Tensor):
    """A CPU tensor that says it is on a GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("meta")


def test_a_verdict_elsewhere_is_read_with_the_next_question() -> None:
    verdict = transfer.Verdict()
    answers = [torch.tensor(value).as_subclass(Elsewhere) for value in (True, False, True, True)]
    assert [verdict.refused(answer) for answer in answers] == [False, False, True, False]
