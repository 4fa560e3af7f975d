"""Our own WHIP and WHEP clients for tests, and a server to talk to: aiortc peers, HTTP in the same event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from fractions import Fraction
from typing import Any

import aioice.ice
import av
import httpx
import numpy as np
import pytest
from aiortc import (
    MediaStreamTrack,
    RTCBundlePolicy,
    RTCConfiguration,
    RTCDataChannel,
    RTCPeerConnection,
    RTCRtpSender,
    RTCSessionDescription,
)
from fastapi import FastAPI, Request
from numpy.typing import NDArray

from stream.hub import Hub, LiveSettings
from stream.rtc import tuning
from stream.server import whip
from stream.server.auth import Guard
from stream.server.errors import Refused, problem
from stream.server.limits import Gate
from stream.server.peers import Peers
from stream.server.settings import ServerSettings
from tests.fakes import PATIENCE, FakeStylizer

NETWORK = pytest.mark.skipif(
    not aioice.ice.get_host_addresses(use_ipv4=True, use_ipv6=True), reason="needs a network address"
)
BITS = 12
SDP = {"Content-Type": "application/sdp"}
TRICKLE = {"Content-Type": "application/trickle-ice-sdpfrag"}


def numbered(number: int, size: tuple[int, int] = (320, 240)) -> NDArray[np.uint8]:
    """A moving picture with `number` in black and white blocks along its upper half."""
    width, height = size
    image = np.full((height, width, 3), 90, np.uint8)
    image[height // 2 :, :, 1] = (np.arange(width) * 2 + number * 8).astype(np.uint8)
    for bit in range(BITS):
        edges = [width * (bit + i) // BITS for i in (0, 1)]
        image[: height // 2, edges[0] : edges[1]] = 255 if number >> bit & 1 else 0
    return image


def number_in(image: NDArray[np.uint8], inverted: bool = False) -> int:
    """The number in a picture of any size, as long as it was only scaled (and, by the fake stylizer, inverted)."""
    height, width = image.shape[:2]
    row = image[height // 4, [int(width * (bit + 0.5) / BITS) for bit in range(BITS)]].mean(axis=1) > 127
    return sum(int(on != inverted) << bit for bit, on in enumerate(row))


class NumberedTrack(MediaStreamTrack):
    """Numbered pictures at their own pace; `size` may be changed while it runs. `gate` holds the next one back."""

    kind = "video"

    def __init__(self, size: tuple[int, int] = (320, 240), fps: float = 15.0) -> None:
        super().__init__()
        self.size, self.fps = size, fps
        self.gate = asyncio.Event()
        self.gate.set()
        self.number = 0
        self.sent: dict[int, float] = {}  # number → when, monotonic s
        self._started = time.monotonic()

    async def recv(self) -> av.VideoFrame:
        await self.gate.wait()
        await asyncio.sleep(max(0.0, self._started + self.number / self.fps - time.monotonic()))
        frame = av.VideoFrame.from_ndarray(numbered(self.number, self.size), "rgb24")
        frame.pts, frame.time_base = round(self.number * 90_000 / self.fps), Fraction(1, 90_000)
        self.sent[self.number] = time.monotonic()
        self.number += 1
        return frame


class HummingTrack(MediaStreamTrack):
    """A tone in pieces of 20 ms."""

    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        self._count, self._started = 0, time.monotonic()

    async def recv(self) -> av.AudioFrame:
        await asyncio.sleep(max(0.0, self._started + self._count * 0.02 - time.monotonic()))
        t = (self._count * 960 + np.arange(960)) / 48_000
        samples = (8000 * np.sin(2 * np.pi * 440 * t)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(np.repeat(samples, 2).reshape(1, -1), format="s16", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, self._count * 960, Fraction(1, 48_000)
        self._count += 1
        return frame


class Client:
    """One WHIP or WHEP client. `answered` is the response to its POST.

    >>> client = Client(http); await client.publish("/whip/cam", NumberedTrack())
    """

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.channel: RTCDataChannel | None = None
        self.pc = RTCPeerConnection(RTCConfiguration(iceServers=[], bundlePolicy=RTCBundlePolicy.MAX_BUNDLE))
        self.connected = asyncio.Event()
        self.ended = asyncio.Event()
        self.tracks: asyncio.Queue[MediaStreamTrack] = asyncio.Queue()
        self.answered: httpx.Response | None = None
        self.pc.on("connectionstatechange", self._changed)
        self.pc.on("track", self.tracks.put_nowait)

    async def offer(self, *tracks: MediaStreamTrack | str, timing: bool = False) -> str:
        """An offer that sends tracks, or receives kinds; with the data channel for times where asked for."""
        for track in tracks:
            transceiver = self.pc.addTransceiver(track, "recvonly" if isinstance(track, str) else "sendonly")
            if mime := getattr(track, "mime", None):
                codecs = RTCRtpSender.getCapabilities(transceiver.kind).codecs
                transceiver.setCodecPreferences([codec for codec in codecs if codec.mimeType == mime])
        if timing:
            self.channel = self.pc.createDataChannel("timing")
        await self.pc.setLocalDescription()
        return str(self.pc.localDescription.sdp)

    async def post(self, path: str, offer: str, **headers: str) -> httpx.Response:
        """POST an offer and, when it was accepted, take the answer."""
        self.answered = await self.http.post(path, content=offer, headers=SDP | headers)
        if self.answered.status_code == 201:
            await self.pc.setRemoteDescription(RTCSessionDescription(self.answered.text, "answer"))
        return self.answered

    async def publish(self, path: str, *tracks: MediaStreamTrack, **headers: str) -> httpx.Response:
        """Send tracks; returns when connected."""
        answer = await self.post(path, await self.offer(*tracks), **headers)
        assert answer.status_code == 201, answer.text
        await until(self.connected)
        return answer

    async def view(self, path: str, *kinds: str) -> MediaStreamTrack:
        """Receive; returns the first track when connected."""
        answer = await self.post(path, await self.offer(*(kinds or ("video",))))
        assert answer.status_code == 201, answer.text
        await until(self.connected)
        return await asyncio.wait_for(self.tracks.get(), PATIENCE)

    async def delete(self) -> httpx.Response:
        assert self.answered is not None
        return await self.http.delete(self.answered.headers["Location"])

    async def close(self) -> None:
        await self.pc.close()

    def _changed(self) -> None:
        if self.pc.connectionState == "connected":
            self.connected.set()
        if self.pc.connectionState in ("closed", "failed"):
            self.ended.set()


async def until(event: asyncio.Event) -> None:
    """Wait for an event, with patience."""
    await asyncio.wait_for(event.wait(), PATIENCE)


async def eventually(true: Callable[[], object], patience: float = PATIENCE) -> None:
    """Wait until something holds that tells nobody when it does."""
    deadline = time.monotonic() + patience
    while not true():
        assert time.monotonic() < deadline, "it did not come to be"
        await asyncio.sleep(0.01)


class Server:
    """A hub with a fake stylizer behind the WHIP and WHEP routes, with their middleware."""

    def __init__(self, settings: ServerSettings, live: LiveSettings, connect_s: float) -> None:
        self.hub = Hub(live, load=lambda model, size, *rest, **more: FakeStylizer(size))
        self.guard = Guard(settings.tokens, required=settings.exposed)
        self.peers = Peers(settings, connect_s)
        self.app = FastAPI()
        self.app.include_router(whip.router(self.hub, settings, self.guard, self.peers))
        self.app.add_middleware(Gate, settings=settings, guard=self.guard, answers=Counting())

        @self.app.exception_handler(Refused)
        async def refused(request: Request, error: Refused) -> Any:
            return problem(error.status, error.message, error.hint, error.headers)


class Counting(dict[int, int]):
    """A counter that keeps nothing: the middleware wants one."""

    def __missing__(self, key: int) -> int:
        return 0


@asynccontextmanager
async def serving(
    live: LiveSettings | None = None, *, connect_s: float = PATIENCE, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Server]]:
    """An HTTP client and the server it talks to; sizes are small and requests unlimited unless told otherwise."""
    server = Server(
        ServerSettings(**{"rate_per_s": 0.0, **settings}),
        live or LiveSettings(box=(320, 240), max_streams=4),
        connect_s,
    )
    transport = httpx.ASGITransport(server.app)
    tuning.install()
    try:
        async with (
            server.app.router.lifespan_context(server.app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8787") as http,
        ):
            yield http, server
    finally:
        tuning.uninstall()
        await asyncio.to_thread(server.hub.close)
