"""What we need of aiortc's receiver that it does not offer: when packets came, and a decoder that ends without a wait.

Written for aiortc 1.16 (names are checked by `known`); with any other, times are taken when pictures come out of it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from aiortc import RTCRtpReceiver
from aiortc.rtcrtpreceiver import TimestampMapper

from stream.rtc.tuning import buffer_of

KEPT = 64  # pictures whose time of arrival is remembered: two seconds
_PRIVATE = "_RTCRtpReceiver__"


def known(receiver: RTCRtpReceiver) -> bool:
    """Whether this receiver has the insides that `Arrivals` uses."""
    names = ("stop_decoder", "decoder_thread", "decoder_queue", "timestamp_mapper")
    mapper = getattr(receiver, _PRIVATE + "timestamp_mapper", None)
    return isinstance(mapper, TimestampMapper) and all(hasattr(receiver, _PRIVATE + name) for name in names)


class Arrivals:
    """Watches one receiver, on its event loop.

    >>> arrivals = Arrivals(receiver)
    >>> arrivals.captured(frame.pts, now=time.monotonic())  # when the first packet of that picture came
    """

    def __init__(self, receiver: RTCRtpReceiver, clock: Callable[[], float] = time.monotonic) -> None:
        self.last: float | None = None  # s, when the newest packet came
        self._receiver: Any = receiver
        self._clock = clock
        self._known = known(receiver)
        self._times: deque[tuple[int, float]] = deque(maxlen=KEPT)  # RTP timestamp, s
        self._newest = -1
        self._decoder: threading.Thread | None = None  # released, not joined yet
        self._handle: Callable[..., Awaitable[None]] = receiver._handle_rtp_packet
        setattr(receiver, "_handle_rtp_packet", self._arrived)  # noqa: B010 over the class's own
        if self._known:
            setattr(self._receiver, _PRIVATE + "stop_decoder", self.release)

    def rtp(self, pts: int | None) -> int | None:
        """The RTP timestamp of a decoded frame, whose pts aiortc counts from the first one."""
        if pts is None or not self._known:
            return None
        buffer = buffer_of(self._receiver)
        if buffer is not None:  # counts by itself, see stream.rtc.tuning
            return buffer.rtp_timestamp(pts)
        origin = getattr(self._receiver, _PRIVATE + "timestamp_mapper")._origin
        return None if origin is None else (pts + origin) & 0xFFFFFFFF

    def captured(self, pts: int | None, now: float) -> float:
        """When the first packet of a decoded frame came, s; `now` where that is not known."""
        timestamp = self.rtp(pts)
        return next((at for stamp, at in reversed(self._times) if stamp == timestamp), now)

    def release(self) -> None:
        """End the decoder after the picture it is at. aiortc's own way joins its thread on the event loop, however much
        there is still to decode; ours is joined by `join`. May be repeated."""
        thread: threading.Thread | None = getattr(self._receiver, _PRIVATE + "decoder_thread")
        if thread is not None:
            setattr(self._receiver, _PRIVATE + "decoder_thread", None)
            self._decoder = thread
        if self._decoder is not None:
            waiting: queue.Queue[object] = getattr(self._receiver, _PRIVATE + "decoder_queue")
            with suppress(queue.Empty):
                while True:
                    waiting.get_nowait()
            waiting.put(None)  # again each time: a receiver that is stopped empties its queue

    def join(self, timeout: float) -> None:
        """Wait for a released decoder, off the loop."""
        if self._decoder is not None:
            self._decoder.join(timeout)

    async def _arrived(self, packet: Any, arrival_time_ms: int) -> None:
        now = self._clock()
        self.last = now
        if packet.payload and packet.timestamp != self._newest:
            self._newest = packet.timestamp
            if all(stamp != packet.timestamp for stamp, _ in self._times):
                self._times.append((packet.timestamp, now))
        await self._handle(packet, arrival_time_ms=arrival_time_ms)
