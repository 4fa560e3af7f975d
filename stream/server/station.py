"""One encoder thread for everybody who watches a stream over plain HTTP; it runs while somebody does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stream.frame import Frame
from stream.mailbox import Fanout, Mailbox, MailboxClosed

STUCK_S = 10.0  # a viewer that takes nothing for so long is sent away
IDLE_S = 1.0  # how long the thread outlives its last listener, at most


@dataclass(frozen=True, slots=True)
class Chunk:
    """Encoded bytes; `start`: one can begin to watch with them."""

    data: bytes
    start: bool = True


class Encoding(Protocol):
    """Turns frames into chunks, in one thread; `start` asks for one that can be begun with."""

    def encode(self, frame: Frame, start: bool) -> Chunk | None: ...
    def close(self) -> None: ...


class Station:
    """Frames in, chunks out to every listener. Thread-safe.

    `room`: chunks a slow listener may lag behind, before it goes on with the next start. `per_s`: frames per second at
    most.

    >>> box = Station(stream.outlets, Jpegs, room=1, per_s=15.0).listen()
    """

    def __init__(self, frames: Fanout[Frame], encoding: Callable[[], Encoding], *, room: int, per_s: float) -> None:
        self._frames, self._encoding, self._room, self._apart_s = frames, encoding, room, 1.0 / per_s
        self._chunks = Fanout[Chunk]()
        self._start = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def listen(self) -> Mailbox[Chunk]:
        """Every chunk from now on; close the mailbox to leave."""
        with self._lock:
            box = self._chunks.subscribe(self._room)
            self._start.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="station", daemon=True)
                self._thread.start()
        return box

    def restart(self) -> None:
        """Somebody has missed something: make a chunk that can be begun with."""
        self._start.set()

    def _run(self) -> None:
        encoding = self._encoding()
        frames = self._frames.subscribe(1)
        try:
            while self._wanted():
                with suppress(TimeoutError):
                    began = time.monotonic()
                    frame = frames.get(IDLE_S)
                    start = self._start.is_set()
                    self._start.clear()
                    chunk = encoding.encode(frame, start)
                    if chunk is not None:
                        self._chunks.put(chunk)
                    elif start:
                        self._start.set()
                    time.sleep(max(0.0, self._apart_s - (time.monotonic() - began)))
        except MailboxClosed:  # the stream is over
            self._chunks.close()
        finally:
            frames.close()
            encoding.close()

    def _wanted(self) -> bool:
        with self._lock:
            if len(self._chunks):
                return True
            self._thread = None
            return False


class Endless(Response):
    """What a station makes, sent as long as the viewer takes it and `closing` is not set.

    `left` is called once at the end, on the loop.
    """

    def __init__(self, station: Station, media_type: str, closing: asyncio.Event, left: Callable[[], None]) -> None:
        super().__init__(media_type=media_type)
        del self.headers["content-length"]
        self._station, self._closing, self._left = station, closing, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until somebody has enough."""
        box = self._station.listen()
        tasks: list[asyncio.Task[Any]] = []
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            ends = (self._deliver(box, send), self._gone(receive), self._closing.wait())
            tasks += [asyncio.ensure_future(end) for end in ends]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done() or tasks[0].exception() is None:  # else it is stuck and would take this neither
                await _ended(tasks[0])
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            for task in tasks:
                task.cancel()
            box.close()
            self._left()

    async def _deliver(self, box: Mailbox[Chunk], send: Send) -> None:
        missed, waiting = 0, True
        with suppress(MailboxClosed):
            while True:
                chunk = await box.aget()
                if box.dropped != missed:
                    missed, waiting = box.dropped, True
                    if not chunk.start:
                        self._station.restart()
                if chunk.start or not waiting:
                    waiting = False
                    async with asyncio.timeout(STUCK_S):
                        await send({"type": "http.response.body", "body": chunk.data, "more_body": True})

    async def _gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


async def _ended(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])
