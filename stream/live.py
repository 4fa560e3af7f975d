"""One named live stream: at most one source at a time, any number of outputs, and always a picture to show."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, Protocol

import av  # noqa: F401 before OpenCV: see stream/sources/screen.py

from models.params import Params
from stream import seat
from stream.config import flatten, moved, patched
from stream.feed import Feed, Opener
from stream.frame import Frame
from stream.levels import Controller, ladder
from stream.mailbox import Fanout
from stream.meter import Meter
from stream.output import Attached
from stream.playout import Playout
from stream.pump import Epoch
from stream.seat import Seat
from stream.session import Shared
from stream.sink import Sink
from stream.slate import slate
from stream.sound import Sound
from stream.source import Size, Source

Phase = Literal["waiting", "loading", "live", "reconnecting", "stalled", "failed", "ended"]

SLATE_AFTER_S = 0.7  # without a picture for so long, a slate is shown
RECORDER_ROOM = 60  # frames that an output which must not lose any may lag behind
EARS_ROOM = 100  # pieces of sound: 2 s
NOTES = 8  # of the newest, kept for the status


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a stream, in words."""

    stream: str
    kind: Literal["phase", "params", "source", "sink", "note", "error", "level"]
    text: str
    at: float  # time.time(), s
    data: Mapping[str, Any] = field(default_factory=dict)


