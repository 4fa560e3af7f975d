"""A window on this machine's screen."""

from __future__ import annotations

import os
import sys

import cv2
import numpy as np

from accel.errors import UserError
from stream.frame import Frame, VideoSpec
from stream.sink import SinkClosed

TITLE = "livestyle"
KEYS = {ord("q"), 27}  # q and Escape


def check(url: str, codec: str, origin: str | None) -> None:
    """Raise UserError where no window can be shown: no screen, or an OpenCV built without one."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise UserError("no screen to open a window on", hint="write a file instead: --to out.mp4")
    gui = next((line for line in cv2.getBuildInformation().splitlines() if line.strip().startswith("GUI:")), "")
    if gui.split()[-1:] == ["NONE"]:
        raise UserError(
            "this OpenCV cannot open windows (headless build)",
            hint="pip uninstall opencv-python-headless && pip install opencv-python; or --to out.mp4",
        )


def open_sink(url: str, spec: VideoSpec, codec: str, crf: int) -> WindowSink:
    """A window as big as the pictures."""
    return WindowSink(spec)


class WindowSink:
    """Shows each frame at once; opened and used in the writer thread, where OpenCV wants all its calls.

    On macOS windows belong to the main thread: run the writer there.
    """

    def __init__(self, spec: VideoSpec) -> None:
        self.written = 0
        self.warnings: list[str] = []
        self._size = spec.width, spec.height
        self._shown = False

    def write(self, frame: Frame) -> None:
        """Show a frame; raises SinkClosed when the window was closed or q pressed."""
        try:
            if not self._shown:
                cv2.namedWindow(TITLE, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
                cv2.resizeWindow(TITLE, *self._size)
                self._shown = True
            elif cv2.getWindowProperty(TITLE, cv2.WND_PROP_VISIBLE) < 1:
                raise SinkClosed("the window was closed")
            cv2.imshow(TITLE, np.ascontiguousarray(frame.image[..., ::-1]))
            if cv2.waitKey(1) & 0xFF in KEYS:
                raise SinkClosed("q was pressed")
        except cv2.error as error:
            raise UserError(f"cannot show a window: {error.err}", hint="write a file instead: --to out.mp4") from None
        self.written += 1

    def close(self) -> None:
        """Close the window."""
        if self._shown:
            self._shown = False
            cv2.destroyAllWindows()
