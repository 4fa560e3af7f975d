"""Publishing over RTMP, RTSP and SRT to a server that listens in a process of its own."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from accel.errors import UserError
from stream import hardware
from stream.frame import Frame, VideoSpec
from stream.sink import check_sink, open_sink
from stream.sinks import publish
from stream.sinks.publish import PublishSink
from stream.sound import SAMPLES, sound_of
from tests.fakes import PATIENCE

ROOT = Path(__file__).parents[1]
RED, GREEN = (200, 30, 30), (30, 180, 30)
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")


def spec(width: int = 160, height: int = 96) -> VideoSpec:
    return VideoSpec(width, height, fps=30.0, live=True)


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


def flat(colour: tuple[int, int, int], seq: int, size: tuple[int, int] = (160, 96)) -> Frame:
    image = np.empty((size[1], size[0], 3), np.uint8)
    image[:] = colour
    return Frame(image, seq * 33_333, seq, 50.0 + seq / 30)


def soon() -> Iterator[float]:
    while True:
        yield 0.1


class Receiver:
    """A listening server and what it says."""

    def __init__(self, url: str) -> None:
        self.said: queue.Queue[dict[str, Any]] = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.receiver", url], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.until(lambda said: "listening" in said)

    def _listen(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            for line in lines:
                self.said.put(json.loads(line))

    def until(self, right: Callable[[dict[str, Any]], bool], patience: float = 2 * PATIENCE) -> dict[str, Any]:
        """The first line that is right."""
        deadline = time.monotonic() + patience
        while True:
            said = self.said.get(timeout=max(0.01, deadline - time.monotonic()))
            if right(said):
                return said

    def kill(self) -> None:
        if self.process.poll() is None:
            for process in (*psutil.Process(self.process.pid).children(), self.process):
                process.kill()
        self.process.wait()
        self._listener.join(PATIENCE)


@pytest.fixture
def receive() -> Iterator[Callable[[str], Receiver]]:
    opened: list[Receiver] = []

    def start(url: str) -> Receiver:
        opened.append(Receiver(url))
        return opened[-1]

    yield start
    for receiver in opened:
        receiver.kill()


class Camera(threading.Thread):
    """Writes pictures and a tone at 30 fps until it is stopped."""

    def __init__(self, sink: PublishSink, size: tuple[int, int] = (160, 96)) -> None:
        super().__init__(daemon=True)
        self.sink, self.size = sink, size
        self.colour = RED
        self.slowest = 0.0  # s a write took
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        seq = 0
        wave = (np.sin(np.arange(SAMPLES) * 0.06) * 9000).astype(np.int16)
        tone = np.stack([wave, wave], axis=1)
        while not self._done.wait(1 / 30):
            frame = flat(self.colour, seq, self.size)
            for piece in range(seq * 5 // 3, (seq + 1) * 5 // 3):  # 50 pieces to 30 pictures
                self.sink.hear(sound_of(tone, 50.0 + piece / 50))
            began = time.perf_counter()
            self.sink.write(frame)
            self.slowest = max(self.slowest, time.perf_counter() - began)
            seq += 1

    def stop(self) -> None:
        self._done.set()
        self.join(PATIENCE)


def near(colour: tuple[int, int, int]) -> Callable[[dict[str, Any]], bool]:
    return lambda said: "picture" in said and max(abs(a - b) for a, b in zip(said["colour"], colour, strict=True)) < 20


def urls() -> list[Any]:
    return [
        "rtmp://127.0.0.1:{}/live/key",
        "rtsp://127.0.0.1:{}/live",
        pytest.param("srt://127.0.0.1:{}", marks=needs_ffmpeg),
    ]


@pytest.mark.parametrize("url", urls())
def test_pictures_and_sound_arrive_and_a_server_that_was_away_is_found_again(
    receive: Callable[[str], Receiver], url: str
) -> None:
    url = url.format(free_port())
    server = receive(url)
    sink = PublishSink(url, spec(), delays=soon)
    camera = Camera(sink)
    try:
        first = server.until(near(RED))
        assert first["size"] == [160, 96]
        assert set(first["tracks"]) == {"video", "audio"}
        assert server.until(lambda said: said.get("sound", 0) > 0)
        assert sink.state == "live"
        camera.colour = GREEN
        server.until(near(GREEN))
        camera.size = (96, 160)  # a phone that was turned: bars left and right
        server.until(lambda said: "picture" in said and 20 < said["colour"][1] < 120 and said["size"] == [160, 96])
        camera.size = (160, 96)
        server.kill()
        back = receive(url)
        again = back.until(near(GREEN))
        assert again["picture"] == 0  # it began with a keyframe
        assert again["key"]
    finally:
        camera.stop()
        began = time.monotonic()
        sink.close()
    assert time.monotonic() - began < 2 * publish.LEAVE_S + 1
    assert camera.slowest < 0.25  # whatever the network did; a pipe to a stuck process takes for ever
    assert sink.state == "closed"
    assert sink.process
    assert sink.process.poll() is not None


def test_a_card_that_has_no_session_left_stops_no_broadcast(
    receive: Callable[[str], Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hardware._chosen, "encoder", "nvenc")
    url = f"rtmp://127.0.0.1:{free_port()}/live/key"
    server = receive(url)
    sink = PublishSink(url, spec(), delays=soon)
    camera = Camera(sink)
    try:
        assert server.until(near(RED))["key"]
    finally:
        camera.stop()
        sink.close()


def test_a_first_connection_that_is_refused_is_two_lines_without_the_key() -> None:
    with pytest.raises(UserError, match="connection refused") as caught:
        open_sink(f"rtmp://user:secret@127.0.0.1:{free_port()}/live?key=secret", spec())
    assert caught.value.hint
    assert "secret" not in caught.value.message + caught.value.hint


def test_a_later_failure_is_a_state_in_words() -> None:
    seen = threading.Event()

    def once() -> Iterator[float]:
        seen.set()
        while True:
            yield 5.0

    sink = PublishSink(f"rtsp://127.0.0.1:{free_port()}/live", spec(), delays=once)
    try:
        wait_for(lambda: sink.state.startswith("retrying"))
        assert sink.state == "retrying in 5 s: connection refused"
    finally:
        began = time.monotonic()
        sink.close()
    assert time.monotonic() - began < 1  # it was only waiting


def test_a_child_that_dies_is_replaced(receive: Callable[[str], Receiver]) -> None:
    url = f"rtmp://127.0.0.1:{free_port()}/live/key"
    server = receive(url)
    sink = PublishSink(url, spec(), delays=soon)
    camera = Camera(sink)
    try:
        server.until(near(RED))
        child = sink.process
        assert child
        child.kill()
        server.until(lambda said: "ended" in said)
        receive(url).until(near(RED))
        assert sink.process is not child
    finally:
        camera.stop()
        sink.close()


def test_a_server_that_accepts_and_says_nothing_stops_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        sink = PublishSink(
            f"rtmp://127.0.0.1:{mute.getsockname()[1]}/live/key", spec(640, 360), delays=soon, patience_s=0.5
        )
        camera = Camera(sink, (640, 360))
        try:
            wait_for(lambda: sink.state.startswith("retrying"))
            assert "no answer in time" in sink.state
        finally:
            camera.stop()
            sink.close()
    assert camera.slowest < 0.25
    assert sink.dropped > 0


def test_the_child_dies_with_its_parent() -> None:
    code = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from stream.frame import VideoSpec
        from stream.sinks.publish import PublishSink
        sink = PublishSink(sys.argv[1], VideoSpec(64, 64, 30.0, True), patience_s=3.0)
        while sink.process is None: time.sleep(0.01)
        print(sink.process.pid, flush=True)
        sys.stdin.read()
        """
    )
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"rtmp://127.0.0.1:{mute.getsockname()[1]}/live/key"
        parent = subprocess.Popen(
            [sys.executable, "-c", code, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with parent:
            assert parent.stdout
            child = psutil.Process(int(parent.stdout.readline()))
            os.kill(parent.pid, signal.SIGKILL)
        gone, _ = psutil.wait_procs([child], 2 * PATIENCE)
    assert gone


def test_srt_needs_a_program_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="ffmpeg") as caught:
        check_sink("srt://127.0.0.1:9")
    assert "rtmp" in caught.value.hint


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 2 * PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
