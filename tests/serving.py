"""A real server on a free port, in a thread, with fake models behind it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from stream.frame import Frame
from stream.hub import Hub, LiveSettings
from stream.live import Stream
from stream.server.app import create_app
from stream.server.serve import Server, configured, listening
from stream.server.settings import ServerSettings
from tests.fakes import PATIENCE, SIZE, FakeSource, FakeStylizer, picture


def fake_load(
    model: str, size: tuple[int, int], engine: str, say: Callable[[str], None], **build: object
) -> FakeStylizer:
    """What `Hub` loads in tests."""
    return FakeStylizer(size)


class Paced(FakeSource):
    """A live source that delivers at a rate until it is closed."""

    def __init__(self, fps: float, size: tuple[int, int]) -> None:
        super().__init__(1_000_000, live=True, size=size)
        self._size, self._apart_s, self._over = size, 1 / fps, threading.Event()

    def frames(self) -> Iterator[Frame]:
        for frame in super().frames():
            if self._over.wait(self._apart_s):
                return
            yield replace(frame, image=picture(frame.seq, self._size))

    def close(self) -> None:
        self._over.set()


@dataclass
class Serving:
    """A server that runs."""

    url: str
    hub: Hub
    client: httpx.Client
    server: Server

    def stream(self, name: str = "cam", fps: float = 50.0, size: tuple[int, int] = SIZE) -> Stream:
        """A stream that is live."""
        stream = self.hub.open(name)
        stream.feed(lambda box, fit: Paced(fps, size), "fake", retry=False)
        eventually(lambda: stream.phase == "live")
        return stream


@contextlib.contextmanager
def serving(
    tmp_path: Path, load: Callable[..., Any] = fake_load, box: tuple[int, int] = SIZE, **changes: Any
) -> Iterator[Serving]:
    """A server with these settings; warnings and errors of its threads are the test's."""
    settings = ServerSettings(**({"port": 0, "recordings": tmp_path / "recordings", "rate_per_s": 0} | changes))
    hub = Hub(LiveSettings(box=box, max_streams=settings.live.max_streams), load)
    app = create_app(hub, settings)
    ready = threading.Event()
    with listening(settings) as sock:
        server = Server(configured(app, settings), app, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="serving")
        thread.start()
        assert ready.wait(PATIENCE)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, timeout=PATIENCE) as client:
                yield Serving(url, hub, client, server)
        finally:
            server.stop()
            thread.join(PATIENCE)
            hub.close()
    assert not thread.is_alive()


def eventually(true: Callable[[], object]) -> None:
    """Wait until something is true; fails after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)
