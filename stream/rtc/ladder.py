"""Which rung of the stream a viewer gets: pure rules over what its receiver reports, time as an argument.

A viewer that loses packets, or whose queue here runs over, goes a rung down by itself; nobody else notices. It comes
back up when the way has been clean for a while, and each attempt that fails makes the next one wait longer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SETTLE_S = 5.0  # on a new rung; until then estimates do not count: a browser's begins at some ten kb/s
DOWN_S = 3.0  # bad for so long: a rung down
UP_S = 10.0  # clean for so long: a rung up, at first
UP_MOST_S = 160.0
TRIAL_S = 20.0  # a rung left sooner than this after coming up to it was too high
LOSS_SOME = 0.02  # with this share of packets lost, a low estimate is believed
LOSS_MUCH = 0.10  # this much is bad whatever the estimate
LOSS_NONE = 0.01


@dataclass(frozen=True, slots=True)
class Report:
    """What was seen of one viewer since the last report."""

    loss: float  # share of packets lost on the way, 0 to 1
    estimate: int | None  # bits per second the receiver thinks it can take (REMB)
    bitrate: float  # bits per second that were sent to it; an estimate hardly exceeds them
    overflowed: bool  # its queue here ran over


@dataclass(frozen=True, slots=True)
class Place:
    """Where on the ladder a viewer stands; times in s."""

    rung: int = 0  # 0 is the best
    since: float = 0.0  # on this rung
    bad_since: float | None = None
    good_since: float | None = None
    risen: float | None = None  # when it last came up
    patience: float = UP_S  # how long it must be good before it goes up


def step(place: Place, report: Report, now: float, lowest: int) -> Place:
    """The place after a report; `lowest` is the last rung there is.

    >>> step(Place(rung=1, since=0.0, good_since=10.0), Report(0.0, None, 500_000, False), 21.0, 3).rung
    0
    """
    bad, good = _is_bad(report, settled=now - place.since >= SETTLE_S), _is_good(report)
    place = replace(
        place,
        bad_since=(now if place.bad_since is None else place.bad_since) if bad else None,
        good_since=(now if place.good_since is None else place.good_since) if good else None,
    )
    if place.bad_since is not None and now - place.bad_since >= DOWN_S and place.rung < lowest:
        failed = place.risen is not None and now - place.risen < TRIAL_S
        patience = min(place.patience * 2, UP_MOST_S) if failed else place.patience
        return Place(place.rung + 1, now, patience=patience)
    if place.good_since is not None and now - place.good_since >= place.patience and place.rung > 0:
        return Place(place.rung - 1, now, risen=now, patience=place.patience)
    if place.rung == 0 and now - place.since > UP_MOST_S:
        return replace(place, patience=UP_S)  # what went wrong is long ago
    return place


def _is_bad(report: Report, settled: bool) -> bool:
    low = settled and report.estimate is not None and report.estimate < 0.8 * report.bitrate
    return report.overflowed or report.loss > LOSS_MUCH or (low and report.loss > LOSS_SOME)


def _is_good(report: Report) -> bool:
    return not report.overflowed and report.loss < LOSS_NONE
