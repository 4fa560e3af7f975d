"""Network cameras, against a GStreamer RTSP server with a clock in its picture."""

from __future__ import annotations

import itertools
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from accel.errors import UserError
from bench.clockcode import draw, now_ms, read
from models.params import Params
from stream.frame import Frame
from stream.pump import pump
from stream.session import Session
from stream.sound import Sound, samples_of
from stream.source import SourceLost, open_source
from stream.sources import network
from tests.fakes import PATIENCE, in_a_quiet_moment

SYSTEM_PYTHON = Path("/usr/bin/python3")
PROBE = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"


def has_gstreamer() -> bool:
    if not SYSTEM_PYTHON.exists():
        return False
    return subprocess.run([SYSTEM_PYTHON, "-c", PROBE], capture_output=True, check=False).returncode == 0


needs_gstreamer = pytest.mark.skipif(not has_gstreamer(), reason="needs gstreamer's RTSP server")


class Camera:
    """A GStreamer RTSP server in a process of its own."""

    def __init__(self, *options: str, port: int = 0) -> None:
        command = [SYSTEM_PYTHON, Path(__file__).parent / "gst_rtsp.py", "--port", str(port), *options]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()

    @property
    def port(self) -> int:
        return int(self.url.split(":")[2].split("/")[0])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()


@pytest.fixture
def camera() -> Iterator[Callable[..., Camera]]:
    made: list[Camera] = []

    def start(*options: str, port: int = 0) -> Camera:
        made.append(Camera(*options, port=port))
        return made[-1]

    yield start
    for one in made:
        one.kill()


def age_ms(frame: Frame) -> float:
    told = read(frame.image)
    assert told is not None
    return frame.captured * 1000 - told


# the clock in the picture


@pytest.mark.parametrize("size", [(640, 360), (512, 288), (256, 144)])
def test_the_clock_survives_scaling_and_noise(size: tuple[int, int]) -> None:
    import cv2

    image = draw(np.full((360, 640, 3), 90, np.uint8), 0xDEADBEEF)
    noisy = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(float)
    noisy = np.clip(0.7 * noisy + 30 + np.random.default_rng(0).normal(0, 12, noisy.shape), 0, 255).astype(np.uint8)
    assert read(noisy) == 0xDEADBEEF
    assert read(np.full((360, 640, 3), 90, np.uint8)) is None
    assert read(np.random.default_rng(0).integers(0, 255, (360, 640, 3), np.uint8)) is None


# latency


@needs_gstreamer
@pytest.mark.parametrize("options", [(), ("--udp",), ("--audio", "--gop", "120")])
@in_a_quiet_moment
def test_pictures_are_young_from_the_first_on(camera: Callable[..., Camera], options: tuple[str, ...]) -> None:
    server = camera(*options)
    began = time.monotonic()
    with closing(open_source(server.url)) as source:
        opened = time.monotonic() - began
        ages = [age_ms(frame) for frame in itertools.islice(source.frames(), 60)]
    assert opened < 2.0  # does not wait for a second keyframe
    assert np.percentile(ages[1:15], 50) <= 60  # nothing had piled up
    assert np.percentile(ages[15:], 50) <= 60


@needs_gstreamer
@in_a_quiet_moment
def test_what_came_while_nobody_read_is_not_shown(camera: Callable[..., Camera]) -> None:
    with closing(open_source(camera().url)) as source:
        threading.Event().wait(1.5)  # a model is being loaded
        ages = [age_ms(frame) for frame in itertools.islice(source.frames(), 40)]
    assert ages[0] < 500
    assert np.percentile(ages[:15], 50) <= 100


# sound


