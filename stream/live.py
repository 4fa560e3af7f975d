"""One named live stream: at most one source at a time, any number of outputs, and always a picture to show."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, Protocol

import cv2
import numpy as np

from accel.errors import UserError
from models.params import Params
from stream.config import flatten, patched
from stream.fit import round_size
from stream.frame import Frame
from stream.levels import Controller, ladder
from stream.mailbox import Fanout, Mailbox
from stream.meter import Meter
from stream.pump import Epoch
from stream.session import Clock, Session, Shared
from stream.sink import Sink, SinkClosed
from stream.slate import slate
from stream.sound import Sound
from stream.source import HEALTHY_S, Size, Source, SourceChanged, SourceLost, retry_delays

if TYPE_CHECKING:
    from models.stylizer import Stylizer
    from stream.worker import Worker

log = logging.getLogger(__name__)

Phase = Literal["waiting", "loading", "live", "reconnecting", "stalled", "failed", "ended"]
Opener = Callable[[Size | None, str], Source]  # (box, fit): `stream.source.open_source` without its URL

SLATE_AFTER_S = 0.7  # without a picture for so long, a slate is shown
RESTARTS = 3  # times that a model which raises is started again within…
RESTARTS_S = 60.0
RECORDER_ROOM = 60  # frames that an output which must not lose any may lag behind
SHAPE = 0.05  # pictures whose aspect differs by more cannot be scaled to each other
NOTES = 8  # of the newest, kept for the status


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a stream, in words."""

    stream: str
    kind: Literal["phase", "params", "source", "sink", "note", "error", "level"]
    text: str
    at: float  # time.time(), s
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Engineering:
    """What a session is built for; another one is another session."""

    model: str
    size: Size
    window: int
    refresh: int


class House(Protocol):
    """What the streams of one server share."""

    worker: Worker
    loader: ThreadPoolExecutor
    clock: Clock
    engine: str

    def stylizer(self, build: Engineering, say: Callable[[str], None]) -> Stylizer: ...
    def announce(self, event: Event) -> None: ...


class Feed:
    """One source of a stream, from `feed` until it ends or another takes its place."""

    def __init__(self, label: str, retry: bool, since: float) -> None:
        self.label = label
        self.retry = retry
        self.since = since  # s, the stream's clock
        self.lost = ""  # why it is away, while it is
        self.ended = threading.Event()
        self.source: Source | None = None

    def end(self) -> None:
        """Read no further; the reader thread ends at its next picture or time-out."""
        self.ended.set()
        if self.source is not None:
            self.source.close()


class Attached(threading.Thread):
    """The thread of one output: newest frame, write; closes the sink whatever happens."""

    def __init__(self, stream: Stream, sink: Sink, box: Mailbox[Frame]) -> None:
        super().__init__(name=f"output-{stream.name}", daemon=True)
        self.stream = stream
        self.sink = sink
        self.box = box
        self.error: Exception | None = None

    def run(self) -> None:
        """Write until stopped, or until the sink breaks: that ends this output alone."""
        for part in (self._write, self.sink.close):
            try:
                part()
            except SinkClosed:
                pass
            except Exception as error:  # noqa: BLE001 the isolation point of an output: the stream goes on
                self.error = self.error or error
            self.box.close(discard=True)
        if self.error is not None:
            if not isinstance(self.error, UserError):
                log.error("an output of %s broke", self.stream.name, exc_info=self.error)
            self.stream.say("sink", f"an output ended: {self.error}")

    def stop(self) -> None:
        """Take in nothing more; what is there is still written."""
        self.box.close()

    def _write(self) -> None:
        for frame in self.box:
            self.sink.write(frame)


