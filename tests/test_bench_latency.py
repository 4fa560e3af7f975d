from __future__ import annotations

import sys

import pytest

from accel.errors import UserError
from bench import latency
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
    assert report["frames"] == 8
    assert report["engines"]["b"]["ratio"] == 1.0
    for result in report["engines"].values():
        assert len(result["fps_blocks"]) == latency.BLOCKS
        assert 0 <= result["outside_networks"] <= 1
        assert {"source", "unet", "write"} <= set(result["stages_ms"])
        assert result["latency_ms"]["p99"] >= result["latency_ms"]["p50"] > 0
    assert len(latency.text(report).splitlines()) == 4
    assert "Rate of each block" in html(report)


def test_an_engine_named_twice_is_refused() -> None:
    with pytest.raises(UserError):
        latency.measure(engines=("a", "a"))
