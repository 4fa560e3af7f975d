from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import psutil
import pytest

from accel.errors import UserError
from bench import latency, load, record
from bench.report import html
from tests import fakes


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "models.load", None)  # so that what install() puts there is taken out again
    fakes.install()


def test_every_engine_plays_the_same_frames_and_is_compared_with_the_last() -> None:
    said: list[str] = []
    report = latency.measure("test", "mini", ("a", "b"), (64, 64), frames=8, log=said.append)
    assert list(report["engines"]) == ["a", "b"]
    assert not record.fault(report)
    assert report["work"]["frames"] == 8
    assert (report["work"]["source"], report["work"]["settings"]) == ("test", {})
    assert report["engines"]["b"]["ratio"] == 1.0
    for result in report["engines"].values():
        assert len(result["fps_blocks"]) == latency.BLOCKS
        assert 0 <= result["outside_networks"] <= 1
        assert {"source", "unet", "write"} <= set(result["stages_ms"])
        assert result["latency_ms"]["p99"] >= result["latency_ms"]["p50"] > 0
        assert set(result["stages_ms"]["unet"]) == {"p50", "p95", "p99"}
    for metrics in report["lanes"].values():
        assert len(metrics["latency"]["blocks"]) == latency.BLOCKS
        assert {"rate", "outside", "stage unet"} <= set(metrics)
    assert latency.text(report).splitlines()[0] == "Rate and latency"
    assert "Rate of each block" in html(report)


def test_beside_load_every_other_block_is_played_again_with_busy_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counted(count: int) -> AbstractContextManager[None]:
        counts.append(count)
        return nullcontext()

    monkeypatch.setattr("bench.load.beside", counted)
    report = latency.measure("test", "mini", ("a",), (64, 64), frames=8, settings=["style.steps=2"], beside_load=True)
    assert counts == [load.cores()] * latency.BLOCKS
    assert list(report["lanes"]) == ["a", "a, beside load"]
    assert all(len(metrics["rate"]["blocks"]) == latency.BLOCKS for metrics in report["lanes"].values())
    assert report["beside_load"]["a"]["latency_ms"]["p99"] > 0
    assert report["work"]["settings"] == {"style.steps": 2}
    assert "a, beside load" in html(report)


def test_busy_processes_are_at_work_and_end_with_the_block() -> None:
    children: list[psutil.Process] = []

    def interrupted() -> None:
        with load.beside(2):
            children.extend(psutil.Process().children())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(children) == 2
    assert not any(child.is_running() for child in children)


def test_an_engine_named_twice_is_refused() -> None:
    with pytest.raises(UserError):
        latency.measure(engines=("a", "a"))
