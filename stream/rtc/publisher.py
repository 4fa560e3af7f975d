"""One WHIP peer: what somebody sends us becomes the source of a stream."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiortc import (
    MediaStreamTrack,
    RTCConfiguration,
    RTCDataChannel,
    RTCIceCandidate,
    RTCPeerConnection,
    RTCSessionDescription,
)
from aiortc.mediastreams import MediaStreamError

from stream.mailbox import Fanout
from stream.rtc import timing
from stream.rtc.arrivals import Arrivals
from stream.rtc.ice import add_candidates
from stream.rtc.offer import read
from stream.rtc.received import Arrived, TrackSource, open_track
from stream.rtc.sdp import Malformed, Unusable
from stream.sound import Cutter
from stream.source import Size

if TYPE_CHECKING:
    from stream.feed import Feed
    from stream.live import Stream

log = logging.getLogger(__name__)

LABEL = "WHIP publisher"
MAX_PIXELS = 4096 * 2304
JOIN_S = 2.0  # how long a decoder that ends is waited for


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a connected publisher may send nothing, s."""

    track_s: float = 2.0  # before its first packet of video
    picture_s: float = 8.0  # before its first picture
    stall_s: float = 5.0  # between two packets; consent (RFC 7675) takes 30 s to notice that somebody vanished


