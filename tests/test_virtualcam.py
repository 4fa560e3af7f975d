"""The virtual camera, against a backend in memory."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest

from accel.errors import UserError
from stream.frame import Frame, VideoSpec
from stream.sink import check_sink, open_sink
from stream.sinks import virtualcam
from tests.media import bars, bars_error

pyvirtualcam = pytest.importorskip("pyvirtualcam", reason="needs the virtualcam extra")


class Device:
    """A backend of pyvirtualcam that keeps what it is sent."""

    opened: ClassVar[list[Device]] = []
    refuses = ""
    breaks_at = -1

    def __init__(self, *, width: int, height: int, fps: float, fourcc: int, device: str | None, **_: Any) -> None:
        if Device.refuses:
            raise RuntimeError(Device.refuses)
        self.width, self.height, self.fps, self.name = width, height, fps, device or "/dev/video9"
        self.fourcc = fourcc
        self.pictures: list[np.ndarray] = []
        self.closed = 0
        Device.opened.append(self)

    def send(self, frame: np.ndarray) -> None:
        if len(self.pictures) == Device.breaks_at:
            raise RuntimeError("Bad file descriptor\nerrno 9")
        self.pictures.append(cv2.cvtColor(frame.reshape(self.height * 3 // 2, self.width), cv2.COLOR_YUV2RGB_I420))

    def close(self) -> None:
        self.closed += 1

    def device(self) -> str:
        return self.name

    def native_fourcc(self) -> int:
        return self.fourcc


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> type[Device]:
    from pyvirtualcam import camera

    monkeypatch.setattr(camera, "BACKENDS", {})
    pyvirtualcam.register_backend("memory", Device)
    monkeypatch.setattr(Device, "opened", [])
    monkeypatch.setattr(Device, "refuses", "")
    monkeypatch.setattr(Device, "breaks_at", -1)
    return Device


def spec(width: int, height: int) -> VideoSpec:
    return VideoSpec(width, height, fps=25.0, live=True)


def test_pixels_arrive_in_their_colours(device: type[Device]) -> None:
    with closing(open_sink("virtualcam", spec(512, 288))) as sink:
        sink.write(Frame(bars(512, 288), 0, 0, 0.0))
    camera = device.opened[0]
    assert (camera.width, camera.height, camera.fps) == (512, 288, 25.0)
    assert bars_error(camera.pictures[0]) <= 6
    assert sink.written == 1
    assert camera.closed == 1
    sink.close()
    assert camera.closed == 1


def test_a_stream_that_changes_its_size_keeps_the_cameras_with_bars(device: type[Device]) -> None:
    with closing(open_sink("virtualcam", spec(512, 288))) as sink:
        sink.write(Frame(bars(288, 512), 0, 0, 0.0))  # a phone that was turned
        sink.write(Frame(bars(1280, 720), 0, 0, 0.0))
    upright, wide = device.opened[0].pictures
    assert upright.shape == wide.shape == (288, 512, 3)
    assert bars_error(upright[:, 175:337]) <= 40  # narrow bars blur into each other
    assert upright[:, :170].max() <= 2
    assert upright[:, -170:].max() <= 2
    assert bars_error(wide) <= 6


def test_odd_sizes_become_even_and_a_device_can_be_named(device: type[Device]) -> None:
    with closing(open_sink("virtualcam:/dev/video7", spec(191, 127))) as sink:
        sink.write(Frame(bars(191, 127), 0, 0, 0.0))
    camera = device.opened[0]
    assert (camera.width, camera.height, camera.name) == (190, 126, "/dev/video7")


@pytest.mark.parametrize(("platform", "says"), [("linux", "modprobe"), ("darwin", "OBS 30"), ("win32", "OBS 26")])
def test_a_missing_driver_is_two_lines_with_the_way_out(
    device: type[Device], monkeypatch: pytest.MonkeyPatch, platform: str, says: str
) -> None:
    monkeypatch.setattr(device, "refuses", "no device found\nand more")
    monkeypatch.setattr(virtualcam.sys, "platform", platform)
    with pytest.raises(UserError, match="no device found") as caught:
        open_sink("virtualcam", spec(64, 64))
    assert says in caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyvirtualcam", None)
    with pytest.raises(UserError, match="pyvirtualcam") as caught:
        check_sink("virtualcam")
    assert "GPL" in caught.value.hint


def test_a_device_that_breaks_ends_the_sink_alone(device: type[Device], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "breaks_at", 1)
    with closing(open_sink("virtualcam", spec(64, 64))) as sink:
        sink.write(Frame(bars(64, 64), 0, 0, 0.0))
        with pytest.raises(UserError, match="Bad file descriptor"):
            sink.write(Frame(bars(64, 64), 0, 1, 0.0))
    assert device.opened[0].closed == 1
