"""Cameras by FFmpeg's own device layer: v4l2, AVFoundation, DirectShow."""

from __future__ import annotations

import glob
import sys

import av
from av.container import InputContainer

from accel.errors import UserError
from stream.sources.container import ContainerSource, Opening, reason

FORMATS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}
READ_S = 5.0

# MJPEG first: over USB 2 a camera has no room for raw pictures at full rate
ATTEMPTS: dict[str, list[dict[str, str]]] = {
    "v4l2": [{"input_format": "mjpeg", "video_size": "1280x720", "framerate": "30"}, {"input_format": "mjpeg"}, {}],
    "avfoundation": [{"framerate": "30", "video_size": "1280x720"}, {"framerate": "30"}, {}],
    "dshow": [{"vcodec": "mjpeg", "video_size": "1280x720", "rtbufsize": "64M"}, {"rtbufsize": "64M"}],
}


def cameras() -> list[str]:
    """What can be opened here, as FFmpeg names it; index N is `camera:N` except on Linux, where it is /dev/videoN."""
    if sys.platform == "linux":
        return sorted(glob.glob("/dev/video*"))
    from av.device import enumerate_input_devices

    try:
        found = enumerate_input_devices(FORMATS.get(sys.platform, "dshow"))
    except (av.FFmpegError, ValueError):  # the layer is not in this build
        return []
    return [device.name for device in found if "video" in device.media_types or not device.media_types]


def open_source(url: str, size: tuple[int, int] | None, fit: str) -> ContainerSource:
    """Open `camera`, `camera:N` or `/dev/videoN`; raises UserError that lists what there is instead."""
    layer = FORMATS.get(sys.platform, "v4l2")
    container = _open(_device(url, layer), layer, url)
    return ContainerSource(container, Opening(url, live=True, size=size, fit=fit))


def _device(url: str, layer: str) -> str:
    if url.startswith("/dev/"):
        return url
    number = int(url.partition(":")[2] or 0)
    if layer == "v4l2":
        return f"/dev/video{number}"
    if layer == "avfoundation":
        return f"{number}:none"
    found = cameras()
    if number >= len(found):
        raise UserError(f"cannot open {url}: no such camera", hint=_hint())
    return f"video={found[number]}"


def _open(device: str, layer: str, url: str) -> InputContainer:
    failure: av.FFmpegError | None = None
    for options in ATTEMPTS[layer]:
        try:
            return av.open(device, format=layer, options=options, timeout=(10.0, READ_S))
        except (av.error.FileNotFoundError, av.error.PermissionError) as error:
            failure = error
            break
        except av.FFmpegError as error:  # most often a mode the camera does not have
            failure = error
        except ValueError as error:  # the layer is not in this build
            raise UserError(f"cannot open {url}: {error}", hint="this build of FFmpeg reads no cameras") from None
    assert failure is not None
    raise UserError(f"cannot open {url}: {reason(failure)}", hint=_hint()) from None


def _hint() -> str:
    found = cameras()
    return f"there is: {', '.join(found)}" if found else "no camera is plugged in; `livestyle run demo` needs none"