class House(seat.House, Protocol):
    """What the streams of one server share."""

    def announce(self, event: Event) -> None: ...


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
        self.heard = Fanout[Sound]()  # sound as it comes in
        self.sound = Fanout[Sound]()  # the same, held back until the pictures of its time leave
        self.viewers = 0
        self.transient = False  # made for a publisher: forgotten when nobody has used it for a while
        self.reconnects = 0
        self.feeding: Feed | None = None
        self.notes: deque[str] = deque(maxlen=NOTES)
        self.outputs: list[Attached] = []
        self._box, self._house, self._stall_s, self._clock = box, house, stall_s, house.clock
        self._lock = threading.RLock()
        self._epoch = Epoch()
        self._seat = Seat(house, Shared(self.outlets, self.meter), self.say)
        self._seat.retune(params)
        self._controller = Controller()
        self._level = ladder(params)[0]
        self._phase: Phase = "waiting"
        self._card: tuple[object, Any] = (None, None)
        self._slates = count()
        self._playout = Playout(self.sound.put, lambda: self.meter.recent_latency_ms(95) / 1000)
        self._playout.start()
        self._used = house.clock()  # s, when it last had a source, a viewer or an output

    # sources

    def feed(self, open: Opener, label: str, *, retry: bool) -> Feed:
        """Take this source from now on; the one before is ended. `retry`: open it again for ever when it breaks off."""
        feed = Feed(self, open, label, retry=retry, clock=self._clock)
        with self._lock:
            old, self.feeding = self.feeding, feed
            self._seat.forgive()
        if old is not None:
            old.end()
        self.say("source", f"source: {label}")
        feed.start()
        return feed

    def unfeed(self, feed: Feed | None = None) -> bool:
        """End the source; given one, only while it is still that. Whether there was one to end."""
        with self._lock:
            going = self.feeding
            if going is None or (feed is not None and going is not feed):
                return False
            self.feeding = None
        going.end()
        self.say("source", f"{going.label} is gone")
        return True

    def opening(self) -> tuple[Size, str]:
        """The box and the fit that a source is to be opened with."""
        return self._box, self.params.frame.fit

    def begin(self, source: Source) -> None:
        """A source is open: its pictures go on where those before ended."""
        self._epoch.end()
        self.fps = source.spec.fps or self.fps
        if hasattr(source, "sound"):
            source.sound = self.hear

    def hear(self, sound: Sound) -> None:
        """20 ms of sound of the source."""
        self.heard.put(sound)
        self._playout.hear(sound)

    def take(self, frame: Frame) -> None:
        """One captured picture: to whoever wants it as it is, and to the worker."""
        frame, missed = self._epoch.carry(frame)
        self.meter.frame_in(1 + missed)
        self.meter.drop(missed)
        self.originals.put(frame)
        self._seat.take(frame, self.model, self._level.scale, self.fps)
        self.size = self._seat.built.size if self._seat.built else self.size

    # settings and outputs

    def patch(self, changes: Mapping[str, Any]) -> Params:
        """Change settings, from the next picture on; UserError on a bad one, and nothing is changed then."""
        params = patched(self.params, changes)
        if params.temporal.flow != self.params.temporal.flow:
            from models.flow import flow_estimator

            flow_estimator(params.temporal.flow)  # what it lacks is said to whoever asks for it
        self._seat.prepare(params)  # here, so that no frame waits for a prompt to be read
        with self._lock:
            params = self.params = patched(self.params, changes)  # as they are by now
            self._level = self._current_level()
        self._seat.forgive()
        self._seat.retune(self._effective())
        self.say("params", ", ".join(f"{key} = {value}" for key, value in changes.items()), dict(changes))
        return params

    def swap(self, model: str) -> None:
        """Another model from as soon as it is loaded; the present one goes on until then.

        Settings that nobody has touched become those that it is best run with.
        """
        with self._lock:
            self.params, self.model = moved(self.params, self.model, model), model
            self._level = self._current_level()
        self._seat.forgive()
        self._seat.retune(self._effective())
        self.say("params", f"model: {model}", flatten(self.params.model_dump()))

    def attach(self, sink: Sink, *, lossless: bool = False) -> Attached:
        """Write what comes out to `sink`, in a thread of its own. `lossless`: rather late than with a gap."""
        room = RECORDER_ROOM if lossless else 1
        ears = self.heard.subscribe(EARS_ROOM) if hasattr(sink, "hear") else None
        output = Attached(self.name, sink, self.outlets.subscribe(room), lambda text: self.say("sink", text), ears)
        with self._lock:
            self.outputs = [*(other for other in self.outputs if other.is_alive()), output]
        output.start()
        return output

    def _effective(self) -> Params:
        """The user's settings with what the level takes from them."""
        return patched(self.params, self._level.settings) if self._level.settings else self.params

    # state

    @property
    def error(self) -> str | None:
        """Why nothing can be stylized, where that is so."""
        return self._seat.error

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
        if not self._seat.taken:
            return "loading"
        idle = self.meter.idle(self._clock())
        return "live" if idle < self._stall_s else "stalled" if self.meter.frames_out else "loading"

    def words(self) -> str:
        """The phase as a sentence for people."""
        now, feed, phase = self._clock(), self.feeding, self.phase
        if phase == "live":
            level = f", {self._level.words}" if self._controller.level else ""
            return f"live: {self.meter.recent_fps(now):.1f} fps, {self.meter.recent_latency_ms(50):.0f} ms{level}"
        preparing = f"preparing {self.model}"
        if building := self._seat.building:
            preparing += " for {}x{}".format(*building.size)
        if progress := self._seat.progress:
            preparing += f": compiling {progress[0]}, {progress[1]:.0%}"
        return {
            "waiting": f"waiting for the first picture of {feed.label}" if feed else "waiting for a camera",
            "loading": preparing,
            "reconnecting": f"reconnecting to {feed.label}: {feed.lost}" if feed else "reconnecting",
            "stalled": f"no picture for {self.meter.idle(now):.0f} s",
            "failed": self.error or "failed",
            "ended": "ended",
        }[phase]

    def status(self) -> dict[str, Any]:
        """Everything there is to say about the stream, ready for JSON."""
        now, feed = self._clock(), self.feeding
        stats = self.meter.stats(self._seat.info, self.size)
        return {
            "name": self.name,
            "phase": self.phase,
            "words": self.words(),
            "progress": self._seat.progress[1] if self._seat.progress else None,
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
        return self._seat.turn_ms if self.phase == "live" else 0.0

    def unused_s(self) -> float:
        """For how long it has had no source, no viewer and no output."""
        if self.feeding or self.viewers or any(output.is_alive() for output in self.outputs):
            self._used = self._clock()
        return self._clock() - self._used

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
            outputs = self.outputs
        self.unfeed()
        self._seat.close(5.0)
        self._playout.close()
        for fanout in (self.outlets, self.originals, self.heard, self.sound):
            fanout.close()
        for output in outputs:
            output.join(10.0)
        self.say("phase", "ended", {"phase": "ended"})

    def say(self, kind: Any, text: str, data: Mapping[str, Any] | None = None) -> None:
        """Tell whoever listens; notes are kept for the status too."""
        if kind == "note":
            self.notes.append(text)
        self._house.announce(Event(self.name, kind, text, time.time(), data or {}))

    def _current_level(self) -> Any:
        levels = ladder(self.params)
        self._controller.level = min(self._controller.level, len(levels) - 1)
        return levels[self._controller.level]

    def _hold_latency(self) -> None:
        if self._seat.building:  # what was last given up has not come to anything yet
            self._controller.wait()
            return
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
            self._seat.retune(self._effective())
            self.say("level", f"to hold {self.params.temporal.latency_ms:.0f} ms: {self._level.words}")

    def _slate(self) -> Frame:
        """A still with the state in words, over the newest picture; drawn anew only when it changes."""
        now, last, phase = self._clock(), self._epoch.last, self.phase
        words = self.words() if phase != "stalled" else "no picture from the camera"
        key = (words, self.size, last.seq if last else None)
        if self._card[0] != key:
            progress = self._seat.progress[1] if self._seat.progress else None
            self._card = key, slate(self.size, words, last.image if last else None, progress)
        pts = last.pts + int((now - last.captured) * 1e6) if last else next(self._slates) * 200_000
        return Frame(self._card[1], pts, last.seq if last else 0, now)
