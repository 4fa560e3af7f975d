"""What only a GPU can show of launches that sessions share: the same pictures, nothing waited for, and that it pays."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from accel.cuda_backend import CudaBackend
from models.frame_graph import SETTLED
from models.params import Params
from models.stylizer import LatentStylizer
from tests.test_cuda import image, loaded, settings, waiting_is_an_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a gpu: no CUDA device here"),
]

WISHES = [{"seed": 1}, {"prompt": "ink", "seed": 2}, {"guidance": 3.0}, {"steps": 1, "strength": 0.5}]


def framed(stylizer: LatentStylizer, params: Sequence[Params]) -> list[list[Any]]:
    """Two streams for each: one to be alone, one for company."""
    return [[[stylizer.open(one), image(n), one] for n, one in enumerate(params)] for _ in range(2)]


@pytest.mark.parametrize("kind", ["sd", "ip2p", "lcm", "xl"])
def test_pictures_are_those_of_each_stream_alone(kind: str, monkeypatch) -> None:
    """Network by network, and when all of it is one recording."""
    stylizer = loaded(monkeypatch, kind, CudaBackend(mode=None, dtype="float32"))
    stylizer.widen(4)
    alone, company = framed(stylizer, [settings(**wish) for wish in WISHES])
    for _ in range(SETTLED + 2):
        wanted = [stylizer.step(*frame).image() for frame in alone]
        found = [launched.image() for launched in stylizer.step_together(company)]
        for a, b in zip(found, wanted, strict=True):
            assert a is not None
            assert b is not None
            assert np.abs(a.astype(int) - b).max() <= 2


@pytest.mark.parametrize("before", [4, SETTLED + 2], ids=["networks", "whole"])
def test_nothing_waits_inside_a_shared_launch(before: int, monkeypatch) -> None:
    stylizer = loaded(monkeypatch, "ip2p", CudaBackend(mode=None))
    stylizer.widen(4)
    _, company = framed(stylizer, [settings(**wish) for wish in WISHES[:3]])
    for _ in range(before):
        for launched in stylizer.step_together(company):
            launched.wait()
    with waiting_is_an_error():
        shared = stylizer.step_together(company)
    pictures = [launched.image() for launched in shared]
    assert len({picture.tobytes() for picture in pictures if picture is not None}) == 3


def test_four_streams_in_a_launch_take_less_than_four_launches(monkeypatch) -> None:
    """Small networks fill nothing of a card; `make gpu` has the figure for those of full size."""
    stylizer = loaded(monkeypatch, "sd", CudaBackend(mode=None))
    stylizer.widen(4)
    alone, company = framed(stylizer, [settings(seed=n) for n in range(4)])

    def apart() -> None:
        for frame in alone:
            stylizer.step(*frame).wait()

    def together() -> None:
        for launched in stylizer.step_together(company):
            launched.wait()

    times: dict[Any, list[float]] = {apart: [], together: []}
    for turn in range(60):
        for way, found in times.items():
            begun = time.perf_counter()
            way()
            if turn > SETTLED:
                found.append(time.perf_counter() - begun)
    assert statistics.median(times[together]) < statistics.median(times[apart])
