"""The thread in which sound waits for its pictures."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from stream.sound import PIECE_S, Delay, Sound

QUIET_S = 2.0  # without any sound for so long, not even silence is given out
LOOK_S = 0.5  # how often a play-out looks at the latency


class Playout(threading.Thread):
    """Gives out what it hears when it is due, in a thread of its own that rests while there is no sound.

    `latency` tells in s how late pictures leave (their p95); it is asked twice a second. `close` ends it.

    >>> playout = Playout(stream.sound.put, lambda: stream.meter.latency_ms(95) / 1000)
    >>> playout.start(); source.sound = playout.hear
    """

    def __init__(self, out: Callable[[Sound], None], latency: Callable[[], float]) -> None:
        super().__init__(name="sound", daemon=True)
        self.delay = Delay()
        self._out, self._latency = out, latency
        self._heard = deque[Sound](maxlen=100)  # 2 s
        self._came = threading.Condition()
        self._ended = False

    def hear(self, sound: Sound) -> None:
        """Take 20 ms of sound, from any thread."""
        with self._came:
            self._heard.append(sound)
            self._came.notify()

    def close(self) -> None:
        """Give nothing out any more."""
        with self._came:
            self._ended = True
            self._came.notify()

    def run(self) -> None:
        """Every 20 ms, what is due."""
        latency, looked, last = 0.0, float("-inf"), float("-inf")
        while True:
            now = time.monotonic()
            with self._came:
                resting = now - last > QUIET_S
                self._came.wait_for(lambda: self._heard or self._ended, None if resting else PIECE_S)
                if self._ended:
                    return
                heard = [self._heard.popleft() for _ in range(len(self._heard))]
            now = time.monotonic()
            for sound in heard:
                self.delay.put(sound)
                last = now
            if now - looked > LOOK_S:
                latency, looked = self._latency(), now
            for sound in self.delay.due(now, latency):
                self._out(sound)
