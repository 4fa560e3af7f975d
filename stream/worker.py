"""The thread that owns the device: takes turns between sessions, runs commands between turns."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from accel.machine import trim_memory
from models.params import Params
from stream.clocks import Clocks, StyleLane
from stream.frame import Frame
from stream.gather import Asked, Device
from stream.pacing import LEARNING
from stream.session import Clock, Session, Shared

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from models.state import State
    from models.stylizer import Stylizer

R = TypeVar("R")

ACTIVE_S = 1.0  # a session whose last turn is longer ago takes no part of the device
GATHER_S = 0.002  # how long a frame waits at most for others that can share its launch


@dataclass(slots=True)
class _Lane:
    """A session and its stream memory, which only the worker thread touches."""

    session: Session
    clocks: Clocks
    state: State | None = None
    taken: deque[Frame] = field(default_factory=deque)  # whose pictures may still come, oldest first
    produced: int = 0
    last: float = 0.0  # s, its newest turn
    came: float = 0.0  # s, when its newest frame was captured
    due: float = 0.0  # s, when the next one will be, if they come as they did

    def poll(self) -> Frame | None:
        """A frame that can be worked on."""
        # Asking for room first keeps one slow file from holding up every other session.
        if self.session.error is not None or not self.session.outlets.has_room():
            return None
        frame = self.session.inbox.poll()
        if frame is not None:
            self.came, self.due = frame.captured, 2 * frame.captured - self.came
        return frame

    def shares(self, asked: Asked) -> bool:
        """Whether its next frame can share a launch with that picture."""
        stylizer = self.clocks.style.stylizer
        return self.clocks.asks and asked.company == (id(stylizer), stylizer.company(self.session.params))


@dataclass(slots=True)
class _Going:
    """A frame in work: its turn, as far as to the picture that it asks for; None when it is through, or failed."""

    lane: _Lane
    turn: Iterator[Asked]
    asked: Asked | None = None

    def go_on(self) -> None:
        """On to the next picture that it asks for; the one before has come to something."""
        self.asked = None
        self.lane.session.isolate(self._go_on)

    def _go_on(self) -> None:
        self.asked = next(self.turn, None)


class Worker(threading.Thread):
    """The only thread that calls the stylizer. Weights are shared, memory is per session, turns go round.

    Every session may bring a stylizer of its own; without one it gets the worker's. Sessions with the same one share
    its launches where it was widened, at most `batch` of them.

    >>> with Worker(stylizer) as worker:
    ...     session = worker.open(Params(), live=True)
    """

    def __init__(
        self, stylizer: Stylizer | None = None, *, clock: Clock = time.monotonic, batch: int | None = None
    ) -> None:
        super().__init__(name="worker", daemon=True)
        self.stylizer = stylizer
        self.clock = clock
        self._device = Device(batch)
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
        """Run waiting commands, then one frame of the next session that has one, and of those that share its launch.

        False when there was nothing.
        """
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
            if (frame := lane.poll()) is not None:
                self._play(lane, frame)
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

    def _play(self, lane: _Lane, frame: Frame) -> None:
        """One frame through its turn, with those of other sessions that can share its launch."""
        first = self._begun(lane, frame)
        all_going = [first]
        if first.asked and self._device.width(first.asked.stylizer) > 1:
            all_going += self._gathered(lane, first.asked)
        while asking := [(going, going.asked) for going in all_going if going.asked]:
            self._device.diffuse([asked for _, asked in asking])
            for going, _ in asking:
                going.go_on()

    def _begun(self, lane: _Lane, frame: Frame) -> _Going:
        going = _Going(lane, self._stylize(lane, frame))
        going.go_on()
        return going

    def _gathered(self, lane: _Lane, asked: Asked) -> list[_Going]:
        """Frames of other sessions for this launch: those that are there, or come within `GATHER_S` as they are due.

        Nothing is waited for while a session is at work that would be held up and gain nothing.
        """
        until, room = self.clock() + GATHER_S, self._device.width(asked.stylizer) - 1
        others = [other for other in self._lanes if other is not lane]
        sharing = [other for other in others if other.shares(asked)]
        strangers = any(until - other.last < ACTIVE_S for other in others if other not in sharing)
        found: list[_Going] = []
        while True:
            self._wake.clear()  # before looking, so that what comes while looking is seen
            for other in tuple(sharing):
                if len(found) < room and (frame := other.poll()) is not None:
                    sharing.remove(other)
                    self._lanes.remove(other)  # its turn is now: the next one comes when all others had theirs
                    self._lanes.append(other)
                    found.append(self._begun(other, frame))
            now = self.clock()
            due = any(abs(other.due - now) <= GATHER_S for other in sharing)
            if strangers or not due or now >= until or len(found) == room or not self._wake.wait(until - now):
                return found

    def _stylize(self, lane: _Lane, frame: Frame) -> Iterator[Asked]:
        session, started = lane.session, self.clock()
        lane.last = started
        lane.clocks.share = max(1, sum(started - other.last < ACTIVE_S for other in self._lanes))
        params = session.params  # once per frame: a change never lands in the middle of one
        if lane.state is None:
            lane.state = lane.clocks.style.stylizer.open(params)
        # Once the last network runs, the reader may fetch the next picture.
        turn = yield from lane.clocks.turn(lane.state, frame.image, params, session.inbox.release)
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
        sharing = turn.key.together if turn.key and turn.waited else 1  # whose turns this one's time was, too
        session.turn_ms += LEARNING * ((self.clock() - started) * 1000 / sharing - session.turn_ms)
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
