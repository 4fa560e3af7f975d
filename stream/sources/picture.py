"""From a decoded FFmpeg frame to RGB pixels: colour, rotation, pixel aspect and size in one swscale call."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import Any, NamedTuple, cast

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from stream.fit import centre_cut, fit_size

UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED


class Turn(NamedTuple):
    """One of the eight ways a picture can lie: transposed first, then mirrored."""

    transposed: bool
    mirrored_x: bool
    mirrored_y: bool


UPRIGHT = Turn(False, False, False)


def turn_of(frame: av.VideoFrame, otherwise: Turn = UPRIGHT) -> Turn:
    """How the display matrix of the frame (phones, EXIF) asks it to be turned; `otherwise` without one."""
    try:
        matrix = bytes(cast("Any", frame.side_data)[Type.DISPLAYMATRIX])  # PyAV types it as a dict of attributes
    except KeyError:
        return otherwise
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])  # x' = a·x + c·y, y' = b·x + d·y
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Turn(False, a < 0, d < 0)
    return Turn(True, c < 0, b < 0)


class Picture:
    """Turns decoded frames of one stream into (H, W, 3) RGB pictures of one constant size.

    >>> picture = Picture(first, sar=None, box=(512, 512), fit="fit")
    >>> picture.size, picture(first).shape
    ((512, 288), (288, 512, 3))
    """

    def __init__(self, first: av.VideoFrame, sar: Fraction | None, box: tuple[int, int] | None, fit: str) -> None:
        self._sar = sar or Fraction(1)
        self._scaler = VideoReformatter()
        self._turn = turn_of(first)  # a decoder on a device is not told what the container says of it
        shown = self.shown(first)
        self.native = round(shown[0]), round(shown[1])
        self.size = fit_size(shown, box, fit).size if box else self.native
        # a later change of resolution must not change the delivered size, so from here on the box is that size
        self._fit = "crop" if fit == "crop" and box else "stretch"

    def shown(self, frame: av.VideoFrame) -> tuple[float, float]:
        """W, H at which a player would show the frame: square pixels, turned upright."""
        width, height = float(frame.width * self._sar), float(frame.height)
        return (height, width) if turn_of(frame, self._turn).transposed else (width, height)

    def __call__(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        turn = turn_of(frame, self._turn)
        scaled = fit_size(self.shown(frame), self.size, self._fit).scaled
        width, height = scaled[::-1] if turn.transposed else scaled
        rgb = self._scaler.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            src_colorspace=_colorspace(frame),
            dst_color_range=ColorRange.JPEG,
            interpolation=_interpolation(frame, width, height),
            threads=1,  # the other cores belong to the decoder and the model
        )
        image = cast("NDArray[np.uint8]", rgb.to_ndarray())
        if turn.transposed:
            image = image.transpose(1, 0, 2)
        if turn.mirrored_x:
            image = image[:, ::-1]
        if turn.mirrored_y:
            image = image[::-1]
        return centre_cut(image, self.size)


def _colorspace(frame: av.VideoFrame) -> Colorspace | None:
    """The YUV matrix; where the stream does not say, what players assume: BT.709 for HD, BT.601 below."""
    if frame.colorspace != UNSPECIFIED:
        return None  # as the frame says
    return Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601


def _interpolation(frame: av.VideoFrame, width: int, height: int) -> Interpolation:
    # averaging is the cheapest and free of aliasing where a picture shrinks a lot; else it would be soft
    shrinks = frame.width >= 1.5 * width and frame.height >= 1.5 * height
    return Interpolation.AREA if shrinks else Interpolation.BICUBIC
