"""What this machine's screen shows, by FFmpeg's own grabbers: X11, AVFoundation, GDI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable

import av
from av.container import InputContainer

from accel.errors import UserError
from stream.sources.container import ContainerSource, Opening, reason

FPS = "30"
OPEN_S, READ_S = 10.0, 5.0
ELSEWHERE = "or publish it from OBS or a browser: livestyle serve"
MAC = "allow it: System Settings > Privacy & Security > Screen Recording, for the terminal; then start again"


def open_source(url: str, size: tuple[int, int] | None, fit: str) -> ContainerSource:
    """Open `screen` (all of it on Linux and Windows, the first on macOS) or `screen:N`, one monitor.

    Raises UserError where the system does not let a program look.
    """
    if sys.platform == "linux" and not sees_screens(sys.modules):
        raise UserError("the screen cannot be captured in this program", hint="import av before cv2 in it")
    number = int(url.partition(":")[2]) if ":" in url else None
    layer, device, options = GRABBERS.get(sys.platform, _x11)(number)
    source = ContainerSource(_open(layer, device, options), Opening(url, live=True, size=size, fit=fit))
    if sys.platform == "linux" and _wayland():
        source.warnings.append(
            f"Wayland shows X11 programs only, the rest stays black: use an Xorg session, {ELSEWHERE}"
        )
    return source


def sees_screens(loaded: Iterable[str]) -> bool:
    """Whether modules were loaded in an order in which FFmpeg can talk to X11.

    The wheels of OpenCV and PyAV bring libraries of the same names, built for different ones; with OpenCV's in memory
    first, PyAV's first word to the X server would end the process.

    >>> sees_screens(["cv2", "av"])
    False
    """
    order = [name for name in loaded if name in ("av", "cv2")]
    return order[:1] != ["cv2"]


Grab = tuple[str, str, dict[str, str]]  # FFmpeg's device layer, its device, options


def _x11(number: int | None) -> Grab:
    display = os.environ.get("DISPLAY")
    if not display:
        why = "Wayland lets no program look at it" if _wayland() else "no X display (DISPLAY is not set)"
        raise UserError(f"cannot capture the screen: {why}", hint=f"log in to an Xorg session, {ELSEWHERE}")
    options = {"framerate": FPS}
    if number is not None:
        width, height, x, y = _monitor(number)
        options |= {"video_size": f"{width}x{height}", "grab_x": str(x), "grab_y": str(y)}
    return "x11grab", display, options


def _avfoundation(number: int | None) -> Grab:
    return "avfoundation", f"Capture screen {number or 0}:none", {"framerate": FPS, "capture_cursor": "1"}


def _gdi(number: int | None) -> Grab:
    if number:
        raise UserError(f"cannot capture screen:{number}", hint="`screen` is all of the desktop here")
    return "gdigrab", "desktop", {"framerate": FPS}


GRABBERS = {"linux": _x11, "darwin": _avfoundation, "win32": _gdi}


def _wayland() -> bool:
    return bool(os.environ.get("WAYLAND_DISPLAY")) or os.environ.get("XDG_SESSION_TYPE") == "wayland"


def _monitor(number: int) -> tuple[int, int, int, int]:
    """Width, height, x and y of a monitor, in pixels; raises UserError."""
    program = shutil.which("xrandr")
    if program is None:
        raise UserError("one monitor is chosen by the program xrandr", hint="install it, or use `screen` for all of it")
    listed = subprocess.run([program, "--listmonitors"], capture_output=True, text=True, check=False).stdout
    monitors = monitors_in(listed)
    if number >= len(monitors):
        raise UserError(f"no such monitor: screen:{number}", hint=f"there are {len(monitors)}, counted from 0")
    return monitors[number]


def monitors_in(listed: str) -> list[tuple[int, int, int, int]]:
    """Width, height, x, y of each monitor in what `xrandr --listmonitors` prints.

    >>> monitors_in(" 0: +*eDP-1 1920/344x1080/193+0+0  eDP-1")
    [(1920, 1080, 0, 0)]
    """
    found = re.findall(r"\s(\d+)/\d+x(\d+)/\d+\+(-?\d+)\+(-?\d+)", listed)
    return [(int(width), int(height), int(x), int(y)) for width, height, x, y in found]


def _open(layer: str, device: str, options: dict[str, str]) -> InputContainer:
    try:
        return av.open(device, format=layer, options=options, timeout=(OPEN_S, READ_S))
    except av.FFmpegError as error:
        hint = MAC if layer == "avfoundation" else f"is {device} the display of this login? {ELSEWHERE}"
        raise UserError(f"cannot capture the screen: {reason(error)}", hint=hint) from None
    except ValueError:  # the layer is not in this build
        raise UserError(f"this build of FFmpeg has no {layer}", hint=f"install another build, {ELSEWHERE}") from None
