"""Every live stream of a server, and the device they share."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accel.errors import UserError
from models.params import Params
from stream.live import Event, Stream
from stream.mailbox import Fanout
from stream.seat import Engineering, Progress, Say
from stream.session import Clock
from stream.worker import Worker

if TYPE_CHECKING:
    from models.stylizer import Stylizer

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
TICK_S = 0.2
KEPT = 4  # stylizers that stay loaded though no stream uses them
RETRY_AFTER_S = 5.0
FORGET_S = 120.0  # a stream made for a publisher, and then unused for so long, is removed


class Busy(Exception):
    """No more streams for now: what is running could not keep its promise. Worth asking again after `retry_after_s`."""

    def __init__(self, message: str, hint: str = "", retry_after_s: float = RETRY_AFTER_S) -> None:
        super().__init__(message)
        self.hint = hint
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """What new streams are like, and how many there may be."""

    model: str = "mini"
    engine: str = "auto"
    box: tuple[int, int] = (512, 288)  # (width, height) pictures are fitted into
    params: Params = field(default_factory=Params)
    max_streams: int = 8
    stall_s: float = 3.0  # live without a picture for so long is stalled
    batch: int | None = None  # streams whose frames share a launch; None = as many as pay on the device


def _load(model: str, size: tuple[int, int], engine: str, say: Callable[[str], None], **build: Any) -> Stylizer:
    from models.load import load

    return load(model, size, engine, say, **build)


class Hub:
    """Streams by name. Everything here is thread-safe and quick, but `close`.

    >>> hub = Hub(LiveSettings())
    >>> hub.open("cam").feed(partial(open_source, "rtsp://…"), "the door", retry=True)
    """

    def __init__(
        self, settings: LiveSettings, load: Callable[..., Any] = _load, *, clock: Clock = time.monotonic
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.events = Fanout[Event]()
        self.worker = Worker(clock=clock)
        self.loader = ThreadPoolExecutor(1, thread_name_prefix="loader")  # engines are built one at a time
        self._load = load
        self._streams: dict[str, Stream] = {}
        self._stylizers: dict[Engineering, Stylizer] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._attendant = threading.Thread(target=self._attend, name="attendant", daemon=True)
        self.worker.start()
        self._attendant.start()

    def open(
        self,
        name: str,
        *,
        params: Params | None = None,
        model: str | None = None,
        box: tuple[int, int] | None = None,
        transient: bool = False,
    ) -> Stream:
        """A new stream; a `transient` one is forgotten when nobody uses it any more.

        UserError for a bad name or one that exists; `Busy` when there is no room for it.
        """
        if not NAME.fullmatch(name):
            raise UserError(f"bad stream name: {name[:80]!r}", hint="1 to 64 letters, digits, - or _")
        settings = self.settings
        params = params or settings.params
        with self._lock:
            if name in self._streams:
                raise UserError(f"there is a stream {name} already", hint="choose another name, or remove it first")
            if self._closing.is_set() or len(self._streams) >= settings.max_streams:
                raise Busy(f"{len(self._streams)} streams are all this server takes", "remove one that is not used")
            self._admit(params)
            stream = Stream(name, params, model or settings.model, box or settings.box, self, settings.stall_s)
            stream.transient = transient
            self._streams[name] = stream
        return stream

    def get(self, name: str) -> Stream | None:
        """The stream of that name."""
        return self._streams.get(name)

    def streams(self) -> list[Stream]:
        """Every stream, oldest first."""
        return list(self._streams.values())

    def remove(self, name: str) -> bool:
        """End a stream and forget it; False when there is none. Blocks until its outputs are closed."""
        with self._lock:
            stream = self._streams.pop(name, None)
        if stream is None:
            return False
        stream.close()
        return True

    def close(self) -> None:
        """End every stream, then the threads; recordings are complete when this returns."""
        self._closing.set()
        self._attendant.join()
        for stream in self.streams():
            self.remove(stream.name)
        self.loader.shutdown(wait=False, cancel_futures=True)
        self.worker.close()
        self.events.close()

    @property
    def alive(self) -> bool:
        """Whether the worker and the attendant still run."""
        return self.worker.is_alive() and self._attendant.is_alive()

    def stylizer(self, build: Engineering, say: Say, progress: Progress) -> Stylizer:
        """The loaded model for a size; loads it in the caller's thread. For the streams."""
        with self._lock:
            found = self._stylizers.pop(build, None)
        if found is None:
            engine, structure = self.settings.engine, build.structure
            found = self._load(build.model, build.size, engine, say, structure=structure, progress=progress)
        elif found.width == 1:  # asked for again: others may share its launches, once there are engines for that
            self.loader.submit(self._widen, found, build)
        with self._lock:
            self._stylizers[build] = found  # the newest last
            while len(self._stylizers) > KEPT:
                del self._stylizers[next(iter(self._stylizers))]
        return found

    def _widen(self, stylizer: Stylizer, build: Engineering) -> None:
        """In the loader's thread, behind the session that it is for: frames go on meanwhile, one per launch."""
        try:
            stylizer.widen(self.settings.batch)
        except Exception as error:  # noqa: BLE001 whatever it is, streams go on as they were
            log.warning("%s: streams share no launches: %s", build.model, error)

    def announce(self, event: Event) -> None:
        """Hand an event to whoever listens."""
        self.events.put(event)

    def _admit(self, params: Params) -> None:
        """Busy where the frames of all streams, one after the other, would not be done within a stated latency."""
        turns = [turn for stream in self._streams.values() if (turn := stream.turn_ms())]
        targets = [stream.params.temporal.latency_ms for stream in self._streams.values() if stream.turn_ms()]
        stated = [target for target in (*targets, params.temporal.latency_ms) if target]
        expected = sum(turns) + max(turns, default=0.0)
        if stated and expected > min(stated):
            raise Busy(
                f"one more stream would make it {expected:.0f} ms, {min(stated):.0f} ms are promised",
                "try again when a stream has ended, or state a longer latency",
            )

    def _attend(self) -> None:
        while not self._closing.wait(TICK_S):
            for stream in tuple(self._streams.values()):
                try:
                    stream.tick()
                except Exception:  # a bug in one stream's care must not end that of the others
                    log.exception("looking after %s failed", stream.name)
                if stream.transient and stream.unused_s() > FORGET_S:
                    self.remove(stream.name)
