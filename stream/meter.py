"""What a session measures of itself: rates, latency and stage percentiles, drops."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from stream.histogram import Histogram

SAMPLES = 4096  # the newest latencies, and the newest times of each stage, that percentiles are taken of
WINDOW = 64  # frames the sliding rate is taken over, at most
IDLE = 5.0  # s; a rate with nothing newer than this is 0


class Meter:
    """One session's counters, in bounded memory. Thread-safe; every time is an argument, in seconds.

    >>> meter = Meter(); meter.frame_in(); meter.frame_out(now=2.0, captured=1.9); meter.frames_out
    1
    """

    def __init__(self) -> None:
        self.frames_in = 0
        self.frames_out = 0
        self.dropped = 0
        self.keys = 0
        self._lock = threading.Lock()
        self._latencies: deque[float] = deque(maxlen=SAMPLES)  # ms
        self._stages: dict[str, deque[float]] = {}  # ms
        self._histograms: dict[str, Histogram] = {}  # stage → since the start; "" is the latency
        self._outs: deque[float] = deque(maxlen=WINDOW)  # s
        self._keys: deque[float] = deque(maxlen=WINDOW)  # s
        self._out_span = (0.0, 0.0)  # s, first and last frame out
        self._key_span = (0.0, 0.0)

    def frame_in(self, count: int = 1) -> None:
        """`count` pictures were captured."""
        with self._lock:
            self.frames_in += count

    def drop(self, count: int = 1) -> None:
        """`count` captured pictures will reach no sink."""
        with self._lock:
            self.dropped += count

    def key(self, now: float) -> None:
        """One picture was diffused."""
        with self._lock:
            self._key_span = (self._key_span[0] if self.keys else now, now)
            self.keys += 1
            self._keys.append(now)

    def frame_out(self, now: float, captured: float) -> None:
        """A picture captured at `captured` is handed to the sink."""
        with self._lock:
            self._out_span = (self._out_span[0] if self.frames_out else now, now)
            self.frames_out += 1
            self._outs.append(now)
            self._latencies.append((now - captured) * 1000)
            self._histograms.setdefault("", Histogram()).add((now - captured) * 1000)

    def stage(self, name: str, ms: float) -> None:
        """One frame spent `ms` milliseconds in the stage `name`."""
        self.stages({name: ms})

    def stages(self, times_ms: Mapping[str, float]) -> None:
        """One frame's milliseconds, by stage."""
        with self._lock:
            for name, ms in times_ms.items():
                self._stages.setdefault(name, deque(maxlen=SAMPLES)).append(ms)
                self._histograms.setdefault(name, Histogram()).add(ms)

    def fps(self) -> float:
        """Frames out per second, over the run."""
        with self._lock:
            return _rate(self.frames_out, self._out_span)

    def style_fps(self) -> float:
        """Diffused pictures per second, over the run."""
        with self._lock:
            return _rate(self.keys, self._key_span)

    def recent_fps(self, now: float) -> float:
        """Frames out per second, over the newest `WINDOW`; 0 when nothing came for `IDLE` seconds."""
        with self._lock:
            return _recent(self._outs, now)

    def recent_style_fps(self, now: float) -> float:
        """Diffused pictures per second, over the newest `WINDOW`."""
        with self._lock:
            return _recent(self._keys, now)

    def latency_ms(self, percent: float) -> float:
        """A percentile of capture → handed to the sink, in ms; 0 before the first frame out."""
        return percentiles(self.samples()[0], (percent,))[0]

    def recent_latency_ms(self, percent: float) -> float:
        """The same over the newest `WINDOW` frames."""
        with self._lock:
            newest = [self._latencies[i] for i in range(-min(WINDOW, len(self._latencies)), 0)]
        return percentiles(newest, (percent,))[0]

    def idle(self, now: float) -> float:
        """Seconds since the newest frame out; infinite before the first."""
        with self._lock:
            return now - self._outs[-1] if self._outs else math.inf

    def samples(self) -> tuple[list[float], dict[str, list[float]]]:
        """A copy of the newest latencies and stage times, in ms."""
        with self._lock:
            return list(self._latencies), {name: list(times) for name, times in self._stages.items()}

    def histograms(self) -> dict[str, Histogram]:
        """Every stage's times since the start, and under "" the latencies."""
        with self._lock:
            return {name: histogram.copy() for name, histogram in self._histograms.items()}

    def stats(self, info: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        """The `--stats` report. `info` tells model, engine, device and versions; `size` is (width, height)."""
        latencies, stages = self.samples()
        p50, p95, p99 = percentiles(latencies, (50, 95, 99))
        named = {name: percentiles(times, (50, 95)) for name, times in stages.items()}
        return {
            "frames_in": self.frames_in,
            "frames_out": self.frames_out,
            "dropped": self.dropped,
            "fps": round(self.fps(), 2),
            "latency_ms": {"p50": p50, "p95": p95, "p99": p99},
            "stages_ms": {name: {"p50": low, "p95": high} for name, (low, high) in named.items()},
            "style_fps": round(self.style_fps(), 2),
            "model": info.get("model"),
            "engine": info.get("engine"),
            "device": info.get("device"),
            "size": f"{size[0]}x{size[1]}",
            "versions": dict(info.get("versions", {})),
        }


def percentiles(values: list[float], percents: Iterable[float]) -> list[float]:
    """Percentiles, rounded to µs when in ms; zeros for no values."""
    if not values:
        return [0.0 for _ in percents]
    return [round(float(value), 3) for value in np.percentile(values, list(percents))]


def _rate(count: int, span: tuple[float, float]) -> float:
    seconds = span[1] - span[0]
    return (count - 1) / seconds if seconds > 0 else 0.0


def _recent(times: deque[float], now: float) -> float:
    if len(times) < 2 or now - times[-1] > IDLE or times[-1] <= times[0]:
        return 0.0
    # Up to now, not up to the newest frame: a stream that stalls is seen to slow down.
    per_frame = (times[-1] - times[0]) / (len(times) - 1)
    return (len(times) - 1) / (times[-1] - times[0] + max(0.0, now - times[-1] - per_frame))
