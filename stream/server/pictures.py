"""Pictures over plain HTTP: a snapshot, motion JPEG, and a transport stream. They also work where no UDP does."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any
from weakref import WeakKeyDictionary

import cv2
import numpy as np
from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import Response
from numpy.typing import NDArray

from stream.frame import Frame
from stream.hub import Hub
from stream.live import Stream
from stream.mailbox import Fanout, MailboxClosed
from stream.server.api import known
from stream.server.auth import Guard
from stream.server.errors import Problem, Refused
from stream.server.settings import ServerSettings
from stream.server.station import Chunk, Encoding, Endless, Station
from stream.server.transport import TransportStream

QUALITY = 85  # of 100
MJPEG_PER_S = 15.0
TS_PER_S = 60.0
TS_ROOM = 60  # chunks
SNAPSHOT_S = 3.0
BOUNDARY = "frame"

Name = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="name of the stream")]
Original = Annotated[bool, Query(description="the source's pictures, before they are stylized")]


def jpeg(image: NDArray[np.uint8]) -> bytes:
    """A picture (H, W, 3) RGB as JPEG."""
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    if not done:
        raise ValueError("the JPEG encoder refused a picture")
    return data.tobytes()


class Parts:
    """A `station.Encoding`: every frame a part of multipart/x-mixed-replace."""

    def encode(self, frame: Frame, start: bool) -> Chunk:
        """The part with its boundary before it."""
        data = jpeg(frame.image)
        head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
        return Chunk(head.encode() + data + b"\r\n")

    def close(self) -> None:
        """Nothing to let go of."""


# what is sent → media type, encoding, room for chunks, frames per second at most
KINDS: dict[str, tuple[str, type[Encoding], int, float]] = {
    "mjpg": (f"multipart/x-mixed-replace; boundary={BOUNDARY}", Parts, 1, MJPEG_PER_S),
    "ts": ("video/mp2t", TransportStream, TS_ROOM, TS_PER_S),
}


def router(hub: Hub, settings: ServerSettings, guard: Guard) -> APIRouter:
    """`/stream/{name}.jpg`, `.mjpg` and `.ts`."""
    refusals: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in (401, 403, 404, 422, 503)}
    routes = APIRouter(tags=["pictures"], dependencies=[Depends(guard("view"))], responses=refusals)
    stations: WeakKeyDictionary[Stream, dict[tuple[str, bool], Station]] = WeakKeyDictionary()

    def station(stream: Stream, kind: str, original: bool) -> Station:
        _, encoding, room, per_s = KINDS[kind]
        of = stations.setdefault(stream, {})
        if (kind, original) not in of:
            of[kind, original] = Station(_frames(stream, original), encoding, room=room, per_s=per_s)
        return of[kind, original]

    def endless(request: Request, name: str, kind: str, original: bool) -> Response:
        stream = known(hub, name)
        if sum(other.viewers for other in hub.streams()) >= settings.max_viewers:
            raise Refused(503, f"{settings.max_viewers} viewers are all this server takes", "", {"Retry-After": "10"})
        stream.viewers += 1

        def left() -> None:
            stream.viewers -= 1

        return Endless(station(stream, kind, original), KINDS[kind][0], request.app.state.closing, left)

    @routes.get("/stream/{name}.jpg", responses={200: {"content": {"image/jpeg": {}}}}, response_class=Response)
    async def snapshot(name: Name, original: Original = False) -> Response:
        """The next picture."""
        box = _frames(known(hub, name), original).subscribe(1)
        try:
            frame = await asyncio.wait_for(box.aget(), SNAPSHOT_S)
        except (TimeoutError, MailboxClosed):
            raise Refused(503, "there is no picture", "start its source first", {"Retry-After": "2"}) from None
        finally:
            box.close()
        return Response(await asyncio.to_thread(jpeg, frame.image), media_type="image/jpeg")

    @routes.get("/stream/{name}.mjpg", responses={200: {"content": {KINDS["mjpg"][0]: {}}}}, response_class=Response)
    async def motion_jpeg(request: Request, name: Name, original: Original = False) -> Response:
        """Motion JPEG, up to 15 pictures a second: an <img> shows it."""
        return endless(request, name, "mjpg", original)

    @routes.get("/stream/{name}.ts", responses={200: {"content": {KINDS["ts"][0]: {}}}}, response_class=Response)
    async def transport_stream(request: Request, name: Name, original: Original = False) -> Response:
        """H.264 in an MPEG transport stream, for VLC, ffplay and OBS."""
        return endless(request, name, "ts", original)

    return routes


def _frames(stream: Stream, original: bool) -> Fanout[Frame]:
    return stream.originals if original else stream.outlets