@needs_gstreamer
@in_a_quiet_moment
def test_sound_comes_along_in_step_with_the_pictures(camera: Callable[..., Camera]) -> None:
    server = camera("--audio")
    heard: list[Sound] = []
    ages = []
    with closing(network.open_source(server.url, None, "fit")) as source:
        source.sound = heard.append
        for frame in itertools.islice(source.frames(), 80):
            ages.append(age_ms(frame))
    assert len(heard) > 50
    gaps = np.diff([sound.captured for sound in heard])
    assert np.abs(gaps - 0.02).max() < 0.03
    loud = np.array([np.abs(samples_of(sound)).max() > 2000 for sound in heard])
    edges = [heard[i + 1].captured for i in np.nonzero(np.diff(loud.astype(int)))[0]]  # each whole second of the clock
    assert edges
    late = [(edge + 0.5) % 1.0 - 0.5 for edge in edges]
    assert abs(np.median(late) * 1000 - np.median(ages)) < 90  # lips: 1470 samples, an AAC frame and a picture wide


@needs_gstreamer
def test_sound_is_left_alone_where_nobody_asked(camera: Callable[..., Camera]) -> None:
    with closing(open_source(camera("--audio").url)) as source:
        assert sum(1 for _ in itertools.islice(source.frames(), 10)) == 10


# faults


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "READ_S", 1.0)
    monkeypatch.setattr(network, "OPEN_S", 3.0)


@needs_gstreamer
@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("options", "says"), [((), "camera"), (("--audio",), "sound but no picture")])
def test_a_camera_that_stops_sending_pictures_is_lost(
    camera: Callable[..., Camera], options: tuple[str, ...], says: str
) -> None:
    server = camera("--mute-after", "20", *options)
    began = time.monotonic()
    with closing(open_source(server.url)) as source, pytest.raises(SourceLost, match=says):
        for _ in source.frames():
            pass
    assert time.monotonic() - began < PATIENCE


@needs_gstreamer
@pytest.mark.usefixtures("hasty")
def test_a_camera_with_sound_only_is_refused(camera: Callable[..., Camera]) -> None:
    with pytest.raises(UserError, match="no video"):
        open_source(camera("--no-video", "--audio").url)


@needs_gstreamer
@pytest.mark.usefixtures("hasty")
def test_a_camera_that_answers_and_sends_nothing_is_refused_in_time(camera: Callable[..., Camera]) -> None:
    server = camera("--mute-after", "0")
    began = time.monotonic()
    with pytest.raises(UserError):
        open_source(server.url)
    assert time.monotonic() - began < PATIENCE


@pytest.mark.usefixtures("hasty")
def test_a_camera_that_accepts_and_says_nothing_is_refused_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        began = time.monotonic()
        with pytest.raises(UserError, match="no answer"):
            open_source(f"rtsp://127.0.0.1:{mute.getsockname()[1]}/camera")
    assert time.monotonic() - began < 5


@needs_gstreamer
@pytest.mark.usefixtures("hasty")
def test_a_camera_that_dies_and_comes_back_goes_on(camera: Callable[..., Camera]) -> None:
    """On the way it comes back with sound alone, which is a failure and not the end."""
    first = camera("--audio")
    url, port = first.url, first.port
    session = Session("camera", Params(), live=True)
    tried = threading.Semaphore(0)

    def delays() -> Iterator[float]:
        while True:
            tried.release()
            yield 0.1

    reader = threading.Thread(
        target=lambda: session.isolate(lambda: pump(lambda: open_source(url), session, delays=delays))
    )
    reader.start()
    try:
        before = [session.inbox.get(PATIENCE) for _ in range(5)]
        first.kill()
        assert tried.acquire(timeout=PATIENCE)
        deaf = camera("--no-video", "--audio", port=port)
        for _ in range(2):  # the attempt under way, and one that met it
            assert tried.acquire(timeout=PATIENCE)
        assert session.error is None
        deaf.kill()
        killed = now_ms()
        camera("--audio", port=port)
        after = session.inbox.get(2 * PATIENCE)
        while (read(after.image) or 0) < killed:
            after = session.inbox.get(2 * PATIENCE)
        assert after.seq > before[-1].seq
        assert after.pts > before[-1].pts
        assert session.phase == "running"
    finally:
        session.stop()
        reader.join(PATIENCE)
    assert session.error is None
