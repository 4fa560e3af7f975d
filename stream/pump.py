"""The reader thread's loop: source → inbox, opened again when it is lost. A live stream has `stream.feed` for that."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

from accel.errors import UserError
from stream.frame import Frame
from stream.session import Session
from stream.source import HEALTHY_S, Source, SourceLost, retry_delays

GAP_US = 1  # µs; pts of a new epoch are past the last one by at least this


def pump(
    open: Callable[[], Source],
    session: Session,
    *,
    first: Source | None = None,
    frames: int | None = None,
    wait: Callable[[float], bool] | None = None,
    delays: Callable[[], Iterator[float]] = retry_delays,
) -> None:
    """Feed the session until its source ends, it is stopped, or `frames` pictures were read; then close the inbox.

    A lost source is opened again after `delays()`; `seq` and `pts` go on rising across it. The first `open` is not
    retried: that failure is the user's. `first` is a source already opened. `wait(seconds)` is True when interrupted.
    """
    wait = wait or session.stopping.wait
    clock = session.clock
    epoch = Epoch()
    patience = delays()
    try:
        source = first or open()
        size = (source.spec.width, source.spec.height)
        while True:
            opened = clock()
            try:
                _check_size(source, size)
                session.enter("running")
                _read(source, session, epoch, frames)
                return
            except SourceLost as error:
                lost = error
            finally:
                source.close()
            if clock() - opened >= HEALTHY_S:
                patience = delays()
            epoch.end()
            session.enter("reconnecting")
            again = _reopen(open, patience, wait, lost)
            if again is None:
                return
            source = again
    finally:
        session.inbox.close()


def start_pump(
    open: Callable[[], Source], session: Session, *, first: Source | None = None, frames: int | None = None
) -> threading.Thread:
    """Run `pump` in a reader thread; what it raises becomes the session's error."""

    def read() -> None:
        session.isolate(lambda: pump(open, session, first=first, frames=frames))

    thread = threading.Thread(target=read, name=f"reader-{session.id}", daemon=True)
    thread.start()
    return thread


class Epoch:
    """Carries seq and pts across reconnections: each opening of a source starts its own at 0."""

    def __init__(self) -> None:
        self.last: Frame | None = None  # as handed on
        self.read = 0
        self._seq = 0
        self._pts = 0
        self._fresh = False

    def end(self) -> None:
        """The next frame starts a new epoch."""
        self._fresh = self.last is not None

    def carry(self, frame: Frame) -> tuple[Frame, int]:
        """The frame with its seq and pts in the session's count, and how many were captured and lost before it."""
        if self._fresh and self.last is not None:
            away = max(GAP_US, int((frame.captured - self.last.captured) * 1e6))
            self._seq = self.last.seq + 1 - frame.seq
            self._pts = self.last.pts + away - frame.pts
            self._fresh = False
        if self._seq or self._pts:
            frame = replace(frame, seq=frame.seq + self._seq, pts=frame.pts + self._pts)
        missed = frame.seq - self.last.seq - 1 if self.last else 0
        self.last = frame
        return frame, missed


def _reopen(
    open: Callable[[], Source], patience: Iterator[float], wait: Callable[[float], bool], lost: Exception
) -> Source | None:
    """Try until it opens; None when interrupted, the last failure when patience runs out."""
    for delay in patience:
        if wait(delay):
            return None
        try:
            return open()
        except (SourceLost, UserError) as error:
            lost = error
    raise lost


def _check_size(source: Source, size: tuple[int, int]) -> None:
    now = (source.spec.width, source.spec.height)
    if now != size:
        raise UserError(
            f"the source came back as {now[0]}x{now[1]}, it was {size[0]}x{size[1]}",
            hint="start again; --fit stretch keeps one size whatever comes",
        )


def _read(source: Source, session: Session, epoch: Epoch, frames: int | None) -> None:
    """One epoch. Lossless inboxes are waited for before a frame is pulled, so that queueing does not age it."""
    inbox, meter, clock = session.inbox, session.meter, session.clock
    pictures = iter(source.frames())
    while frames is None or epoch.read < frames:
        if inbox.lossless and not inbox.wait_room():
            return
        started = clock()
        frame = next(pictures, None)
        if frame is None:
            return
        if not session.live:  # a live source's next() is mostly waiting for light
            meter.stage("source", (clock() - started) * 1000)
        frame, missed = epoch.carry(frame)
        epoch.read += 1
        if not inbox.put(frame):
            return
        meter.frame_in(1 + missed)
        meter.drop(missed)  # captured, but lost before they reached us
