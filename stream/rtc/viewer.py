"""One WHEP viewer: a WebRTC peer that is sent a stream's encoded pictures and sound."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Literal, Protocol

from aiortc import (
    RTCConfiguration,
    RTCDataChannel,
    RTCIceCandidate,
    RTCPeerConnection,
    RTCRtpSender,
    RTCSessionDescription,
)

from accel.errors import UserError
from stream.coder import Encoded
from stream.encoder import RUNGS, Encoders
from stream.rtc import ice, ladder, sdp, timing
from stream.rtc.feedback import Feedback
from stream.rtc.offer import read
from stream.rtc.outgoing import EncodedTrack

log = logging.getLogger(__name__)

CONNECT_S = 10.0  # an answered viewer must be connected within
STALL_S = 10.0  # connected, and nothing was sent for so long: it is closed, and the page comes anew
SILENT_S = 12.0  # no RTCP for so long: the viewer is gone (RFC 7675 consent takes aioice 30 s to run out)
CLOSE_S = 5.0  # what aiortc gets to close a peer
EVERY_S = 1.0  # how often a viewer is looked at

State = Literal["new", "connecting", "connected", "closed"]


class Watched(Protocol):
    """What a viewer changes in a stream."""

    viewers: int


class Viewer:
    """Sends a stream to one peer. Lives on the event loop it was made on; `close` may be called at any time.

    `on_closed` is called once, whatever ended it: the peer, the network, the stream, or we.

    >>> viewer = Viewer(stream, encoders, configuration)
    >>> answer = await viewer.answer(offer)
    """

    def __init__(
        self,
        stream: Watched,
        encoders: Encoders,
        configuration: RTCConfiguration,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state: State = "new"
        self.reason = ""  # why it closed, in words
        self.codec = ""  # "h264" or "vp8", once answered
        self.on_closed: Callable[[], None] | None = None
        self.pc = RTCPeerConnection(configuration)
        self._stream, self._encoders, self._clock = stream, encoders, clock
        self._place = ladder.Place()
        self._tracks: list[EncodedTrack] = []  # video first
        self._feedback: Feedback | None = None
        self._newest: timing.Sent | None = None
        self._connected_at = 0.0
        self._looked = (0.0, 0, 0)  # at the last look: when, bytes sent and overflows by then
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None

    @property
    def rung(self) -> int:
        """0 is the best; see `stream.encoder.RUNGS`."""
        return self._place.rung

    async def answer(self, offer: str) -> str:
        """The SDP answer to a viewer's offer; raises `sdp.Malformed` or `sdp.Unusable`, and is closed then."""
        try:
            return await self._answer(offer)
        except BaseException:
            self.close("refused")
            raise

    async def add_candidates(self, candidates: Iterable[RTCIceCandidate]) -> None:
        """Further candidates of the viewer."""
        await ice.add_candidates(self.pc, candidates)

    def close(self, reason: str = "closed by the server") -> asyncio.Task[None]:
        """Stop sending at once; the task ends when sockets and tasks are gone. May be repeated."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
            self._stream.viewers -= self.state == "connected"
            self.state, self.reason = "closed", reason
            for track in self._tracks:
                track.stop()
            if self.on_closed:
                self.on_closed()
        return self._closing

    def stats(self) -> dict[str, Any]:
        """What is known of this viewer, for status and metrics."""
        video, feedback = next(iter(self._tracks), None), self._feedback
        return {
            "state": self.state,
            "codec": self.codec,
            "rung": self.rung,
            "sent": video.sent if video else 0,
            "dropped": video.dropped if video else 0,
            "loss": round(feedback.loss, 3) if feedback else 0.0,
            "estimate": feedback.estimate if feedback else None,
            "rtt_ms": feedback.rtt_ms if feedback else None,
            "keyframes": feedback.keyframes if feedback else 0,
        }

    async def _answer(self, text: str) -> str:
        offer = read(text)
        codecs, audio = sdp.wanted(offer.media)
        self.codec = await self._choose(codecs)
        video = EncodedTrack("video", self._encoders.get(self.codec, 0), self._sent)
        sender = self._add(video, sdp.CODECS[self.codec])
        self._feedback = feedback = Feedback(sender, video.keyframe, self._clock)
        if audio:  # sound may begin at any time; while there is none, nothing is sent
            self._add(EncodedTrack("audio", self._encoders.sound), "audio/opus")
        self.pc.on("connectionstatechange", self._changed)
        self.pc.on("datachannel", self._channel)
        video.on("ended", self._ended)
        try:
            await self.pc.setRemoteDescription(RTCSessionDescription(offer.sdp, "offer"))
            await self.add_candidates(offer.candidates)
            await self.pc.setLocalDescription()
        except Exception as error:  # a stranger's offer: aiortc raises anything on what it cannot serve
            raise sdp.Unusable(f"the offer cannot be answered ({type(error).__name__})") from error
        if self.state == "new":
            self.state = "connecting"
        self._spawn(self._watch(video, feedback))
        return str(self.pc.localDescription.sdp)

    async def _choose(self, codecs: tuple[str, ...]) -> str:
        """The best codec that the viewer can decode and we can encode."""
        errors = []
        for codec in codecs:
            try:
                await asyncio.to_thread(self._encoders.check, codec)
            except UserError as error:
                errors.append(str(error))
            else:
                return codec
        raise sdp.Unusable("; ".join(errors))

    def _add(self, track: EncodedTrack, mime: str) -> RTCRtpSender:
        transceiver = self.pc.addTransceiver(track, "sendonly")
        transceiver.setCodecPreferences(sdp.preferences(track.kind, mime))
        self._tracks.append(track)
        return transceiver.sender

    def _sent(self, encoded: Encoded, pts: int) -> None:
        # aiortc has just come back for the next packet, so its newest RTP timestamp is that of this one
        if self._feedback:
            self._newest = timing.Sent(self._feedback.rtp_timestamp, encoded.captured, self._clock())

    def _channel(self, channel: RTCDataChannel) -> None:
        if channel.label == timing.LABEL:
            self._spawn(timing.tell(channel, lambda: self._newest))

    def _changed(self) -> None:
        state = self.pc.connectionState
        if state == "connected" and self.state == "connecting":
            self.state = "connected"
            self._connected_at = self._clock()
            self._place = ladder.Place(since=self._connected_at)
            self._stream.viewers += 1
        elif state in ("failed", "closed"):
            self.close("the viewer has gone" if state == "closed" else "the connection failed")

    def _ended(self) -> None:
        self.close(self._tracks[0].reason or "the viewer has gone")

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(CLOSE_S):
                await self.pc.close()
        except TimeoutError:
            log.warning("a viewer's peer did not close within %g s: its sockets are", CLOSE_S)
            for transceiver in self.pc.getTransceivers():
                await transceiver.receiver.transport.transport.stop()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self, video: EncodedTrack, feedback: Feedback) -> None:
        """Look at the viewer once a second, until something is wrong with it."""
        answered = moved = self._clock()
        sent = 0
        while self.state != "closed":
            await asyncio.sleep(EVERY_S)
            now = self._clock()
            if video.sent != sent:
                sent, moved = video.sent, now
            if self.state == "connecting" and now - answered > CONNECT_S:
                self.close("did not connect")
            elif self.state == "connected" and now - max(moved, self._connected_at) > STALL_S:
                self.close("nothing was sent to it")
            elif self.state == "connected" and now - max(feedback.heard or 0.0, self._connected_at) > SILENT_S:
                self.close("nothing was heard of it")
            elif self.state == "connected":
                self._climb(video, feedback, now)

    def _climb(self, video: EncodedTrack, feedback: Feedback, now: float) -> None:
        (then, bytes_then, overflows), self._looked = self._looked, (now, video.bytes, video.overflows)
        bitrate = (video.bytes - bytes_then) * 8 / max(now - then, 1e-3)
        report = ladder.Report(feedback.loss, feedback.estimate, bitrate, video.overflows > overflows)
        place = ladder.step(self._place, report, now, len(RUNGS) - 1)
        if place.rung != self.rung:
            video.move(self._encoders.get(self.codec, place.rung))
        self._place = place
