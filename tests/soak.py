"""Publishers and viewers that come and go, in a process of their own: `python -m tests.soak CYCLES`.

Prints a line of JSON: what the process held after the first cycles, and after the last. In the process of the tests,
memory that others left in pieces would hide what the server takes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
from contextlib import suppress
from fractions import Fraction
from typing import Any

import av
import httpx
import psutil
from aiortc import MediaStreamTrack

from accel.machine import limit_arenas
from tests.fakes import PATIENCE
from tests.whip_client import Client, Server, eventually, numbered, serving

WARM = 10  # cycles before the first count: imports, caches, thread pools


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


async def main(cycles: int) -> None:
    async with serving() as (http, server):
        before: dict[str, float] = {}
        for number in range(cycles):
            await cycle(http, server, number)
            if number == WARM - 1:
                before = counts()
        with suppress(AssertionError):  # what is left then is in the counts
            await eventually(lambda: all(count <= before[name] for name, count in counts().items() if name != "MB"))
        print(json.dumps([before, counts()]))


if __name__ == "__main__":
    limit_arenas()  # as `livestyle serve` does
    asyncio.run(main(int(sys.argv[1])))
