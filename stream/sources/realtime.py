"""A recording played at its own rate, as if it were live."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from stream import pacing
from stream.frame import Frame
from stream.source import Source


class Realtime:
    """Holds each frame of a recorded source back until its pts is due; late frames go out at once.

    `clock` and `sleep` (both in s) are for tests; the usual sleep ends early when the source is closed.
    """

    def __init__(
        self,
        source: Source,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._source = source
        self._clock = clock
        self._closed = threading.Event()
        self._sleep = sleep or self._closed.wait
        self.spec = replace(source.spec, live=True)
        self.warnings = source.warnings

    @property
    def skipped(self) -> int:
        """Pictures that could not be decoded."""
        return self._source.skipped

    def frames(self) -> Iterator[Frame]:
        """The source's frames, each when it is due; `captured` is the time it is handed out."""
        first: int | None = None
        started = 0.0
        for frame in self._source.frames():
            if first is None:
                first, started = frame.pts, self._clock()
            delay = pacing.wait(frame.pts, first, started, self._clock())
            if delay:
                self._sleep(delay)
            if self._closed.is_set():
                return
            yield replace(frame, captured=self._clock())

    def close(self) -> None:
        """Wake a waiting reader and close the recording."""
        self._closed.set()
        self._source.close()
