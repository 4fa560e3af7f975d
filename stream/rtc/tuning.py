"""What aiortc does too late, too often or without a bound, put right: call `install()` before the first peer is made.

aiortc 1.16 gives a frame out with the first packet of the next one, waits for a lost packet until 512 others are
there, asks for it once, and lets pictures pile up before and after its decoder. What this module knows of aiortc's
insides is checked by `install()`; with another aiortc it warns and leaves things as they are.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import queue
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import aiortc
from aiortc import RTCRtpReceiver, RTCRtpSender, rtcpeerconnection, rtcrtpreceiver, rtcrtpsender, rtp
from aiortc.jitterbuffer import JitterBuffer as StockBuffer
from aiortc.rtcrtpreceiver import RemoteStreamTrack
from aiortc.rtp import RtpPacket

from stream.rtc.jitter import CodedFrame, JitterBuffer

logger = logging.getLogger(__name__)

VERSIONS = ((1, 16), (1, 17))  # from, up to but without
HISTORY = 1024  # packets a sender keeps for retransmission: 1.2 s at 8 Mb/s instead of 0.15 s
UNDECODED = 16  # frames before the decoder; with more it goes on at a keyframe
DECODED = {"video": 4, "audio": 50}  # frames between the decoder and the reader of a track; then the newest win

_warned = False


def install() -> bool:
    """Make every peer from now on a low-latency one; False, with one warning, where this aiortc is not known."""
    global _warned
    fault = _unknown()
    if fault:
        if not _warned:
            logger.warning("aiortc %s stays as it is, its latency too: %s", aiortc.__version__, fault)
        _warned = True
        return False
    for module, name, _, ours in _replaced():
        setattr(module, name, ours)
    return True


def uninstall() -> None:
    """Make every peer from now on a stock one; those that are there stay what they are."""
    for module, name, stock, _ in _replaced():
        setattr(module, name, stock)


def buffer_of(receiver: RTCRtpReceiver) -> JitterBuffer | None:
    """The jitter buffer of a receiver, with its counters; None for audio and for a stock receiver."""
    return receiver.buffer if isinstance(receiver, Receiver) else None


def sending(sender: RTCRtpSender) -> bool:
    """Whether this sender sends: an error in its loop is logged by aiortc, and its peer stays connected."""
    task: asyncio.Future[None] | None = _private(sender, "RTCRtpSender", "rtp_task")
    return task is not None and not task.done()


def _replaced() -> list[tuple[ModuleType, str, object, object]]:
    """Module, name, aiortc's own and ours."""
    return [
        (rtcpeerconnection, "RTCRtpReceiver", RTCRtpReceiver, Receiver),
        (rtcpeerconnection, "RemoteStreamTrack", RemoteStreamTrack, Track),
        (rtcrtpsender, "RTP_HISTORY_SIZE", rtp.RTP_HISTORY_SIZE, HISTORY),
    ]


def _private(owner: object, cls: str, name: str) -> Any:
    """An attribute that aiortc spells with two underscores."""
    return getattr(owner, f"_{cls}__{name}")


class NewestWins(asyncio.Queue[Any]):
    """A queue that drops its oldest item for a new one when full, so that `put` never waits."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.dropped = 0

    async def put(self, item: Any) -> None:
        """Add an item; None, the end of the track, drops nothing."""
        if item is not None and self.qsize() >= self.capacity:
            self.get_nowait()
            self.dropped += 1
        self.put_nowait(item)


class Track(RemoteStreamTrack):
    """A remote track whose reader, when it is slow, misses pictures instead of seeing old ones."""

    def __init__(self, kind: str, id: str | None = None) -> None:
        super().__init__(kind, id)
        self._queue = NewestWins(DECODED[kind])


class Intake:
    """Stands in the place of aiortc's jitter buffer and only takes in; `Receiver` takes out."""

    def __init__(self, buffer: JitterBuffer) -> None:
        self.ssrc: int | None = None  # of the media, never of retransmissions
        self._buffer = buffer

    def add(self, packet: Any) -> tuple[bool, None]:
        """The answer says: no keyframe to ask for, no frame to decode."""
        self.ssrc = packet.ssrc
        self._buffer.add(packet, time.monotonic())
        return False, None


