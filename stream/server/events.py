"""What happens, told over a WebSocket: the status of every stream each second and at once when something changes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, WebSocket
from starlette.websockets import WebSocketDisconnect

from stream.hub import Hub
from stream.live import Event, Stream
from stream.mailbox import Mailbox, MailboxClosed
from stream.server.auth import Guard
from stream.server.errors import Refused

EVERY_S = 1.0
FRESH_S = 0.2  # a status younger than this is told again rather than made again
ROOM = 64  # events a slow listener may lag behind
LISTENERS = 64
STUCK_S = 10.0  # a listener that takes nothing for so long is sent away
GOING_AWAY = 1001  # RFC 6455 §7.4.1


class Statuses:
    """The statuses of streams, made at most once per `FRESH_S` however many ask. The time is an argument, s."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[float, Stream, dict[str, Any]]] = {}

    def of(self, stream: Stream, now: float, *, changed: bool = False) -> dict[str, Any]:
        """The status of a stream; `changed`: not the one from before."""
        made = self._made.get(stream.name)
        if made is None or changed or made[1] is not stream or now - made[0] >= FRESH_S:
            made = self._made[stream.name] = (now, stream, stream.status())
        return made[2]

    def keep(self, names: set[str]) -> None:
        """Forget all streams but these."""
        for name in self._made.keys() - names:
            del self._made[name]


def router(hub: Hub, guard: Guard) -> APIRouter:
    """`/api/v1/events`."""
    routes = APIRouter(dependencies=[Depends(guard("view"))])
    statuses = Statuses()
    listeners: set[WebSocket] = set()

    @routes.websocket("/api/v1/events")
    async def events(socket: WebSocket, stream: Annotated[str | None, Query(max_length=64)] = None) -> None:
        """Statuses and events of one stream, or of all; what the client sends is ignored."""
        if len(listeners) >= LISTENERS:
            raise Refused(503, f"{LISTENERS} listeners are all this server takes", "", {"Retry-After": "10"})
        await socket.accept()
        listeners.add(socket)
        box = hub.events.subscribe(ROOM)
        telling = asyncio.ensure_future(_tell(hub, statuses, socket, box, stream))
        leaving = asyncio.ensure_future(_left(socket))
        closing = asyncio.ensure_future(socket.app.state.closing.wait())
        tasks = (telling, leaving, closing)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not leaving.done() and not telling.done():
                await _cancelled(telling)
                await socket.close(GOING_AWAY)
        finally:
            listeners.discard(socket)
            box.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    return routes


async def _tell(hub: Hub, statuses: Statuses, socket: WebSocket, box: Mailbox[Event], only: str | None) -> None:
    """Everything at first, then what changes, and everything again each second."""
    due = time.monotonic()
    while True:
        now = time.monotonic()
        if now >= due:
            due = now + EVERY_S
            streams = hub.streams()
            statuses.keep({stream.name for stream in streams})
            for stream in streams:
                if only in (None, stream.name):
                    await _send(socket, _status(stream, statuses.of(stream, now)))
        try:
            event = await asyncio.wait_for(box.aget(), max(0.0, due - time.monotonic()))
        except TimeoutError:
            continue
        except MailboxClosed:
            return
        if only in (None, event.stream):
            await _send(socket, {"type": "event", **asdict(event)})
            changed = hub.get(event.stream)
            if changed is not None:
                await _send(socket, _status(changed, statuses.of(changed, time.monotonic(), changed=True)))


def _status(stream: Stream, status: dict[str, Any]) -> dict[str, Any]:
    return {"type": "status", "stream": stream.name, "status": status}


async def _send(socket: WebSocket, message: dict[str, Any]) -> None:
    async with asyncio.timeout(STUCK_S):
        await socket.send_json(message)


async def _left(socket: WebSocket) -> None:
    try:
        while True:
            await socket.receive()
            await asyncio.sleep(0)
    except (WebSocketDisconnect, RuntimeError):  # RuntimeError: asked again after the disconnect
        return


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])
