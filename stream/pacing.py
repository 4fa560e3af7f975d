"""When a recorded picture is due, and which pictures are diffused: pure timing, the time is always an argument."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from models.params import Temporal

Mode = Literal["every-frame", "cadence", "reproject"]

LEARNING = 0.2  # how much one measurement moves a cost
SLACK = 0.8  # share of the time allowed that every-frame must fit in to be gone back to


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


@dataclass(slots=True)
class Costs:
    """What diffusing a picture and the frame lane have lately taken, ms; 0 = not measured yet."""

    style_ms: float = 0.0
    lane_ms: float = 0.0

    def add_style(self, ms: float) -> None:
        self.style_ms = ms if not self.style_ms else self.style_ms + LEARNING * (ms - self.style_ms)

    def add_lane(self, ms: float) -> None:
        self.lane_ms = ms if not self.lane_ms else self.lane_ms + LEARNING * (ms - self.lane_ms)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which frames are diffused: each, every Nth, or as many as the device can."""

    mode: Mode = "every-frame"
    every: int = 1


def plan(temporal: Temporal, costs: Costs, before: Plan, *, live: bool, period_ms: float) -> Plan:
    """What the settings come to at these costs.

    `auto` diffuses every frame of a file, and of a live source while that fits between two frames (or in `latency_ms`,
    where that is more than 0 and less); else it reprojects. It goes back only when there is room to spare.

    >>> plan(Temporal(), Costs(style_ms=100.0), Plan(), live=True, period_ms=33.3).mode
    'reproject'
    """
    if temporal.mode == "reproject":
        return Plan("reproject")
    if temporal.mode == "cadence":
        return Plan("cadence", temporal.cadence or affordable(costs, before, period_ms))
    allowed = min(period_ms, temporal.latency_ms or period_ms)
    if temporal.mode == "every-frame" or not live or not costs.style_ms:
        return Plan()
    if before.mode == "reproject":
        allowed *= SLACK
    return Plan() if costs.style_ms <= allowed else Plan("reproject")


def affordable(costs: Costs, before: Plan, period_ms: float) -> int:
    """The least cadence whose diffusing and frame lane keep up with the source on average.

    >>> affordable(Costs(style_ms=100.0, lane_ms=8.0), Plan(), 33.0)
    4
    """
    if not costs.style_ms:
        return 1
    room = max(period_ms - costs.lane_ms, 1.0)
    every = math.ceil(costs.style_ms / room)
    if before.mode == "cadence" and every < before.every:  # less often diffused is left only with room to spare
        every = max(every, min(before.every, math.ceil(costs.style_ms / (SLACK * room))))
    return min(every, 60)
