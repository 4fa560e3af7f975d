"""Holding a stated latency: what is given up, in which order, and when it is taken back. Pure; the time comes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.params import Params

DOWN_AFTER_S = 2.0  # over the target for so long: one step down
UP_AFTER_S = 10.0  # well under it for so long: one step back
ROOM = 0.7  # share of the target that counts as well under it
RELAPSE_S = 30.0  # a step back that lasted less was wrong: the next one waits twice as long
PATIENCE_S = 300.0  # and so on, up to this


@dataclass(frozen=True, slots=True)
class Level:
    """One way to run a stream: settings that take the place of the user's, and the share of the size."""

    words: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0


def ladder(params: Params) -> tuple[Level, ...]:
    """Everything that can be given up for speed under these settings, one thing more at each level.

    >>> [level.words for level in ladder(Params())]
    ['full quality', 'keys carried along', 'three quarters of the size', 'half the size']
    """
    levels = [Level("full quality")]
    changes: dict[str, Any] = {}
    if params.style.steps > 1:
        changes["style.steps"] = 1
        levels.append(Level("one step", dict(changes)))
    if params.temporal.mode != "reproject":
        changes["temporal.mode"] = "reproject"
        levels.append(Level("keys carried along", dict(changes)))
    levels.append(Level("three quarters of the size", dict(changes), 0.75))
    levels.append(Level("half the size", dict(changes), 0.5))
    return tuple(levels)


@dataclass(slots=True)
class Controller:
    """Chooses the level from the latency measured; one call of `observe` a second or so.

    >>> controller = Controller()
    >>> [controller.observe(now, 80.0, target_ms=50.0, top=3) for now in (0.0, 1.0, 2.0)]
    [0, 0, 1]
    """

    level: int = 0
    _since: float | None = None  # s, how long it has been as now: over, under or between
    _side: int = 0  # 1 over the target, -1 well under it
    _raised: float | None = None  # s, when quality was last taken back
    _patience: float = UP_AFTER_S

    def wait(self) -> None:
        """A level is not there yet: what is measured meanwhile does not count."""
        self._since = None

    def observe(self, now: float, p95_ms: float, *, target_ms: float, top: int) -> int:
        """The level to run at from now on, 0 … `top`; a target of 0 is none."""
        if not target_ms:
            self.level, self._side, self._since = 0, 0, None
            return 0
        side = 1 if p95_ms > target_ms else -1 if p95_ms < ROOM * target_ms else 0
        if side != self._side or self._since is None:
            self._side, self._since = side, now
        lasted = now - self._since
        if side > 0 and lasted >= DOWN_AFTER_S and self.level < top:
            if self._raised is not None and now - self._raised < RELAPSE_S:
                self._patience = min(2 * self._patience, PATIENCE_S)
            self.level, self._since = self.level + 1, now
        elif side < 0 and lasted >= self._patience and self.level:
            self.level, self._since, self._raised = self.level - 1, now, now
        return self.level
