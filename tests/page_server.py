"""The real server on a free port of loopback with the fake stylizer, for tests that drive a browser."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from stream.hub import Hub, LiveSettings
from stream.server.app import create_app
from stream.server.serve import configured, listening
from stream.server.settings import ServerSettings
from tests.fakes import PATIENCE, FakeStylizer


def inverting(model: str, size: tuple[int, int], engine: str, say: Callable[[str], None], **build: Any) -> FakeStylizer:
    """In the place of `models.load.load`."""
    return FakeStylizer(size)


@dataclass
class Served:
    """A server that runs."""

    url: str
    hub: Hub


@contextmanager
def serving(recordings: Path, load: Callable[..., Any] = inverting, **changes: Any) -> Iterator[Served]:
    """Run a server in a thread until the block ends; `changes` are of `ServerSettings`."""
    settings = ServerSettings(port=0, recordings=recordings, rate_per_s=0, **changes)
    hub = Hub(LiveSettings(box=settings.live.box), load)
    started = threading.Event()
    with listening(settings) as sock:
        settings = settings.model_copy(update={"port": sock.getsockname()[1]})
        app = create_app(hub, settings)
        server = uvicorn.Server(configured(app, settings))
        startup = server.startup

        async def begin(sockets: Any = None) -> None:
            await startup(sockets)
            started.set()

        server.startup = begin  # type: ignore[method-assign]
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), name="page-server")
        thread.start()
        try:
            assert started.wait(PATIENCE)
            yield Served(f"http://127.0.0.1:{settings.port}", hub)
        finally:
            app.state.closing.set()
            server.should_exit = True
            thread.join(3 * PATIENCE)
            hub.close()
            assert not thread.is_alive()
