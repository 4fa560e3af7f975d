from __future__ import annotations

import io
import json

import pytest

from stream.meter import SAMPLES, Meter
from stream.status import PLAIN_EVERY, Status
from tests.fakes import FakeClock


def metered(latencies_ms: list[float], fps: float = 10.0) -> Meter:
    meter = Meter()
    for number, latency in enumerate(latencies_ms):
        now = 50 + number / fps
        meter.frame_in()
        meter.key(now)
        meter.frame_out(now, now - latency / 1000)
    return meter


def test_rates_are_of_frame_intervals() -> None:
    meter = metered([10.0] * 21, fps=10.0)
    assert meter.fps() == pytest.approx(10.0)
    assert meter.style_fps() == pytest.approx(10.0)
    assert meter.recent_fps(now=52.0) == pytest.approx(10.0)


def test_one_frame_has_no_rate() -> None:
    assert metered([10.0]).fps() == 0.0
    assert metered([10.0]).recent_fps(50.0) == 0.0


def test_the_recent_rate_follows_a_change_and_a_stall() -> None:
    meter = metered([1.0] * 100, fps=10.0)  # until 59.9
    for number in range(100):
        meter.frame_out(60 + number / 50, 60)
    assert meter.recent_fps(61.98) == pytest.approx(50.0)
    assert meter.fps() == pytest.approx(199 / 11.98)
    assert 15 < meter.recent_fps(64.0) < 30  # stalling shows at once
    assert meter.recent_fps(70.0) == 0.0


def test_percentiles_are_of_the_newest_samples_in_bounded_memory() -> None:
    meter = metered([1000.0] * 10 + [float(ms) for ms in range(SAMPLES)], fps=100.0)
    latencies, _ = meter.samples()
    assert len(latencies) == SAMPLES
    assert meter.latency_ms(50) == pytest.approx((SAMPLES - 1) / 2)
    assert meter.latency_ms(99) == pytest.approx((SAMPLES - 1) * 0.99)


def test_stats_have_exactly_the_documented_keys() -> None:
    meter = metered([10.0, 20.0, 30.0])
    meter.stages({"encode": 1.0, "unet": 2.0})
    meter.stage("unet", 4.0)
    meter.drop(2)
    stats = meter.stats({"model": "mini", "engine": "torch", "device": "cpu", "versions": {"torch": "2"}}, (512, 288))
    assert list(stats) == [
        *("frames_in", "frames_out", "dropped", "fps", "latency_ms", "stages_ms", "style_fps"),
        *("model", "engine", "device", "size", "versions"),
    ]
    assert stats["latency_ms"] == {"p50": 20.0, "p95": 29.0, "p99": 29.8}
    assert stats["stages_ms"] == {"encode": {"p50": 1.0, "p95": 1.0}, "unet": {"p50": 3.0, "p95": 3.9}}
    assert (stats["frames_in"], stats["frames_out"], stats["dropped"], stats["size"]) == (3, 3, 2, "512x288")
    assert json.loads(json.dumps(stats)) == stats


def test_a_meter_that_saw_nothing_reports_zeros() -> None:
    stats = Meter().stats({}, (64, 48))
    assert stats["fps"] == 0.0
    assert stats["latency_ms"] == {"p50": 0.0, "p95": 0.0, "p99": 0.0}


def test_without_a_terminal_a_plain_line_comes_every_few_seconds() -> None:
    clock, out = FakeClock(), io.StringIO()
    with Status(total=300, out=out, clock=clock) as status:
        for _ in range(100):
            clock.advance(PLAIN_EVERY / 40)
            status.show(metered([10.0] * 3), "reconnecting")
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("3/300 frames · reconnecting")
    assert "\x1b" not in out.getvalue()


def test_a_quiet_status_says_nothing() -> None:
    clock, out = FakeClock(), io.StringIO()
    with Status(quiet=True, out=out, clock=clock) as status:
        clock.advance(PLAIN_EVERY * 2)
        status.show(Meter(), "running")
    assert out.getvalue() == ""
