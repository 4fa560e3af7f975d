"""A virtual camera that other programs (Zoom, Teams, OBS, a browser) choose like any other camera.

The driver is reached by `pyvirtualcam`, an extra of its own because its licence is GPL-2.0; nothing else needs it.
"""

from __future__ import annotations

import sys
from types import ModuleType

import cv2

from accel.errors import UserError
from stream.frame import Frame, VideoSpec
from stream.sinks.letterbox import boxed

INSTALL = "pip install 'livestyle[virtualcam]' (pyvirtualcam, licence GPL-2.0)"
DRIVERS = {  # what provides the device
    "linux": "sudo apt install v4l2loopback-dkms && sudo modprobe v4l2loopback exclusive_caps=1 card_label=livestyle",
    "darwin": "install OBS 30 or newer and start and stop its virtual camera once; needs macOS 13",
    "win32": "install OBS 26 or newer and start and stop its virtual camera once; close OBS's own use of it",
}


def check(url: str, codec: str, origin: str | None) -> None:
    """Raise UserError where the package is missing; whether there is a driver shows when it is opened."""
    _package()


def open_sink(url: str, spec: VideoSpec, codec: str, crf: int) -> VirtualCamera:
    """Open `virtualcam` or `virtualcam:DEVICE`: a device file on Linux, else the camera's name."""
    return VirtualCamera(spec, url.partition(":")[2] or None)


class VirtualCamera:
    """Shows each frame at once, as I420, in the size it was opened with; `fps` is what it tells programs.

    Raises UserError when there is no device, or when it breaks.
    """

    def __init__(self, spec: VideoSpec, device: str | None = None) -> None:
        self.written = 0
        self.warnings: list[str] = []
        self._size = spec.width & ~1, spec.height & ~1  # I420 has one colour sample for two by two pixels
        library = _package()
        try:
            self._camera = library.Camera(*self._size, spec.fps, fmt=library.PixelFormat.I420, device=device)
        except RuntimeError as error:  # what pyvirtualcam raises, whatever its backends did
            raise UserError(f"cannot open a virtual camera: {_first_line(error)}", hint=_driver()) from None
        self.device: str = self._camera.device
        self._open = True

    def write(self, frame: Frame) -> None:
        """Show a frame; another size than at the start is scaled into it, with bars."""
        # BT.601 in limited range is what programs take a camera without colour tags for. OpenCV converts 1280×720 in
        # 0.5 ms, swscale in 5.
        picture = cv2.cvtColor(boxed(frame.image, self._size), cv2.COLOR_RGB2YUV_I420)
        try:
            self._camera.send(picture.reshape(-1))
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"the virtual camera {self.device} broke: {_first_line(error)}", hint="is its driver still loaded?"
            ) from None
        self.written += 1

    def close(self) -> None:
        """Let the device go; programs see it freeze or go black."""
        if self._open:
            self._open = False
            self._camera.close()


def _package() -> ModuleType:
    try:
        import pyvirtualcam
    except ImportError:
        raise UserError("virtualcam needs the package pyvirtualcam", hint=INSTALL) from None
    module: ModuleType = pyvirtualcam
    return module


def _driver() -> str:
    return DRIVERS.get(sys.platform, DRIVERS["linux"])


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
