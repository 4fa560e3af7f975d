from __future__ import annotations

import sys
import time
from itertools import islice

import numpy as np
import pytest

from accel.errors import UserError
from bench import record, scale
from bench.report import html
from tests import fakes


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "models.load", None)  # so that what install() puts there is taken out again
    monkeypatch.setattr(scale, "SETTLE_S", 0.1)
    fakes.install(0.002)


def test_every_number_of_sessions_shares_one_worker_and_is_compared_with_the_least() -> None:
    said: list[str] = []
    report = scale.measure("test", "mini", "null", (64, 64), (1, 2), 0.4, 200.0, ["style.steps=2"], said.append)
    assert not record.fault(report)
    lanes = ["1 session", "2 sessions", "2 sessions, 2 frames a launch"]
    assert list(report["lanes"]) == lanes
    assert list(report["sessions"]) == ["1", "2", "2, 2 a launch"]
    assert report["work"]["settings"] == {"style.steps": 2, "temporal.mode": "every-frame"}
    assert report["sessions"]["1"]["ratio"] == 1.0
    ratio = report["sessions"]["2, 2 a launch"]["ratio"]
    assert f"{lanes[2]}: {ratio:.2f} × the frames of 1 session." in report["summary"]
    for lane, result in zip(lanes, report["sessions"].values(), strict=True):
        assert result["fps"] > 0
        assert result["fps_of_a_session"]["least"] > 0
        assert result["latency_ms"]["p99"] >= result["latency_ms"]["p50"] > 0
        assert result["memory_mb"] > 0
        assert len(report["lanes"][lane]["total rate"]["blocks"]) == scale.ROUNDS
    assert "Latency" in html(report)


def test_no_launch_is_shared_where_none_is_asked_for() -> None:
    report = scale.measure("test", "mini", "null", (64, 64), (1, 3), 0.4, 200.0, batch=1)
    assert list(report["lanes"]) == ["1 session", "3 sessions"]
    (table, *_) = report["sections"]
    assert [row[:2] for row in table["rows"]] == [["1", "1"], ["3", "1"]]
    assert "frames a launch:" not in report["summary"]


def test_cameras_that_are_too_slow_to_tell_are_named() -> None:
    report = scale.measure("test", "mini", "null", (64, 64), (1,), 0.4, 10.0)
    assert "the cameras were the limit" in report["summary"]


def test_a_session_that_breaks_ends_the_measurement() -> None:
    with pytest.raises(ArithmeticError):
        scale.measure("test", "mini", "null", (64, 64), (2,), 0.4, 100.0, ["style.prompt=boom"])


def test_a_camera_drops_what_nobody_took() -> None:
    pictures = [np.full((8, 8, 3), value, np.uint8) for value in range(4)]
    frames = scale.Camera(pictures, 100.0, first=1).frames()
    first = next(frames)
    assert first.image[0, 0, 0] == (first.seq + 1) % 4
    time.sleep(0.05)
    assert next(frames).seq >= first.seq + 4
    seqs = [frame.seq for frame in islice(frames, 3)]
    assert seqs == sorted(set(seqs))


@pytest.mark.parametrize("text", ["", "0", "1,x", "-1", "1000"])
def test_bad_numbers_of_sessions_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        scale.counts_of(text)
    assert scale.counts_of(" 4, 1,4") == (4, 1)
