"""One stream's life: settings, mailboxes, sinks, measurements, and how it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from models.params import Params
from stream.frame import Frame
from stream.mailbox import Fanout, Mailbox
from stream.meter import Meter
from stream.sink import Sink, SinkClosed

Clock = Callable[[], float]
Phase = Literal["running", "reconnecting", "ending", "ended", "failed"]

OUTLET_CAPACITY = 2  # frames a lossless sink may lag behind: one being encoded, one ready


@dataclass(frozen=True, slots=True)
class Shared:
    """What outlives a session: a live stream's outlets and meter, which sessions fill one after the other.

    Frames are counted as out when they reach the outlets, whether or not anybody looks.
    """

    outlets: Fanout[Frame]
    meter: Meter


class Session:
    """One stream through a worker. Every part of it runs under `isolate`, so what breaks here breaks nothing else.

    `params` may be replaced at any time by any thread; the worker reads it once per frame.
    `frames` ends the session after so many stylized pictures. `shared` outlets are not closed with it.
    """

    def __init__(
        self,
        id: str,
        params: Params,
        *,
        live: bool,
        frames: int | None = None,
        notify: Callable[[], None] | None = None,
        clock: Clock = time.monotonic,
        shared: Shared | None = None,
    ) -> None:
        self.id = id
        self.params = params
        self.live = live
        self.frames = frames
        self.clock = clock
        self.meter = shared.meter if shared else Meter()
        self.shared = shared
        self.turn_ms = 0.0  # what one turn of this session lately took of the worker
        self.inbox = Mailbox[Frame](1, lossless=not live, held=not live, notify=notify, on_drop=self.meter.drop)
        self.outlets = shared.outlets if shared else Fanout[Frame](notify)
        self.phase: Phase = "running"
        self.error: Exception | None = None
        self.stopping = threading.Event()  # the reader waits on it between two attempts to reconnect
        self.retired = threading.Event()  # the worker has let go of it
        self._writers: list[Writer] = []
        self._lock = threading.Lock()

    def attach(self, sink: Sink, *, lossless: bool) -> Writer:
        """Write every frame (or, live, the newest) to `sink` in a thread of its own, and close it at the end.

        The first one attached is the one whose frames, latencies and drops the meter counts.
        """
        first = not self._writers
        box = self.outlets.subscribe(
            OUTLET_CAPACITY if lossless else 1, lossless=lossless, on_drop=self.meter.drop if first else None
        )
        writer = Writer(self, sink, box, measured=first)
        self._writers.append(writer)
        writer.start()
        return writer

    def stop(self) -> None:
        """End cleanly: take in nothing more, let what is under way reach the sinks. Safe to repeat."""
        self.enter("ending")
        self.stopping.set()
        self.inbox.close()

    def fail(self, error: Exception) -> None:
        """End because of `error`; the first one is kept. Sinks still get what is under way and are closed."""
        with self._lock:
            if self.error is None:
                self.error = error
            self.phase = "failed"
        self.stop()

    def enter(self, phase: Phase) -> None:
        """Go to another phase; a session that is ending, over or failed never comes back."""
        order: tuple[Phase, ...] = ("running", "reconnecting", "ending", "ended", "failed")
        with self._lock:
            if order.index(self.phase) < 2 or order.index(phase) > order.index(self.phase):
                self.phase = phase

    def isolate(self, function: Callable[..., object], *arguments: Any) -> None:
        """Run a part of this session; whatever it raises ends this session alone."""
        try:
            function(*arguments)
        except Exception as error:  # noqa: BLE001 the one isolation point: any bug of a source, sink or model stops here
            self.fail(error)

    def retire(self) -> None:
        """The worker's last word: no more frames will come out."""
        self.inbox.close(discard=True)
        if not self.shared:
            self.outlets.close()
        self.enter("ended")
        self.retired.set()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the worker has let go and every sink is closed; False after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self.retired.wait(timeout):
            return False
        for writer in self._writers:
            writer.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not any(writer.is_alive() for writer in self._writers)


class Writer(threading.Thread):
    """The thread of one sink: get, measure, write; closes the sink whatever happens."""

    def __init__(self, session: Session, sink: Sink, box: Mailbox[Frame], *, measured: bool) -> None:
        super().__init__(name=f"writer-{session.id}", daemon=True)
        self.session = session
        self.sink = sink
        self.box = box
        self.measured = measured

    def run(self) -> None:
        """Write until the session ends, the viewer closes the window or the sink breaks."""
        self.session.isolate(self._write)
        self.box.close(discard=True)  # nobody takes from it any more: let go of a producer that waits for room
        self.session.isolate(self.sink.close)

    def _write(self) -> None:
        session, clock = self.session, self.session.clock
        try:
            for frame in self.box:
                started = clock()
                if self.measured:
                    session.meter.frame_out(started, frame.captured)
                self.sink.write(frame)
                if self.measured:
                    session.meter.stage("write", (clock() - started) * 1000)
        except SinkClosed:
            session.stop()