class Publisher:
    """Answers one offer, receives its tracks, and is the stream's source from when it is connected until it is closed.

    Lives on the event loop. Closes itself when the sender leaves, falls silent, or another source takes the stream;
    `on_closed` is called as soon as the stream is free again.

    >>> publisher = Publisher(stream, configuration)
    >>> answer = await publisher.answer(offer)
    """

    def __init__(
        self,
        stream: Stream,
        configuration: RTCConfiguration,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream = stream
        self.state = "new"  # then "connected", then "closed"
        self.reason = ""  # why it was closed
        self.connected = False  # whether it ever was
        self.on_closed: Callable[[], None] | None = None
        self.pc = RTCPeerConnection(configuration)
        self.pictures = Fanout[Arrived]()
        self._patience, self._clock = patience or Patience(), clock
        self._latest: Arrived | None = None
        self._arrivals: dict[str, Arrivals] = {}  # kind → of its receiver
        self._tasks: set[asyncio.Task[None]] = set()
        self._feed: Feed | None = None
        self._timing: RTCDataChannel | None = None
        self._told = 0.0
        self._closing: asyncio.Task[None] | None = None
        self.pc.on("track", self._on_track)
        self.pc.on("connectionstatechange", self._on_state)
        self.pc.on("datachannel", self._on_channel)

    async def answer(self, offer: str) -> str:
        """The answer to an offer, with every candidate; raises Malformed or Unusable, and is closed then."""
        try:
            wanted = read(offer)
            wanted.publishes()
            await self.pc.setRemoteDescription(RTCSessionDescription(wanted.sdp, "offer"))
            await self.pc.setLocalDescription()
            await self.add_candidates(wanted.candidates)
        except (Malformed, Unusable):
            self.close("refused")
            raise
        except Exception as error:
            self.close("refused")
            raise Unusable(f"the offer cannot be answered ({type(error).__name__})") from error
        return str(self.pc.localDescription.sdp)

    async def add_candidates(self, candidates: Iterable[RTCIceCandidate]) -> None:
        """Further candidates of the sender."""
        await add_candidates(self.pc, candidates)

    def close(self, reason: str = "") -> asyncio.Task[None]:
        """Free the stream at once; the task ends when sockets, tasks and threads are gone. May be repeated."""
        if self._closing is None:
            self.state, self.reason = "closed", reason
            if self._feed is not None:
                self.stream.unfeed(self._feed)
            self.pictures.close()
            self._closing = asyncio.get_running_loop().create_task(self._close())
            if self.on_closed is not None:
                self.on_closed()
        return self._closing

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for arrivals in self._arrivals.values():
            arrivals.release()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.pc.close()
        for arrivals in self._arrivals.values():
            arrivals.release()  # the handshake may have been at its very end
            await asyncio.to_thread(arrivals.join, JOIN_S)
        self._latest = None

    def _on_state(self) -> None:
        state = self.pc.connectionState
        if state == "connected" and self.state == "new" and self.stream.phase == "ended":
            self.close("the stream is gone")
        elif state == "connected" and self.state == "new":
            self.state, self.connected = "connected", True
            self._feed = self.stream.feed(self._open, LABEL, retry=False)
            self._start(self._watch(self._feed))
        elif state in ("failed", "closed"):
            self.close("the connection ended")

    def _on_track(self, track: MediaStreamTrack) -> None:
        receiver = next(r for r in self.pc.getReceivers() if r.track is track)
        arrivals = self._arrivals[track.kind] = Arrivals(receiver, self._clock)
        self._start(self._pump_video(track, arrivals) if track.kind == "video" else self._pump_audio(track, arrivals))

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a publisher of %s broke", self.stream.name, exc_info=error)
            self.close("an internal error, see the log")

    def _open(self, size: Size | None, fit: str) -> TrackSource:
        """The stream's opener; runs in its reader thread."""
        return open_track(self.pictures, self._latest, size, fit)

    async def _pump_video(self, track: MediaStreamTrack, arrivals: Arrivals) -> None:
        """Always drains the track, whose own queue has no bound; the newest picture wins."""
        seq = 0
        try:
            while True:
                frame: Any = await track.recv()
                if frame.width * frame.height > MAX_PIXELS:
                    self.close(f"pictures of {frame.width}x{frame.height} are more than is taken")
                    return
                self._latest = Arrived(frame, seq, arrivals.captured(frame.pts, self._clock()))
                self.pictures.put(self._latest)
                seq += 1
                self._tell(arrivals.rtp(frame.pts), self._latest.captured)
        except MediaStreamError:
            self.close("the sender ended its video")

    async def _pump_audio(self, track: MediaStreamTrack, arrivals: Arrivals) -> None:
        cutter = Cutter()
        try:
            while True:
                frame: Any = await track.recv()
                for piece in cutter.put(frame, self._clock()):
                    self.stream.hear(piece)
        except MediaStreamError:
            pass  # the video goes on without

    async def _watch(self, feed: Feed) -> None:
        """Close a publisher that sends nothing, or that is not the stream's source any more."""
        patience, connected = self._patience, self._clock()
        while True:
            await asyncio.sleep(min(patience.track_s, patience.stall_s) / 5)
            now = self._clock()
            last = self._arrivals["video"].last
            if self.stream.feeding is not feed:
                self.close("another source took the stream")
            elif last is None and now - connected > patience.track_s:
                self.close(f"no video within {patience.track_s:g} s")
            elif self._latest is None and now - connected > patience.picture_s:
                self.close(f"no picture could be decoded within {patience.picture_s:g} s")
            elif last is not None and now - last > patience.stall_s:
                self.close(f"no video for {patience.stall_s:g} s")

    # the page's measure of time

    def _on_channel(self, channel: RTCDataChannel) -> None:
        if channel.label == timing.LABEL:
            self._timing = channel
            channel.on("message", self._on_ping)

    def _on_ping(self, message: object) -> None:
        """The page reckons the offset of its clock from the answer."""
        words = timing.answer(message, self._clock())
        if words:
            self._send(words)

    def _tell(self, rtp: int | None, captured: float) -> None:
        """About five times a second: when the picture of an RTP timestamp reached us, ms of our clock."""
        if rtp is not None and captured - self._told >= timing.EVERY_S:
            self._told = captured
            self._send(json.dumps({"rtp": rtp, "captured": round(captured * 1e3, 2)}))

    def _send(self, words: str) -> None:
        channel = self._timing
        if channel is not None and channel.readyState == "open" and channel.bufferedAmount < timing.UNSENT_MOST:
            channel.send(words)
