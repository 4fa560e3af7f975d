"""Durations counted in buckets since the start: what Prometheus can add up over time and over servers."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

BOUNDS_MS = (1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 25.0, 33.0, 50.0, 75.0, 100.0, 150.0, 250.0, 500.0, 1000.0, 2500.0)


@dataclass(slots=True)
class Histogram:
    """`counts[i]` durations were at most `bounds_ms[i]` and longer than the bound before; the last count has no bound.

    >>> histogram = Histogram((10.0, 20.0)); histogram.add(10.0); histogram.add(99.0); histogram.counts
    [1, 0, 1]
    """

    bounds_ms: tuple[float, ...] = BOUNDS_MS
    counts: list[int] = field(default_factory=list)
    sum_ms: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds_ms) + 1)

    def add(self, ms: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds_ms, ms)] += 1
        self.sum_ms += ms

    def copy(self) -> Histogram:
        """One that does not change any more."""
        return Histogram(self.bounds_ms, list(self.counts), self.sum_ms)
