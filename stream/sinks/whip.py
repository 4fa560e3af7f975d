"""WHIP out: publishes to any WebRTC server over `whip+https://host/path`, and comes back when it is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import aiortc.sdp
from aiortc import RTCPeerConnection, RTCSessionDescription

from accel.errors import UserError
from stream.encoder import Encoders
from stream.frame import Frame, VideoSpec
from stream.mailbox import Fanout
from stream.meter import percentiles
from stream.rtc import ice, sdp, tuning
from stream.rtc.feedback import Feedback
from stream.rtc.network import Network
from stream.rtc.outgoing import EncodedTrack
from stream.sinks import whip_http
from stream.sinks.first import FIRST_S, FirstConnection
from stream.sinks.whip_http import Failed, IceServer, Resource
from stream.sound import PIECE_S, Delay, Sound
from stream.source import HEALTHY_S, retry_delays
from stream.sources.network import public

HINT = "is the server running, and are address and token right? It must be reachable over UDP"
CONNECT_S = 10.0  # for ICE and DTLS, once the offer is answered
SILENT_S = 12.0  # no RTCP for so long: the server is gone
LEAVE_S = 3.0  # for saying goodbye


def check(url: str, codec: str, origin: str | None) -> None:
    """Nothing to find out without connecting."""


def open_sink(url: str, spec: VideoSpec, codec: str, crf: int) -> WhipSink:
    """Connect to a WHIP endpoint; raises UserError when the first connection fails."""
    sink = WhipSink(url, spec)
    sink.opened()
    return sink


class WhipSink:
    """Encodes the newest picture in a thread of its own and sends it to a WHIP endpoint, from an event loop of its own.

    `write` never waits for the network. `state` is for people: connecting, live, "retrying in 5 s: …", closed.
    Pictures may change their size. Sound is held back by the latency of the pictures.
    """

    def __init__(self, url: str, spec: VideoSpec, *, delays: Callable[[], Iterator[float]] = retry_delays) -> None:
        self.written = 0
        self.warnings: list[str] = []
        self.state = "connecting"
        self.name = public(url)
        self.outlets, self.sound = Fanout[Frame](), Fanout[Sound]()  # what the encoders read
        self.size, self.fps = (spec.width, spec.height), spec.fps
        self._endpoint = whip_http.endpoint_of(url)
        self._delays = delays
        self._encoders = Encoders(self)
        self._servers: tuple[IceServer, ...] = ()
        self._latencies = deque[float](maxlen=128)  # s, capture → handed to us
        self._heard = deque[Sound](maxlen=100)
        self._first = FirstConnection()
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name=f"whip-{self.name}", daemon=True)
        self._thread.start()

    def opened(self, timeout: float = FIRST_S) -> None:
        """Wait for the first connection; closes and raises UserError when it failed or takes longer."""
        try:
            self._first.check(self.name, HINT, timeout)
        except UserError:
            self.close()
            raise

    def write(self, frame: Frame) -> None:
        """Leave a picture for the encoder; the newest wins."""
        self._latencies.append(time.monotonic() - frame.captured)
        self.size = frame.image.shape[1], frame.image.shape[0]
        self.outlets.put(frame)
        self.written += 1

    def hear(self, sound: Sound) -> None:
        """Take 20 ms of live sound, from any thread."""
        self._heard.append(sound)

    def say(self, kind: Any, text: str, data: Any = None) -> None:
        """What an encoder has to tell."""
        self.warnings[:] = [*self.warnings[-7:], text]

    def close(self) -> None:
        """Say goodbye and end; takes a little more than `LEAVE_S` at most."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join(2 * LEAVE_S)
        self.outlets.close()
        self.sound.close()
        self.state = "closed"

    def _cancel(self) -> None:
        if self._task:
            self._task.cancel()

    def _run(self) -> None:
        tuning.install()
        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(self._publish())
        try:
            self._loop.run_until_complete(asyncio.gather(self._task, return_exceptions=True))
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    async def _publish(self) -> None:
        patience = self._delays()
        speaking = asyncio.create_task(self._speak())
        try:
            while True:
                self.state = "connecting"
                began = time.monotonic()
                why, at_least = await self._session()
                self._first.failed(why)
                if time.monotonic() - began >= HEALTHY_S:
                    patience = self._delays()
                delay = max(next(patience), at_least)
                self.state = f"retrying in {delay:.0f} s: {why}"
                await asyncio.sleep(delay)
        finally:
            speaking.cancel()

    async def _session(self) -> tuple[str, float]:
        """One connection's life: why it ended, and how long the server wants to be left alone, s."""
        resource = pc = None
        try:
            self._servers = self._servers or await asyncio.to_thread(whip_http.options, self._endpoint)
            pc = RTCPeerConnection(ice.configuration(self._servers, time.time()))
            video = EncodedTrack("video", self._encoders.get("h264", 0))
            resource = await self._offer(pc, video)
            return await self._watch(pc, video), 0.0
        except Failed as error:
            return str(error), error.retry_after
        except UserError as error:
            return str(error), 0.0
        finally:
            await self._leave(pc, resource)

    async def _offer(self, pc: RTCPeerConnection, video: EncodedTrack) -> Resource:
        for track in (video, EncodedTrack("audio", self._encoders.sound)):
            pc.addTransceiver(track, "sendonly")
        with Network().applied():
            await pc.setLocalDescription()
        resource = await asyncio.to_thread(whip_http.post, self._endpoint, pc.localDescription.sdp)
        self._servers = resource.servers or self._servers  # for the next attempt: this one has gathered
        try:
            codec = codec_of(resource.answer)
            video.move(self._encoders.get(codec, 0))
            await pc.setRemoteDescription(RTCSessionDescription(resource.answer, "answer"))
        except Exception as error:  # a stranger's answer: aiortc raises anything on what it cannot use
            await asyncio.to_thread(whip_http.delete, resource, self._endpoint.token)
            raise Failed(f"its answer cannot be used ({error})") from error
        return resource

    async def _watch(self, pc: RTCPeerConnection, video: EncodedTrack) -> str:
        """Wait until it breaks; says how."""
        feedback = Feedback(pc.getSenders()[0], video.keyframe)
        changed = asyncio.Event()
        pc.on("connectionstatechange", changed.set)
        video.on("ended", changed.set)
        began = time.monotonic()
        while True:
            state, now = pc.connectionState, time.monotonic()
            if state == "connected" and self.state != "live":
                self.state, began = "live", now
                self._first.made()
            if state in ("failed", "closed"):
                return "the connection failed" if self.state != "live" else "the server has gone"
            if state != "connected" and now - began > CONNECT_S:
                return "no connection over UDP in time"
            if state == "connected" and now - max(feedback.heard or 0.0, began) > SILENT_S:
                return "nothing was heard of the server"
            if video.readyState == "ended":
                return video.reason or "the track ended"
            changed.clear()
            try:
                async with asyncio.timeout(1.0):
                    await changed.wait()
            except TimeoutError:
                continue

    async def _leave(self, pc: RTCPeerConnection | None, resource: Resource | None) -> None:
        async def goodbye() -> None:
            if resource:
                token = self._endpoint.token
                await asyncio.to_thread(whip_http.delete, resource, token, LEAVE_S / 2)

        async def hang_up() -> None:
            if pc:
                for sender in pc.getSenders():
                    if sender.track:
                        sender.track.stop()
                await pc.close()

        try:
            async with asyncio.timeout(LEAVE_S):
                await asyncio.gather(goodbye(), hang_up(), return_exceptions=True)
        except TimeoutError:
            return

    async def _speak(self) -> None:
        """Every 20 ms: the sound whose pictures leave now."""
        delay = Delay()
        while True:
            await asyncio.sleep(PIECE_S)
            while self._heard:
                delay.put(self._heard.popleft())
            latency = percentiles(list(self._latencies), (95,))[0]
            for piece in delay.due(time.monotonic(), latency):
                self.sound.put(piece)


def codec_of(answer: str) -> str:
    """The codec that an answer chose for the pictures, "h264" or "vp8"; raises Failed for another."""
    description = aiortc.sdp.SessionDescription.parse(answer)
    for media in description.media:
        if media.kind == "video" and media.port and media.rtp.codecs:
            name = media.rtp.codecs[0].mimeType.lower()
            if name in sdp.CODECS.values():
                return next(codec for codec, mime in sdp.CODECS.items() if mime == name)
            raise Failed(f"it wants {name}")
    raise Failed("it takes no video")
