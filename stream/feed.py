"""One source of a live stream, read in a thread of its own, and opened again when it breaks off."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from accel.errors import UserError
from stream.frame import Frame
from stream.session import Clock
from stream.source import HEALTHY_S, Size, Source, SourceChanged, SourceLost, retry_delays

log = logging.getLogger(__name__)

AGAIN_S = 1.0  # a recording that is shorter is not played again at once

Opener = Callable[[Size | None, str], Source]  # (box, fit): `stream.source.open_source` without its URL


class Reading(Protocol):
    """What a feed's pictures are for."""

    reconnects: int

    def opening(self) -> tuple[Size, str]:
        """The box and the fit that a source is to be opened with."""
        ...

    def begin(self, source: Source) -> None:
        """A source is open: another epoch of pictures."""
        ...

    def take(self, frame: Frame) -> None: ...
    def say(self, kind: str, text: str) -> None: ...
    def unfeed(self, feed: Feed) -> bool: ...


class Feed(threading.Thread):
    """Reads until its source ends or it is ended, with `retry` for ever. After the last picture it unfeeds itself."""

    def __init__(self, stream: Reading, open: Opener, label: str, *, retry: bool, clock: Clock) -> None:
        super().__init__(name=f"reader-{label}", daemon=True)
        self.label = label
        self.retry = retry
        self.since = clock()  # s
        self.lost = ""  # why the source is away, while it is
        self._stream, self._open, self._clock = stream, open, clock
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._source: Source | None = None

    def run(self) -> None:
        """Open, read, and open again after what `retry_delays` says."""
        patience = retry_delays()
        while not self._over.is_set():
            opened = self._clock()
            try:
                self._read()
                if self.retry and self._clock() - opened >= AGAIN_S:  # a recording, which begins again
                    patience = retry_delays()
                    continue
                self.lost = "it ended"
            except SourceChanged:
                continue
            except (SourceLost, UserError) as error:
                self.lost = str(error)
            except Exception:  # a bug of one source must not take the stream with it
                log.exception("the source %s broke", self.label)
                self.lost = "an internal error, see the log"
            if not self.retry or self._over.is_set():
                break
            if self._clock() - opened >= HEALTHY_S:
                patience = retry_delays()
            self._stream.reconnects += 1
            self._stream.say("source", f"{self.label}: {self.lost}; trying again")
            self._over.wait(next(patience))
        self._stream.unfeed(self)

    def end(self) -> None:
        """Read no further; the thread ends at its next picture or time-out."""
        with self._lock:
            self._over.set()
            source = self._source
        if source is not None:
            source.close()

    def _read(self) -> None:
        source = self._open(*self._stream.opening())
        try:
            with self._lock:
                self._source = source
                if self._over.is_set():
                    return
            self._stream.begin(source)
            for frame in source.frames():
                if self._over.is_set():
                    return
                self.lost = ""
                self._stream.take(frame)
        finally:
            source.close()
