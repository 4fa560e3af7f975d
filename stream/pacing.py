"""When a recorded picture is due: pure timing, the time is always an argument."""

from __future__ import annotations


def due(pts: int, first_pts: int, started: float) -> float:
    """The clock time in s at which a picture of `pts` µs shows, where one of `first_pts` µs showed at `started`.

    >>> due(1_040_000, 1_000_000, started=7.0)
    7.04
    """
    return started + (pts - first_pts) * 1e-6


def wait(pts: int, first_pts: int, started: float, now: float) -> float:
    """How long in s to hold a picture back; 0 when it is late.

    >>> wait(1_000_000, 0, started=7.0, now=9.0)
    0.0
    """
    return max(0.0, due(pts, first_pts, started) - now)
