"""The ASGI application: every router, one form of error, and the order in which things end."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from accel.errors import UserError
from stream.hub import Busy, Hub
from stream.rtc import tuning
from stream.server import api, events, metrics, pages, pictures, whip
from stream.server.auth import Guard
from stream.server.errors import Refused, problem
from stream.server.limits import Gate
from stream.server.reach import Reach
from stream.server.settings import ServerSettings

log = logging.getLogger(__name__)

THREADS = 24  # for calls that may take long: opening sinks, looking names up, JPEG

ABOUT = """Live video stylization. Streams come in by WHIP or from a source, and go out by WHEP, pictures, recordings
and outputs. Every refusal is `{"error": …, "hint": …}`. Where tokens are needed, send `Authorization: Bearer TOKEN` or
`?token=TOKEN`.

`/api/v1/events` is a WebSocket: `{"type": "status", "stream", "status"}` for each stream every second and at once on a
change, and `{"type": "event", "stream", "kind", "text", "at", "data"}`."""


def create_app(hub: Hub, settings: ServerSettings) -> FastAPI:
    """Everything a server answers; it closes `hub` at its end.

    `app.state.closing` is set when it is about to end, `app.state.urls` are the addresses others reach it by.

    >>> uvicorn.run(create_app(Hub(LiveSettings()), ServerSettings()))
    """
    tuning.install()
    guard = Guard(settings.tokens, required=settings.exposed)
    answers: Counter[int] = Counter()
    app = FastAPI(
        title="livestyle",
        version=api.version(),
        description=ABOUT,
        openapi_url="/api/v1/openapi.json",
        docs_url=None,  # its scripts come from elsewhere
        redoc_url=None,
        lifespan=_lifespan(hub),
    )
    app.state.closing = asyncio.Event()
    app.state.urls = ()
    app.add_middleware(Gate, settings=settings, guard=guard, answers=answers)
    app.include_router(api.router(hub, settings, guard, Reach(settings)))
    app.include_router(events.router(hub, guard))
    app.include_router(pictures.router(hub, settings, guard))
    app.include_router(metrics.router(hub, guard, answers))
    app.include_router(whip.router(hub, settings, guard))
    app.include_router(pages.router())
    _answer_errors(app)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _lifespan(hub: Hub) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        """At the end peers go first, by their router's lifespan, then streams."""
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="server")
        asyncio.get_running_loop().set_default_executor(pool)
        try:
            yield
        finally:
            app.state.closing.set()
            await asyncio.to_thread(hub.close)
            pool.shutdown(wait=False, cancel_futures=True)

    return lifespan


def _answer_errors(app: FastAPI) -> None:
    """One form for everything that goes wrong."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return problem(error.status, error.message, error.hint, error.headers)

    @app.exception_handler(UserError)
    async def users(request: Request, error: UserError) -> JSONResponse:
        return problem(422, error.message, error.hint)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> JSONResponse:
        return problem(503, str(error), error.hint, {"Retry-After": str(round(error.retry_after_s))})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
        return problem(422, f"{where}: {first['msg']}"[:500], "see /api/v1/openapi.json")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail).lower(), "", error.headers)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        return problem(500, "an internal error", "the server's log tells what it was")


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with how to bring a token."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        document.setdefault("components", {})["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "token": {"type": "apiKey", "in": "query", "name": "token"},
        }
        document["security"] = [{"bearer": []}, {"token": []}, {}]
        app.openapi_schema = document
    return app.openapi_schema
