"""What a person sees while a stream runs: one line, or a progress bar with fps and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from stream.meter import Meter

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_EVERY = 5.0  # s between two lines where no terminal shows them


def line(meter: Meter, phase: str, now: float) -> str:
    """Rates, latency and drops in one line."""
    parts = [
        f"{meter.recent_fps(now):.1f} fps",
        f"latency {meter.latency_ms(50):.0f} ms",
        f"{meter.dropped} dropped",
        f"style {meter.recent_style_fps(now):.1f}/s",
    ]
    return " · ".join(parts if phase == "running" else [phase, *parts])


class Status:
    """Shows a meter on stderr: a bar or a live line on a terminal, a plain line now and then elsewhere.

    >>> with Status(total=300) as status:
    ...     status.show(session.meter, session.phase)
    """

    def __init__(
        self,
        total: int | None = None,
        *,
        quiet: bool = False,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.quiet = quiet
        self.out = out or sys.stderr
        self.clock = clock
        self._next_line = clock() + PLAIN_EVERY
        self._progress: Progress | None = None
        if not quiet and self.out.isatty():
            self._progress = _progress(self.out, total)
            self._task = self._progress.add_task("starting", total=total)

    def __enter__(self) -> Status:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._progress:
            self._progress.stop()

    def show(self, meter: Meter, phase: str) -> None:
        """Bring what is shown up to date; call it a few times a second."""
        now = self.clock()
        if self._progress:
            self._progress.update(self._task, completed=meter.frames_out, description=line(meter, phase, now))
        elif not self.quiet and now >= self._next_line:
            self._next_line = now + PLAIN_EVERY
            of = f"/{self.total}" if self.total else ""
            print(f"{meter.frames_out}{of} frames · {line(meter, phase, now)}", file=self.out, flush=True)


def _progress(out: TextIO, total: int | None) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.description}")
    if total:
        columns = (MofNCompleteColumn(), BarColumn(bar_width=24), TimeRemainingColumn(compact=True), text)
        return Progress(*columns, console=Console(file=out), refresh_per_second=4)
    return Progress(SpinnerColumn(), text, console=Console(file=out), refresh_per_second=4)