class Receiver(RTCRtpReceiver):
    """aiortc's receiver with `stream.rtc.jitter` in it for video, and a bound on what waits for the decoder."""

    def __init__(self, kind: str, transport: Any) -> None:
        super().__init__(kind, transport)
        self.buffer: JitterBuffer | None = None
        self.undecoded = 0  # frames that were dropped because the decoder was behind
        self._behind = False
        self._timer: asyncio.TimerHandle | None = None
        self._flushing: asyncio.Task[None] | None = None
        if kind == "video":
            self.buffer = JitterBuffer()
            self._intake = Intake(self.buffer)
            self._RTCRtpReceiver__jitter_buffer = self._intake
            self._RTCRtpReceiver__nack_generator = None  # the buffer knows better what is still wanted

    async def _handle_rtp_packet(self, packet: RtpPacket, arrival_time_ms: int) -> None:
        await super()._handle_rtp_packet(packet, arrival_time_ms)
        if self.buffer is not None:
            await self._flush(self.buffer)

    async def stop(self) -> None:
        """As aiortc's, which waits for the decoder, without what is still to be decoded."""
        self._stop_timer()
        self._empty()
        await super().stop()

    def _handle_disconnect(self) -> None:
        self._stop_timer()
        self._empty()
        super()._handle_disconnect()

    async def _flush(self, buffer: JitterBuffer) -> None:
        """Everything the buffer has for the decoder, then for the sender; nothing is awaited between two frames."""
        now = time.monotonic()
        for frame in buffer.release(now):
            self._decode(buffer, frame)
        nacks, pli = buffer.nacks(now), buffer.pli(now)
        self._set_timer(buffer, now)
        if self._intake.ssrc is not None:
            if nacks:
                await self._send_rtcp_nack(self._intake.ssrc, nacks)
            if pli:
                await self._send_rtcp_pli(self._intake.ssrc)

    def _decode(self, buffer: JitterBuffer, frame: CodedFrame) -> None:
        codec = self._inner("codecs").get(frame.payload_type)
        if codec is None or self._inner("decoder_thread") is None:
            return
        depth = self._inner("decoder_queue").qsize()
        self._behind = depth >= UNDECODED or (self._behind and depth > 0)
        if self._behind and not frame.keyframe:
            self.undecoded += 1
            buffer.break_off()
            return
        if self._behind:
            self._behind = False
            self._empty()
        self._inner("decoder_queue").put((codec, frame))

    def _empty(self) -> None:
        """Drop what waits for the decoder: a keyframe makes it needless, or nobody will see it."""
        waiting: queue.Queue[Any] = self._inner("decoder_queue")
        while True:
            try:
                waiting.get_nowait()
            except queue.Empty:
                return
            self.undecoded += 1

    def _set_timer(self, buffer: JitterBuffer, now: float) -> None:
        self._stop_timer()
        wait = buffer.due(now)
        if wait is not None and self._inner("decoder_thread"):
            # A little later than due: the loop's clock is coarser, and too early would mean once more.
            self._timer = asyncio.get_running_loop().call_later(wait + 0.001, self._on_timer, buffer)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self, buffer: JitterBuffer) -> None:
        self._timer = None
        self._flushing = asyncio.ensure_future(self._flush(buffer))

    def _inner(self, name: str) -> Any:
        return _private(self, "RTCRtpReceiver", name)


def _unknown() -> str | None:
    """What of this aiortc is not as this module expects it, if anything."""
    version = tuple(int(part) for part in aiortc.__version__.split(".")[:2] if part.isdigit())
    if not VERSIONS[0] <= version < VERSIONS[1]:
        return f"known are {VERSIONS[0][0]}.{VERSIONS[0][1]} up to {VERSIONS[1][0]}.{VERSIONS[1][1]}"
    try:
        return _unfit()
    except (AttributeError, TypeError, ValueError) as error:
        return f"its insides have changed ({error})"


def _unfit() -> str | None:
    """Build one receiver and one sender and look at what is relied on; nothing is sent."""
    signatures: dict[Callable[..., Any], list[str]] = {
        RTCRtpReceiver._handle_rtp_packet: ["self", "packet", "arrival_time_ms"],
        RTCRtpReceiver._send_rtcp_nack: ["self", "media_ssrc", "lost"],
        RTCRtpReceiver._send_rtcp_pli: ["self", "media_ssrc"],
        RemoteStreamTrack.__init__: ["self", "kind", "id"],
        StockBuffer.add: ["self", "packet"],
    }
    for function, names in signatures.items():
        if list(inspect.signature(function).parameters) != names:
            return f"{function.__qualname__} takes other arguments"
    transport = type("Transport", (), {"state": "new"})()
    stock = RTCRtpReceiver("video", transport)
    expected: dict[str, type] = {
        "jitter_buffer": StockBuffer,
        "nack_generator": rtcrtpreceiver.NackGenerator,
        "decoder_queue": queue.Queue,
        "decoder_thread": type(None),
        "codecs": dict,
    }
    for name, kind in expected.items():
        if not isinstance(_private(stock, "RTCRtpReceiver", name), kind):
            return f"RTCRtpReceiver.__{name} is something else"
    if "_RTCRtpSender__rtp_task" not in RTCRtpSender.__init__.__code__.co_names:  # one cannot be built without a loop
        return "RTCRtpSender.__rtp_task is missing"
    if not isinstance(RemoteStreamTrack("video")._queue, asyncio.Queue):
        return "a remote track's queue is something else"
    missing = [f"{module.__name__}.{name}" for module, name, _, _ in _replaced() if not hasattr(module, name)]
    return f"no {missing[0]}" if missing else None
