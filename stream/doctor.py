"""What this machine has and lacks, with a hint for each thing missing."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

LIBRARIES = ("torch", "openvino", "diffusers", "transformers", "av", "opencv-python", "numpy")
INSTEAD = {"opencv-python": "opencv-python-headless"}  # does all but windows
CODECS = {"libx264": "h264 files and streams", "ffv1": "lossless files", "mpeg4": "files without x264"}
ENOUGH_MEMORY = 4 << 30  # bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `hint` says what to do where `ok` is false."""

    topic: str
    ok: bool
    found: str
    hint: str = ""


def examine() -> list[Finding]:
    """Everything that can be found out without opening a camera or a window."""
    checks: tuple[Callable[[], list[Finding]], ...] = (
        _system,
        _libraries,
        _engines,
        _codecs,
        _video,
        _cameras,
        _display,
    )
    return [finding for check in checks for finding in check()]


def _system() -> list[Finding]:
    from accel.machine import cpu_name, physical_cores

    total = _memory()
    python = platform.python_version()
    return [
        Finding("python", sys.version_info >= (3, 11), python, "livestyle needs Python 3.11 or newer"),
        Finding("cpu", True, f"{cpu_name()}, {physical_cores()} cores"),
        Finding("memory", total >= ENOUGH_MEMORY, f"{total / 2**30:.1f} GiB", "mini wants about 4 GiB"),
    ]


def _memory() -> int:
    if not hasattr(os, "sysconf"):
        return ENOUGH_MEMORY  # this system does not tell
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _libraries() -> list[Finding]:
    return [_library(name) for name in LIBRARIES]


def _library(name: str) -> Finding:
    try:
        return Finding(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        if name in INSTEAD and (other := _library(INSTEAD[name])).ok:
            return Finding(name, False, f"only {other.topic} {other.found}", f"for windows: pip install {name}")
        return Finding(name, False, "not installed", f"pip install {name}")


def _engines() -> list[Finding]:
    from accel.select import ORDER, missing

    found = []
    for name in ORDER:
        lack = missing(name)
        found.append(
            Finding(f"engine {name}", lack is None, lack.message if lack else "ready", lack.hint if lack else "")
        )
    return found


def _codecs() -> list[Finding]:
    try:
        import av
    except ImportError as error:
        return [Finding("codecs", False, str(error), "pip install av")]
    hint = "install a PyAV wheel: pip install --force-reinstall --only-binary av av"
    return [
        Finding(f"codec {name}", name in av.codecs_available, use if name in av.codecs_available else "missing", hint)
        for name, use in CODECS.items()
    ]


def _video() -> list[Finding]:
    """The video engines beside the processor; without them nothing is missing."""
    try:
        from stream import hardware
    except ImportError:
        return []  # said above
    lack = hardware.lack_of_nvenc()
    hint = "x264 does it; NVENC needs a card that has it (data-centre cards have none) and its driver"
    return [
        Finding("encode on nvenc", not lack, lack or "ready", hint),
        *(
            Finding(f"decode on {device}", not lack, lack or "ready", "software does it")
            for device in hardware.devices()
            for lack in [hardware.lack_of_device(device)]
        ),
    ]


def _cameras() -> list[Finding]:
    if sys.platform != "linux":
        return [Finding("cameras", True, "not looked for on this system; try `livestyle run camera`")]
    found = sorted(Path("/dev").glob("video[0-9]*"))
    blocked = [path for path in found if not os.access(path, os.R_OK | os.W_OK)]
    if blocked:
        return [
            Finding("cameras", False, f"no access to {blocked[0]}", "sudo usermod -aG video $USER, then log in again")
        ]
    names = ", ".join(str(path) for path in found) or "none"
    return [Finding("cameras", bool(found), names, "plug one in, or use a file or `livestyle demo`")]


def _display() -> list[Finding]:
    name = os.environ.get("WAYLAND_DISPLAY") or os.environ.get("DISPLAY")
    ok = bool(name) or sys.platform in ("darwin", "win32")
    return [Finding("display", ok, name or ("yes" if ok else "none"), "without one, use --to FILE")]