class Stream:
    """A named live stream. Its outlets, meter and clock outlive every source and every session of the worker.

    Thread-safe. Sources are read in a thread each; models are loaded in the house's loader while a slate is shown.
    """

    def __init__(self, name: str, params: Params, model: str, box: Size, house: House, stall_s: float) -> None:
        self.name = name
        self.params = params
        self.model = model
        self.size = box  # (width, height) of what comes out; another when a source of another shape comes
        self.fps = 30.0
        self.meter = Meter()
        self.outlets = Fanout[Frame]()
        self.originals = Fanout[Frame]()
        self.sound = Fanout[Sound]()
        self.viewers = 0
        self.reconnects = 0
        self.feeding: Feed | None = None
        self.error: str | None = None
        self.notes: deque[str] = deque(maxlen=NOTES)
        self.outputs: list[Attached] = []
        self._box, self._house, self._stall_s, self._clock = box, house, stall_s, house.clock
        self._shared = Shared(self.outlets, self.meter)
        self._lock = threading.RLock()
        self._epoch = Epoch()
        self._session: Session | None = None
        self._built: Engineering | None = None  # what the session was built for
        self._building: Engineering | None = None
        self._failed: Engineering | None = None  # not tried again until something is changed
        self._failures: deque[float] = deque(maxlen=RESTARTS)
        self._info: Mapping[str, Any] = {}
        self._controller = Controller()
        self._level = ladder(params)[0]
        self._phase: Phase = "waiting"
        self._card: tuple[object, Any] = (None, None)
        self._slates = count()

    # sources

    def feed(self, open: Opener, label: str, *, retry: bool) -> Feed:
        """Take this source from now on; the one before is ended. `retry`: open it again for ever when it breaks off."""
        feed = Feed(label, retry, self._clock())
        with self._lock:
            old, self.feeding = self.feeding, feed
            self._forgive()
        if old is not None:
            old.end()
        self.say("source", f"source: {label}")
        threading.Thread(target=self._follow, args=(feed, open), name=f"reader-{self.name}", daemon=True).start()
        return feed

    def unfeed(self, feed: Feed | None = None) -> None:
        """End the source; given one, only while it is still that."""
        with self._lock:
            going = self.feeding
            if going is None or (feed is not None and going is not feed):
                return
            self.feeding = None
        going.end()
        self.say("source", f"{going.label} is gone")

    def _follow(self, feed: Feed, open: Opener) -> None:
        """The reader thread: open, read, and open again after what `retry_delays` says."""
        patience = retry_delays()
        while not feed.ended.is_set():
            opened = self._clock()
            try:
                self._read(feed, open)
                feed.lost = "it ended"
            except SourceChanged:
                continue
            except (SourceLost, UserError) as error:
                feed.lost = str(error)
            except Exception:  # a bug of one source must not take the stream with it
                log.exception("the source of %s broke", self.name)
                feed.lost = "an internal error, see the log"
            if not feed.retry or feed.ended.is_set():
                break
            if self._clock() - opened >= HEALTHY_S:
                patience = retry_delays()
            self.reconnects += 1
            self.say("source", f"{feed.label}: {feed.lost}; trying again")
            feed.ended.wait(next(patience))
        self.unfeed(feed)

    def _read(self, feed: Feed, open: Opener) -> None:
        source = open(self._box, self.params.frame.fit)
        try:
            with self._lock:
                feed.source = source
                if feed.ended.is_set():
                    return
                self._epoch.end()
                self.fps = source.spec.fps or self.fps
            if hasattr(source, "sound"):
                source.sound = self.sound.put
            for frame in source.frames():
                if feed.ended.is_set():
                    return
                feed.lost = ""
                self._take(frame)
        finally:
            source.close()

    def _take(self, frame: Frame) -> None:
        """One captured picture: to whoever wants it as it is, and to the worker."""
        last = self._epoch.last
        frame = self._epoch.carry(frame)
        missed = frame.seq - last.seq - 1 if last else 0
        self._epoch.last = frame
        self.meter.frame_in(1 + missed)
        self.meter.drop(missed)
        self.originals.put(frame)
        session = self._ready(frame)
        if session is not None and self._built is not None:
            width, height = self._built.size
            if frame.image.shape[:2] != (height, width):
                smaller = cv2.resize(frame.image, (width, height), interpolation=cv2.INTER_AREA)
                frame = replace(frame, image=np.asarray(smaller, np.uint8))
            session.inbox.put(frame)

    # sessions

    def _ready(self, frame: Frame) -> Session | None:
        """The session that takes this picture; None while one is being made."""
        height, width = frame.image.shape[:2]
        temporal = self.params.temporal
        size = round_size(width * self._level.scale, height * self._level.scale)
        wanted = Engineering(self.model, size, temporal.window, temporal.refresh)
        with self._lock:
            session = self._session
            if session is not None and session.error is not None:
                self._broke(session.error)
                session = None
            if session is not None and self._built is not None:
                built_width, built_height = self._built.size
                if abs(built_width / built_height - width / height) > SHAPE:
                    session.stop()
                    session = self._session = self._built = None
            if session is None or self._built != wanted:
                self._build(wanted)
        return session

    def _build(self, wanted: Engineering) -> None:
        if wanted in (self._building, self._failed):
            return
        self._building = wanted
        self._house.loader.submit(self._prepare, wanted)

    def _prepare(self, wanted: Engineering) -> None:
        """In the loader's thread: a stylizer and a session for it, which takes the place of the one before."""
        try:
            stylizer = self._house.stylizer(wanted, self._note)
            session = self._house.worker.open(
                self._effective(), True, fps=self.fps, stylizer=stylizer, shared=self._shared
            )
        except Exception as error:  # whatever loading a model raises is this stream's failure alone
            if not isinstance(error, UserError):
                log.error("%s cannot be prepared for %s", wanted.model, self.name, exc_info=error)
            with self._lock:
                self._building, self._failed = None, wanted
                self.error = f"{wanted.model} cannot be prepared: {error or type(error).__name__}"
            self.say("error", self.error)
            return
        with self._lock:
            old, self._session = self._session, session
            self._built, self._building = wanted, None
            self.size = wanted.size
            self._info = getattr(stylizer, "info", {})
            self.error = None
            closed = self._phase == "ended"
        if old is not None:
            old.stop()
        if closed:
            session.stop()
        elif advice := stylizer.advice(self.params):
            self._note(advice)

    def _broke(self, error: Exception) -> None:
        """A session failed: another is made, unless that has happened too often."""
        now = self._clock()
        if isinstance(error, UserError):
            text = str(error)
        else:
            text = f"the model failed: {error or type(error).__name__}"
            log.error("a session of %s failed", self.name, exc_info=error)
        often = len(self._failures) == RESTARTS and now - self._failures[0] < RESTARTS_S
        self._failures.append(now)
        self._failed = self._built if often else None
        self._session = self._built = None
        if often:
            self.error = text
        self.say("error", text if often else f"{text}; starting it again")

    def _forgive(self) -> None:
        """Something was changed: what failed may be tried again."""
        self._failed = None
        self._failures.clear()
        self.error = None

    def _effective(self) -> Params:
        """The user's settings with what the level takes from them."""
        return patched(self.params, self._level.settings) if self._level.settings else self.params

    # settings and outputs

    def patch(self, changes: Mapping[str, Any]) -> Params:
        """Change settings, from the next picture on; UserError on a bad one, and nothing is changed then."""
        params = patched(self.params, changes)
        if params.temporal.flow != self.params.temporal.flow:
            from models.flow import flow_estimator

            flow_estimator(params.temporal.flow)  # what it lacks is said to whoever asks for it
        with self._lock:
            self.params = params
            self._level = self._current_level()
            self._forgive()
            if self._session is not None:
                self._session.params = self._effective()
        self.say("params", ", ".join(f"{key} = {value}" for key, value in changes.items()), dict(changes))
        return params

    def swap(self, model: str) -> None:
        """Another model from as soon as it is loaded; the present one goes on until then."""
        with self._lock:
            self.model = model
            self._forgive()

    def attach(self, sink: Sink, *, lossless: bool = False) -> Attached:
        """Write what comes out to `sink`, in a thread of its own. `lossless`: rather late than with a gap."""
        room = RECORDER_ROOM if lossless else 1
        output = Attached(self, sink, self.outlets.subscribe(room))
        with self._lock:
            self.outputs = [*(other for other in self.outputs if other.is_alive()), output]
        output.start()
        return output

    # state

    @property
    def phase(self) -> Phase:
        """What this stream is doing now."""
        feed = self.feeding
        if self._phase == "ended":
            return "ended"
        if feed is None:
            return "waiting"
        if self.error is not None:
            return "failed"
        if feed.lost:
            return "reconnecting"
        if self._epoch.last is None or self._epoch.last.captured < feed.since:
            return "waiting"
        if self._session is None:
            return "loading"
        idle = self.meter.idle(self._clock())
        return "live" if idle < self._stall_s else "stalled" if self.meter.frames_out else "loading"

    def words(self) -> str:
        """The phase as a sentence for people."""
        now, feed, phase = self._clock(), self.feeding, self.phase
        if phase == "live":
            level = f", {self._level.words}" if self._controller.level else ""
            return f"live: {self.meter.recent_fps(now):.1f} fps, {self.meter.recent_latency_ms(50):.0f} ms{level}"
        building = self._building
        return {
            "waiting": f"waiting for the first picture of {feed.label}" if feed else "waiting for a camera",
            "loading": f"preparing {self.model}" + (" for {}x{}".format(*building.size) if building else ""),
            "reconnecting": f"reconnecting to {feed.label}: {feed.lost}" if feed else "reconnecting",
            "stalled": f"no picture for {self.meter.idle(now):.0f} s",
            "failed": self.error or "failed",
            "ended": "ended",
        }[phase]

    def status(self) -> dict[str, Any]:
        """Everything there is to say about the stream, ready for JSON."""
        now, feed = self._clock(), self.feeding
        stats = self.meter.stats(self._info, self.size)
        return {
            "name": self.name,
            "phase": self.phase,
            "words": self.words(),
            "progress": None,
            "source": {"label": feed.label, "since": round(now - feed.since, 1), "retry": feed.retry} if feed else None,
            "size": list(self.size),
            "model": self.model,
            "engine": stats["engine"],
            "device": stats["device"],
            "fps": round(self.meter.recent_fps(now), 2),
            "style_fps": round(self.meter.recent_style_fps(now), 2),
            **{key: stats[key] for key in ("latency_ms", "stages_ms", "frames_in", "frames_out", "dropped")},
            "reconnects": self.reconnects,
            "viewers": self.viewers,
            "level": {"step": self._controller.level, "words": self._level.words},
            "params": flatten(self.params.model_dump()),
            "notes": list(self.notes),
            "error": self.error,
        }

    def turn_ms(self) -> float:
        """What one frame lately took of the worker; 0 while it does nothing."""
        session = self._session
        return session.turn_ms if session is not None and self.phase == "live" else 0.0

    def tick(self) -> None:
        """A few times a second, by the hub: tells phases, shows the slate, holds the latency."""
        phase = self.phase
        with self._lock:
            changed = phase != self._phase and self._phase != "ended"
            if changed:
                self._phase = phase
        if changed:
            self.say("phase", self.words(), {"phase": phase})
        if phase == "live":
            self._hold_latency()
        if phase != "live" and len(self.outlets) and self.meter.idle(self._clock()) > SLATE_AFTER_S:
            self.outlets.put(self._slate())

    def close(self) -> None:
        """End the source, the session and every output; blocks until their files are closed."""
        with self._lock:
            self._phase = "ended"
            session, outputs = self._session, self.outputs
        self.unfeed()
        if session is not None:
            session.stop()
            session.join(5.0)
        for fanout in (self.outlets, self.originals, self.sound):
            fanout.close()
        for output in outputs:
            output.join(10.0)
        self.say("phase", "ended", {"phase": "ended"})

    def say(self, kind: Any, text: str, data: Mapping[str, Any] | None = None) -> None:
        """Tell whoever listens."""
        self._house.announce(Event(self.name, kind, text, time.time(), data or {}))

    def _note(self, line: str) -> None:
        self.notes.append(line)
        self.say("note", line)

    def _current_level(self) -> Any:
        levels = ladder(self.params)
        self._controller.level = min(self._controller.level, len(levels) - 1)
        return levels[self._controller.level]

    def _hold_latency(self) -> None:
        before = self._controller.level
        self._controller.observe(
            self._clock(),
            self.meter.recent_latency_ms(95),
            target_ms=self.params.temporal.latency_ms,
            top=len(ladder(self.params)) - 1,
        )
        if self._controller.level != before:
            with self._lock:
                self._level = self._current_level()
                if self._session is not None:
                    self._session.params = self._effective()
            self.say("level", f"to hold {self.params.temporal.latency_ms:.0f} ms: {self._level.words}")

    def _slate(self) -> Frame:
        """A still with the state in words, over the newest picture; drawn anew only when it changes."""
        now, last, phase = self._clock(), self._epoch.last, self.phase
        words = self.words() if phase != "stalled" else "no picture from the camera"
        key = (words, self.size, last.seq if last else None)
        if self._card[0] != key:
            self._card = key, slate(self.size, words, last.image if last else None)
        pts = last.pts + int((now - last.captured) * 1e6) if last else next(self._slates) * 200_000
        return Frame(self._card[1], pts, last.seq if last else 0, now)
