"""One stream's faults are its own: whatever breaks beside it, another stream loses no frame."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from accel.errors import UserError
from models.params import Params
from stream.config import patched
from stream.frame import Frame
from stream.live import Stream
from stream.source import SourceLost
from tests.fakes import PATIENCE, SIZE, FakeSink, FakeSource
from tests.serving import Paced, Serving, eventually, serving

FPS = 12.0  # of the steady stream: slow enough that a busy machine alone drops nothing
AFTER = 12  # frames that must come after the fault


class Breaking(Paced):
    """A camera that is pulled out after ten pictures."""

    def frames(self) -> Iterator[Frame]:
        for frame in super().frames():
            yield frame
            if frame.seq == 10:
                raise SourceLost("pulled out")


class Crashing(Paced):
    """A source with a bug."""

    def frames(self) -> Iterator[Frame]:
        yield from FakeSource.frames(self)
        raise ZeroDivisionError("a bug")


class Stuck(FakeSink):
    """An output that takes one frame and never returns, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def write(self, frame: Frame) -> None:
        self.go.wait(PATIENCE)


def source_lost(server: Serving) -> None:
    bad = server.hub.open("bad")
    bad.feed(lambda box, fit: Breaking(60.0, SIZE), "a camera", retry=True)
    eventually(lambda: bad.reconnects)


def source_with_a_bug(server: Serving) -> None:
    bad = server.hub.open("bad")
    source = Crashing(60.0, SIZE)
    source._count = 5
    bad.feed(lambda box, fit: source, "a camera", retry=False)
    eventually(lambda: bad.feeding is None)


def source_that_cannot_be_opened(server: Serving) -> None:
    def refused(box: object, fit: str) -> Any:
        raise UserError("cannot open rtsp://camera: connection refused")

    bad = server.hub.open("bad")
    bad.feed(refused, "rtsp://camera", retry=True)
    eventually(lambda: "refused" in bad.words())


def model_that_raises(server: Serving) -> None:
    bad = server.hub.open("bad", params=patched(Params(), {"style.prompt": "boom"}))
    bad.feed(lambda box, fit: Paced(60.0, SIZE), "a camera", retry=False)
    eventually(lambda: bad.phase == "failed")


def output_that_fails(server: Serving) -> None:
    bad = server.stream("bad", fps=60.0)
    output = bad.attach(FakeSink(raises=OSError(28, "No space left on device")))
    eventually(lambda: not output.is_alive())
    assert bad.phase == "live"


def output_that_hangs(server: Serving) -> None:
    sink = Stuck()
    bad = server.stream("bad", fps=60.0)
    bad.attach(sink)
    before = bad.meter.frames_out
    eventually(lambda: bad.meter.frames_out > before + 60)
    sink.go.set()


def viewer_that_never_reads(server: Serving) -> None:
    bad = server.stream("bad", fps=60.0)
    host, port = urlsplit(server.url).netloc.split(":")
    with socket.create_connection((host, int(port))) as viewer:
        viewer.sendall(f"GET /stream/bad.mjpg HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        before = bad.meter.frames_out
        eventually(lambda: bad.meter.frames_out > before + 60)


def offers_that_are_none(server: Serving) -> None:
    for body in (b"", b"v=0", b"\xff" * 1000, b"v=0\r\no=- 1 1 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\nm=video 9 X 1\r\n"):
        answer = server.client.post("/whip/bad", content=body, headers={"Content-Type": "application/sdp"})
        assert 400 <= answer.status_code < 500
        assert answer.json()["error"]


def stream_removed_while_live(server: Serving) -> None:
    server.stream("bad", fps=60.0)
    assert server.client.delete("/api/v1/streams/bad").status_code == 204


def settings_that_are_wrong(server: Serving) -> None:
    server.stream("bad", fps=60.0)
    for changes in ({"style.steps": 99}, {"nothing.such": 1}, {"temporal.flow": "farneback"}, {"style.prompt": 5}):
        assert server.client.patch("/api/v1/streams/bad/params", json=changes).status_code == 422


FAULTS: tuple[Callable[[Serving], None], ...] = (
    source_lost,
    source_with_a_bug,
    source_that_cannot_be_opened,
    model_that_raises,
    output_that_fails,
    output_that_hangs,
    viewer_that_never_reads,
    offers_that_are_none,
    stream_removed_while_live,
    settings_that_are_wrong,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_another_stream_loses_no_frame(
    fault: Callable[[Serving], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with serving(tmp_path) as server:
        steady: Stream = server.stream("steady", fps=FPS)
        shown = steady.outlets.subscribe(10_000)
        fault(server)
        frames: list[Frame] = []
        while len(frames) < AFTER or len(shown):
            frames.append(shown.get(PATIENCE))
        assert [frame.seq for frame in frames] == list(range(frames[0].seq, frames[0].seq + len(frames)))
        assert steady.phase == "live"
        assert server.client.get("/healthz").status_code == 200
    caplog.clear()
