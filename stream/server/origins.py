"""Which pages of other sites may read our WebRTC answers (CORS)."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from stream.server.auth import Guard
from stream.server.errors import Refused
from stream.server.settings import ServerSettings

EXPOSED = "Location, ETag, Link, Accept-Post, Accept-Patch, Retry-After, ID"
PREFLIGHT = {
    "Access-Control-Allow-Methods": "OPTIONS, GET, HEAD, POST, PATCH, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, If-Match",
    "Access-Control-Max-Age": "600",
}
Answer = Callable[[Request], Coroutine[Any, Any, Response]]


def cross_origin(settings: ServerSettings, guard: Guard) -> type[APIRoute]:
    """Routes whose answers, refusals too, say which pages may read them.

    Any page may that has a token. Without tokens (on loopback) only our own and `settings.origins`: else whatever site
    the user visits could watch the camera.
    """

    def headers(request: Request) -> dict[str, str]:
        origin = request.headers.get("origin", "")
        exposed = {"Access-Control-Expose-Headers": EXPOSED}
        if guard.on:
            return {"Access-Control-Allow-Origin": "*", **exposed}
        if origin and (origin in settings.origins or origin.partition("://")[2] == request.headers.get("host")):
            return {"Access-Control-Allow-Origin": origin, "Vary": "Origin", **exposed}
        return {"Vary": "Origin", **exposed}

    class Route(APIRoute):
        def get_route_handler(self) -> Answer:
            answer = super().get_route_handler()

            async def handle(request: Request) -> Response:
                try:
                    response: Response = await answer(request)
                except Refused as refused:
                    refused.headers.update(headers(request))
                    raise
                response.headers.update(headers(request))
                return response

            return handle

    return Route
