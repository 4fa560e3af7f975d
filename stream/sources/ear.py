"""The sound of a live source, decoded beside its pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import av
from av.audio.stream import AudioStream
from av.packet import Packet

from stream.sound import Cutter, Sound

STRAY_S = 0.3  # pictures whose time of capture strays further from their pts begin a new reckoning
FAR_S = 2.0  # sound further than this from its pictures is taken for captured when it came


class Ear:
    """Decodes the sound of a live source; its times of capture follow the pictures', so that lips match."""

    def __init__(self, stream: AudioStream, clock: Callable[[], float]) -> None:
        self.stream = stream
        self._clock = clock
        self._cutter = Cutter()
        self._zero: float | None = None  # time of capture of pts 0

    def seen(self, pts: float, captured: float) -> None:
        """A picture of `pts` s was captured."""
        zero = captured - pts
        if self._zero is None or abs(zero - self._zero) > STRAY_S:
            self._zero = zero
        self._zero += 0.05 * (zero - self._zero)

    def hear(self, packet: Packet[Any], sound: Callable[[Sound], None]) -> None:
        """Decode a packet and hand on the whole pieces; what cannot be decoded is a gap."""
        with contextlib.suppress(av.FFmpegError):
            for frame in self.stream.decode(packet):
                now = self._clock()
                captured = now if frame.time is None or self._zero is None else frame.time + self._zero
                if abs(captured - now) > FAR_S:  # the two have different clocks
                    captured = now
                for piece in self._cutter.put(frame, captured):
                    sound(piece)
