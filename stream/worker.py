"""The thread that owns the device: takes turns between sessions, runs commands between turns."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from accel.machine import trim_memory
from models.params import Params
from stream.clocks import Clocks, Device, StyleLane
from stream.frame import Frame
from stream.pacing import LEARNING
from stream.session import Clock, Session, Shared

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from models.stylizer import State, Stylizer

R = TypeVar("R")

ACTIVE_S = 1.0  # a session whose last turn is longer ago takes no part of the device


@dataclass(slots=True)
class _Lane:
    """A session and its stream memory, which only the worker thread touches."""

    session: Session
    clocks: Clocks
    state: State | None = None
    taken: deque[Frame] = field(default_factory=deque)  # whose pictures may still come, oldest first
    produced: int = 0
    last: float = 0.0  # s, its newest turn


class Worker(threading.Thread):
    """The only thread that calls the stylizer. Weights are shared, memory is per session, turns go round.

    Every session may bring a stylizer of its own; without one it gets the worker's.

    >>> with Worker(stylizer) as worker:
    ...     session = worker.open(Params(), live=True)
    """

    def __init__(self, stylizer: Stylizer | None = None, *, clock: Clock = time.monotonic) -> None:
        super().__init__(name="worker", daemon=True)
        self.stylizer = stylizer
        self.clock = clock
        self._device = Device()
        self._lanes: deque[_Lane] = deque()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._closing = False
        self._ids = itertools.count(1)

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def open(
        self,
        params: Params,
        live: bool,
        *,
        frames: int | None = None,
        fps: float = 30.0,
        stylizer: Stylizer | None = None,
        shared: Shared | None = None,
    ) -> Session:
        """A new session, at once; its memory is made in its first turn. Any thread may call this.

        `fps` is the source's nominal rate, `stylizer` another than the worker's own.
        """
        stylizer = stylizer or self.stylizer
        if stylizer is None:
            raise ValueError("a worker without a stylizer of its own needs one per session")
        session = Session(
            str(next(self._ids)),
            params,
            live=live,
            frames=frames,
            notify=self._wake.set,
            clock=self.clock,
            shared=shared,
        )
        clocks = Clocks(StyleLane(stylizer, self._device), live, 1000 / fps)
        self.call(lambda: self._lanes.append(_Lane(session, clocks)))
        return session

    def call(self, fn: Callable[[], R]) -> Future[R]:
        """Run `fn` on the worker thread between two turns; its result or exception comes in the future."""
        if self._closing:
            raise RuntimeError("the worker is closed")
        future: Future[R] = Future()
        self._commands.put(lambda: _settle(future, fn))
        self._wake.set()
        return future

    def turn(self) -> bool:
        """Run waiting commands, then one frame of the next session that has one; False when there was nothing."""
        worked = self._run_commands()
        for _ in range(len(self._lanes)):
            lane = self._lanes[0]
            session = lane.session
            if session.error is not None or session.inbox.drained:
                self._lanes.popleft()
                session.isolate(self._finish, lane)
                session.retire()
                trim_memory()
                return True
            self._lanes.rotate(-1)
            # Asking for room first keeps one slow file from holding up every other session.
            if session.outlets.has_room() and (frame := session.inbox.poll()) is not None:
                session.isolate(self._stylize, lane, frame)
                return True
        return worked

    def run(self) -> None:
        """Take turns until closed and every session is over."""
        try:
            while self._lanes or not self._closing or not self._commands.empty():
                self._wake.clear()  # before looking, so that what comes while looking is seen
                if self._closing:
                    for lane in self._lanes:
                        lane.session.stop()
                if not self.turn():
                    self._wake.wait()
        finally:
            for lane in self._lanes:
                lane.session.fail(RuntimeError("the worker thread ended"))
                lane.session.retire()
            self._device.close()

    def close(self, timeout: float | None = 10.0) -> bool:
        """End all sessions cleanly, then the thread; False if it still runs after `timeout` seconds."""
        self._closing = True
        self._wake.set()
        if self.ident is not None:
            self.join(timeout)
        return not self.is_alive()

    def _run_commands(self) -> bool:
        worked = False
        while not self._commands.empty():
            self._commands.get()()
            worked = True
        return worked

    def _stylize(self, lane: _Lane, frame: Frame) -> None:
        session, started = lane.session, self.clock()
        lane.last = started
        lane.clocks.share = max(1, sum(started - other.last < ACTIVE_S for other in self._lanes))
        params = session.params  # once per frame: a change never lands in the middle of one
        if lane.state is None:
            lane.state = lane.clocks.style.stylizer.open(params)
        # Once the last network runs, the reader may fetch the next picture.
        turn = lane.clocks.turn(lane.state, frame.image, params, session.inbox.release)
        if turn.key:
            session.meter.key(self.clock())
        lane.taken.append(frame)
        while len(lane.taken) > turn.ago + 1:  # another way of working has begun, which owes them nothing
            lane.taken.popleft()
            session.meter.drop()
        if turn.image is not None:
            self._deliver(lane, lane.taken.popleft(), turn.image)
        stages = dict(turn.stages_ms)
        if turn.key and turn.waited:
            stages |= turn.key.stages_ms
        elif turn.key:
            session.meter.stages(turn.key.stages_ms)  # of the style lane, beside this frame's own time
        stages["handover"] = max(0.0, (self.clock() - started) * 1000 - sum(stages.values()))
        session.meter.stages(stages)
        session.turn_ms += LEARNING * ((self.clock() - started) * 1000 - session.turn_ms)
        if session.frames is not None and lane.produced >= session.frames:
            session.inbox.close(discard=True)
            session.stop()

    def _deliver(self, lane: _Lane, frame: Frame, image: NDArray[np.uint8]) -> None:
        """The picture of a captured frame, to whoever looks."""
        lane.session.outlets.put(replace(frame, image=image))
        if lane.session.shared:
            lane.session.meter.frame_out(self.clock(), frame.captured)
        lane.produced += 1

    def _finish(self, lane: _Lane) -> None:
        """Deliver what a stream batch still holds when a session ends by itself."""
        if lane.state is None or lane.session.error is not None:
            return
        for image in lane.clocks.rest(lane.state):
            self._deliver(lane, lane.taken.popleft(), image)


def _settle(future: Future[R], fn: Callable[[], R]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(fn())
        except BaseException as error:  # noqa: BLE001 not swallowed: it belongs to whoever holds the future
            future.set_exception(error)
