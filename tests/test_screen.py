"""The screen as a source: a virtual X server where there is one, and what is said where nothing can be seen."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import av
import pytest

from accel.errors import UserError
from stream.source import open_source
from stream.sources import screen

LISTED = """Monitors: 2
 0: +*eDP-1 1920/344x1080/193+0+0  eDP-1
 1: +HDMI-1 2560/597x1440/336+1920+-180  HDMI-1
"""


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if shutil.which("Xvfb") is None:
        pytest.skip("needs Xvfb")
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", "1", "-screen", "0", "640x360x24", "-wr", "-nolisten", "tcp"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with server:
        assert server.stdout
        name = f":{server.stdout.readline().strip()}"
        monkeypatch.setenv("DISPLAY", name)
        monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
        monkeypatch.delenv("XDG_SESSION_TYPE", raising=False)
        yield name
        server.kill()


def test_the_screen_is_seen(display: str) -> None:
    with closing(open_source("screen", size=(320, 192))) as source:
        assert source.spec.live
        assert source.spec.native == (640, 360)
        assert (source.spec.width, source.spec.height) == (320, 184)
        frames = list(itertools.islice(source.frames(), 5))
    assert frames[-1].image[5:40, 5:40].min() > 240  # the root window is white
    assert [frame.seq for frame in frames] == list(range(5))
    assert frames[-1].pts > frames[0].pts
    assert source.warnings == []


def test_one_monitor_is_cut_out(display: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_monitor", lambda number: (200, 100, 64, 32))
    with closing(open_source("screen:0")) as source:
        assert source.spec.native == (200, 100)


def test_wayland_says_what_will_stay_black(display: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    with closing(open_source("screen")) as source:
        assert "Xorg" in source.warnings[0]


@pytest.mark.skipif(sys.platform != "linux", reason="X11")
@pytest.mark.parametrize(("wayland", "says"), [("wayland-0", "Wayland"), ("", "DISPLAY")])
def test_no_display_is_two_lines(monkeypatch: pytest.MonkeyPatch, wayland: str, says: str) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("XDG_SESSION_TYPE", raising=False)
    monkeypatch.setenv("WAYLAND_DISPLAY", wayland)
    with pytest.raises(UserError, match=says) as caught:
        open_source("screen")
    assert "Xorg" in caught.value.hint


@pytest.mark.skipif(sys.platform != "linux", reason="X11")
def test_a_display_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":4711")
    with pytest.raises(UserError, match="cannot capture") as caught:
        open_source("screen")
    assert ":4711" in caught.value.hint


def test_monitors_are_read_from_xrandr(monkeypatch: pytest.MonkeyPatch) -> None:
    assert screen.monitors_in(LISTED) == [(1920, 1080, 0, 0), (2560, 1440, 1920, -180)]
    monkeypatch.setattr(screen.shutil, "which", lambda name: "/usr/bin/xrandr")
    monkeypatch.setattr(
        screen.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, stdout=LISTED)
    )
    assert screen._monitor(1) == (2560, 1440, 1920, -180)
    with pytest.raises(UserError, match="screen:2") as caught:
        screen._monitor(2)
    assert "2" in caught.value.hint


@pytest.mark.parametrize(
    ("platform", "url", "layer", "device"),
    [("darwin", "screen:1", "avfoundation", "Capture screen 1:none"), ("win32", "screen", "gdigrab", "desktop")],
)
def test_other_systems_use_their_own_grabber(
    monkeypatch: pytest.MonkeyPatch, platform: str, url: str, layer: str, device: str
) -> None:
    asked: list[tuple[str, str]] = []

    def refuse(name: str, *, format: str, **_: object) -> None:
        asked.append((format, name))
        raise av.error.PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(screen.sys, "platform", platform)
    monkeypatch.setattr(screen.av, "open", refuse)
    with pytest.raises(UserError, match="not permitted") as caught:
        screen.open_source(url, None, "fit")
    assert asked == [(layer, device)]
    assert platform != "darwin" or "Screen Recording" in caught.value.hint


def test_another_programs_order_of_imports_is_an_error_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    assert screen.sees_screens(["numpy", "av", "cv2"])
    assert screen.sees_screens(["av"])
    assert not screen.sees_screens(["cv2", "numpy", "av"])
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(screen, "sees_screens", lambda loaded: False)
    with pytest.raises(UserError, match="this program") as caught:
        open_source("screen")
    assert "av before cv2" in caught.value.hint
