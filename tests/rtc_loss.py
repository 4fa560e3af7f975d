"""Lossy networks for tests of WebRTC: loss patterns, and two peers that send a video from one to the other."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
from aiortc import (
    MediaStreamTrack,
    RTCConfiguration,
    RTCPeerConnection,
    RTCRtpReceiver,
    RTCRtpSender,
    RTCSessionDescription,
)
from aiortc.mediastreams import MediaStreamError

from stream.rtc import tuning
from tests.fakes import PATIENCE

FPS = 30
TICK = Fraction(1, 90_000)

# Of the nth packet sent: is it lost?
Pattern = Callable[[int], bool]


def nothing(n: int) -> bool:
    """A perfect network."""
    return False


def these(*lost: int) -> Pattern:
    """Exactly these packets are lost."""
    return frozenset(lost).__contains__


def every(step: int, burst: int = 1) -> Pattern:
    """`burst` packets in a row out of each `step`."""
    return lambda n: n % step >= step - burst


def at_random(share: float, seed: int) -> Pattern:
    """Each packet is lost with this probability; the same ones for the same seed."""
    generator = random.Random(seed)
    drawn: list[bool] = []

    def lost(n: int) -> bool:
        while len(drawn) <= n:
            drawn.append(generator.random() < share)
        return drawn[n]

    return lost


class CodedTrack(MediaStreamTrack):
    """Coded packets of a moving picture at 30 fps and a constant bit rate, from an encoder of its own."""

    kind = "video"

    def __init__(self, codec: str = "H264", bit_rate: int = 1_000_000) -> None:
        super().__init__()
        size = (320, 240) if codec == "H264" else (160, 96)  # noise is dear, to libvpx above all
        self.keyframe = True
        self.sent = 0
        self._noise = np.random.default_rng(1).integers(0, 255, (4, size[1] * 3 // 2, size[0]), np.uint8)
        self._noise[:, size[1] :] //= 4
        self._start: float | None = None
        self._encoder = av.CodecContext.create("libx264" if codec == "H264" else "libvpx", "w")
        self._encoder.width, self._encoder.height = size
        self._encoder.pix_fmt = "yuv420p"
        self._encoder.time_base, self._encoder.framerate = TICK, Fraction(FPS)
        self._encoder.bit_rate = bit_rate
        self._encoder.gop_size = 100_000
        rate = {"maxrate": str(bit_rate), "bufsize": str(bit_rate // FPS * 8)}
        x264 = {"preset": "ultrafast", "tune": "zerolatency", "profile": "baseline", "forced-idr": "1", "bf": "0"}
        vpx = {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "minrate": str(bit_rate)}
        self._encoder.options = rate | (x264 if codec == "H264" else vpx)

    def ask_keyframe(self) -> None:
        """The next picture will be one."""
        self.keyframe = True

    async def recv(self) -> av.Packet:
        """The next picture when it is time for it."""
        loop = asyncio.get_running_loop()
        self._start = self._start or loop.time()
        await asyncio.sleep(self._start + self.sent / FPS - loop.time())
        frame = av.VideoFrame.from_ndarray(self._noise[self.sent % 4], format="yuv420p")
        frame.pts, frame.time_base = self.sent * 90_000 // FPS, TICK
        frame.pict_type = av.video.frame.PictureType.I if self.keyframe else av.video.frame.PictureType.NONE
        self.keyframe = False
        self.sent += 1
        (packet,) = self._encoder.encode(frame)
        return packet


def lose(
    sender: RTCRtpSender, pattern: Pattern, *, retransmissions: bool, on_loss: Callable[[], None] = lambda: None
) -> list[float]:
    """Let packets of this sender vanish by the pattern, which counts media packets; returns the times of the losses.

    With `retransmissions` those of a lost packet are lost too, for ever.
    """
    transport, moments, gone = sender.transport, [], set()
    send, count = transport._send_rtp, 0

    async def lossy(data: bytes) -> None:
        nonlocal count
        ssrc = int.from_bytes(data[8:12], "big")
        if not 192 <= data[1] <= 223:  # not RTCP
            if ssrc == sender._ssrc:
                count += 1
                if pattern(count - 1):
                    gone.add(int.from_bytes(data[2:4], "big"))
                    moments.append(time.monotonic())
                    on_loss()
                    return
            elif retransmissions and _original(data) in gone:
                return
        await send(data)

    transport._send_rtp = lossy
    return moments


def _original(data: bytes) -> int:
    """The sequence number that a retransmission repeats (RFC 4588 §4)."""
    offset = 12
    if data[0] & 0x10:
        offset += 4 + 4 * int.from_bytes(data[14:16], "big")
    return int.from_bytes(data[offset : offset + 2], "big")


class Loopback:
    """A publishing and a viewing peer in this process; `moments` tells when pictures came out of the second.

    The viewer's receiver is aiortc's own, or ours between `tuning.install()` and `tuning.uninstall()`.

    >>> async with Loopback() as rig: await rig.frames(30)
    """

    def __init__(self, codec: str = "H264", bit_rate: int = 1_000_000) -> None:
        self.track = CodedTrack(codec, bit_rate)
        self.moments: list[float] = []
        self.asked: list[float] = []  # when keyframes were
        self._news = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self._publisher, self.sender = publisher(self.track, codec, self.asked)
        self._viewer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._viewer.on("track", self._read)

    @property
    def receiver(self) -> RTCRtpReceiver:
        return self._viewer.getReceivers()[0]

    async def __aenter__(self) -> Loopback:
        await self._publisher.setLocalDescription(await self._publisher.createOffer())
        await self._viewer.setRemoteDescription(self._publisher.localDescription)
        await self._viewer.setLocalDescription(await self._viewer.createAnswer())
        await self._publisher.setRemoteDescription(self._viewer.localDescription)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(self._publisher.close(), self._viewer.close())
        if self._reader:
            await self._reader

    async def frames(self, count: int) -> None:
        """Wait until so many more pictures have come."""
        count += len(self.moments)
        async with asyncio.timeout(PATIENCE):
            while len(self.moments) < count:
                self._news.clear()
                await self._news.wait()

    async def after_losing(self, pattern: Pattern) -> list[float]:
        """Lose packets for good by the pattern, counted from now; returns when the first one is gone."""
        gone = asyncio.Event()
        moments = lose(self.sender, pattern, retransmissions=True, on_loss=gone.set)
        async with asyncio.timeout(PATIENCE):
            await gone.wait()
        return moments

    def _read(self, track: MediaStreamTrack) -> None:
        self._reader = asyncio.ensure_future(watch(track, self.moments, self._news.set))


def publisher(
    track: CodedTrack, codec: str, asked: list[float] | None = None
) -> tuple[RTCPeerConnection, RTCRtpSender]:
    """A peer that sends this track and nothing else; `asked` gets the times at which keyframes were asked for."""
    peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    transceiver = peer.addTransceiver(track, direction="sendonly")
    codecs = RTCRtpSender.getCapabilities("video").codecs
    transceiver.setCodecPreferences([c for c in codecs if c.name.lower() in (codec.lower(), "rtx")])

    def ask() -> None:
        track.ask_keyframe()
        if asked is not None:
            asked.append(time.monotonic())

    transceiver.sender._send_keyframe = ask
    return peer, transceiver.sender


async def watch(track: MediaStreamTrack, moments: list[float], on_picture: Callable[[], None] = lambda: None) -> None:
    """Note when pictures come, until the track ends."""
    with suppress(MediaStreamError):
        while True:
            await track.recv()
            moments.append(time.monotonic())
            on_picture()


def gaps(moments: list[float], since: float = 0.0) -> list[float]:
    """Times between two pictures, of those that ended after `since`, s."""
    return [after - before for before, after in pairwise(moments) if after >= since]


async def _publish() -> None:
    """One of two processes: the offer on standard output, the answer on standard input."""
    peer, _ = publisher(CodedTrack(), "H264")
    await peer.setLocalDescription(await peer.createOffer())
    print(json.dumps(peer.localDescription.sdp), flush=True)
    answer = json.loads(await asyncio.to_thread(sys.stdin.readline))
    await peer.setRemoteDescription(RTCSessionDescription(answer, "answer"))
    await asyncio.to_thread(sys.stdin.readline)  # until the other end is done
    await peer.close()


async def _view(seconds: float) -> None:
    """The other: the offer on standard input, the answer and at last a report on standard output."""
    tuning.install()
    peer, moments, enough = RTCPeerConnection(RTCConfiguration(iceServers=[])), [], asyncio.Event()

    def on_picture() -> None:
        if moments[-1] - moments[0] >= seconds:
            enough.set()

    peer.on("track", lambda track: readers.append(asyncio.ensure_future(watch(track, moments, on_picture))))
    readers: list[asyncio.Future[None]] = []
    offer = json.loads(await asyncio.to_thread(sys.stdin.readline))
    await peer.setRemoteDescription(RTCSessionDescription(offer, "offer"))
    await peer.setLocalDescription(await peer.createAnswer())
    print(json.dumps(peer.localDescription.sdp), flush=True)
    async with asyncio.timeout(seconds + PATIENCE):
        await enough.wait()
    buffer = tuning.buffer_of(peer.getReceivers()[0])
    assert buffer
    counters = {name: getattr(buffer, name) for name in ("released", "skipped", "late", "nacked", "plis")}
    print(json.dumps({"frames": len(moments), "gaps": sorted(gaps(moments))[-5:]} | counters), flush=True)
    await peer.close()


if __name__ == "__main__":
    asyncio.run(_publish() if sys.argv[1] == "publish" else _view(float(sys.argv[2])))
