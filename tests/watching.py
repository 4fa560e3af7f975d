"""Viewers in a process of their own: `python -m tests.watching N` writes N offers, reads N answers, and watches.

One JSON string per line. It says "seen" when everybody has seen a picture, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys

from aiortc import RTCSessionDescription

from tests.test_rtc_viewer import Player


async def main(count: int) -> None:
    players = [Player() for _ in range(count)]
    for player in players:
        await player.pc.setLocalDescription()
        print(json.dumps(player.pc.localDescription.sdp), flush=True)
    for player in players:
        answer = json.loads(await asyncio.to_thread(sys.stdin.readline))
        await player.pc.setRemoteDescription(RTCSessionDescription(answer, "answer"))
    await asyncio.gather(*(player.see(1) for player in players))
    print('"seen"', flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await asyncio.gather(*(player.close() for player in players))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
