"""Publishers and viewers that come and go by the hundred leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from fractions import Fraction
from typing import Any

import av
import httpx
import psutil
from aiortc import MediaStreamTrack

from tests.fakes import PATIENCE
from tests.whip_client import NETWORK, Client, Server, eventually, numbered, serving

pytestmark = NETWORK

CYCLES = 600 if os.environ.get("LIVESTYLE_SOAK") else 40
WARM = 10  # cycles before the first count: imports, caches, thread pools
GROWTH_MB = 25.0


class StillTrack(MediaStreamTrack):
    """One keyframe, encoded once, again and again: costs the sender nothing."""

    kind = "video"
    mime = "video/H264"

    def __init__(self) -> None:
        super().__init__()
        encoder: Any = av.CodecContext.create("libx264", "w")
        encoder.width, encoder.height, encoder.pix_fmt = 160, 120, "yuv420p"
        encoder.time_base, encoder.framerate = Fraction(1, 30), Fraction(30)
        encoder.options = {"preset": "ultrafast", "tune": "zerolatency", "profile": "baseline"}
        frame = av.VideoFrame.from_ndarray(numbered(5, (160, 120)), "rgb24").reformat(format="yuv420p")
        self._data = b"".join(bytes(packet) for packet in encoder.encode(frame))
        self._count = 0

    async def recv(self) -> av.Packet:
        await asyncio.sleep(0.02)
        packet = av.Packet(self._data)
        packet.pts, packet.time_base = self._count * 1800, Fraction(1, 90_000)
        self._count += 1
        return packet


def counts() -> dict[str, float]:
    gc.collect()
    process = psutil.Process()
    return {
        "threads": threading.active_count(),
        "tasks": len(asyncio.all_tasks()),
        "fds": process.num_fds(),
        "MB": process.memory_info().rss / 2**20,
    }


async def cycle(http: httpx.AsyncClient, server: Server, number: int) -> None:
    """Publish until a picture comes, watch until one comes, and leave: by DELETE, or by the connection alone."""
    stream = server.hub.get("cam") or server.hub.open("cam")
    box = stream.originals.subscribe(1)
    publisher, viewer = Client(http), Client(http)
    await publisher.publish("/whip/cam", StillTrack())
    await asyncio.wait_for(box.aget(), PATIENCE)
    box.close()
    track = await viewer.view("/whep/cam")
    await asyncio.wait_for(track.recv(), PATIENCE)
    for client in (publisher, viewer):
        if number % 2:
            assert (await client.delete()).status_code == 200
        await client.close()
    await eventually(lambda: not server.peers.sessions and stream.feeding is None)


def test_connections_that_come_and_go_leave_nothing_behind() -> None:
    async def main() -> tuple[dict[str, float], dict[str, float]]:
        async with serving() as (http, server):
            before: dict[str, float] = {}
            for number in range(CYCLES):
                await cycle(http, server, number)
                if number == WARM - 1:
                    before = counts()
            await eventually(lambda: len(asyncio.all_tasks()) <= before["tasks"])
            await eventually(lambda: threading.active_count() <= before["threads"])
            return before, counts()

    before, after = asyncio.run(main())
    print(CYCLES, before, after)
    assert after["fds"] <= before["fds"]
    assert after["MB"] - before["MB"] < GROWTH_MB
