"""Pictures and sound into packets: one open codec each, made for the least delay."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import av
import cv2
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.codec.codec import UnknownCodecError
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType
from av.video.reformatter import ColorRange
from numpy.typing import NDArray

from accel.errors import UserError
from stream import hardware
from stream.frame import Frame
from stream.sound import RATE, TICK, Sound

Size = tuple[int, int]  # W, H

ENCODERS = {"h264": "libx264", "vp8": "libvpx"}
CLOCK = 90_000  # ticks per second of pictures, RFC 6184 §8.1
TIME_BASE = Fraction(1, CLOCK)
GOP_S = 4.0  # a keyframe at least so often; viewers ask for more when they need them
BUFFER_FRAMES = 4  # the rate is kept over so many frames: a keyframe stays small, and nothing paces its packets
LEAST = 60_000  # bits per second of any picture
SMALL = 640 * 480  # pixels up to which x264 has time for a little more than its quickest
LARGE = 1280 * 720  # pixels from which several threads share a picture
SOUND_BITRATE = 96_000
SOUND_GAP = RATE // 5  # samples; sound that comes later than this after the one before had a gap

# BT.601 chroma of RGB, limited range; the same matrix as OpenCV's own luma
_CHROMA = np.array([[-0.148223, -0.290993, 0.439216, 128.0], [0.439216, -0.367788, -0.071427, 128.0]])


@dataclass(frozen=True, slots=True)
class Encoded:
    """One coded picture or 20 ms of sound; shared by everyone who sends it, never mutated."""

    packet: av.Packet[Any]  # pts: time.monotonic() of the capture (of sound: of sending) in ticks of its own clock
    keyframe: bool
    captured: float  # s, time.monotonic()
    size: Size  # (0, 0) of sound


def nominal_bitrate(size: Size, fps: float) -> int:
    """Bits per second that painted pictures need to look clean: 2 Mb/s at 640×360 and 30 fps, 5.6 Mb/s at 1280×720.

    >>> nominal_bitrate((640, 360), 30)
    2000000
    """
    pixels, rate = size[0] * size[1] / (640 * 360), min(max(fps, 10.0), 60.0) / 30
    return int(min(max(2_000_000 * pixels**0.75 * rate**0.5, 150_000), 10_000_000))


def scaled(size: Size, scale: int) -> Size:
    """`size` divided by `scale`, both sides even and at least 16.

    >>> scaled((640, 360), 4)
    (160, 90)
    """
    return max(16, size[0] // scale & ~1), max(16, size[1] // scale & ~1)


def yuv420(image: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """RGB as planar 4:2:0, (H·3/2, W), BT.601 limited range, brought to `size`.

    BT.601 because that is what browsers take pictures for that say nothing, which VP8 cannot. OpenCV takes an eighth of
    swscale's time for the luma; its chroma, though, is that of one pixel in four, so that is done here.
    """
    width, height = size
    if image.shape[:2] != (height, width):
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    planes = cv2.cvtColor(image, cv2.COLOR_RGB2YUV_I420).astype(np.uint8, copy=False)
    half = cv2.resize(image, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    chroma = cv2.transform(half, _CHROMA)
    planes[height:].reshape(2, height // 2, width // 2)[:] = np.moveaxis(chroma, 2, 0)
    return planes


class PictureCoder:
    """Pictures as H.264 or VP8, for the least delay. One thread uses it.

    Opens anew, with a keyframe, when the size of the pictures changes. `scale` divides both sides, `share` is the part
    of the nominal bits; `tell` is told when x264 had to take over.
    """

    def __init__(
        self,
        codec: str,
        fps: float,
        scale: int = 1,
        share: float = 1.0,
        tell: Callable[[str], None] = lambda words: None,
    ) -> None:
        self.codec, self.fps, self.scale, self.share = codec, max(1.0, fps), scale, share
        self._tell = tell
        self._context: VideoCodecContext | None = None
        self._on_card = False
        self._size: Size = (0, 0)
        self._whole: Size = (0, 0)  # of the pictures it is open for
        self._last: int | None = None  # pts

    def encode(self, frame: Frame, keyframe: bool) -> list[Encoded]:
        """One packet per picture, at once; raises UserError when the codec cannot be opened."""
        height, width = frame.image.shape[:2]
        context = self._context
        if context is None or (width, height) != self._whole:
            context = self._open((width, height))
        picture = av.VideoFrame.from_ndarray(yuv420(frame.image, self._size), "yuv420p")
        pts = round(frame.captured * CLOCK)
        if self._last is not None and pts <= self._last:
            pts = self._last + CLOCK // 1000
        self._last = picture.pts = pts
        picture.time_base = TIME_BASE
        picture.pict_type = PictureType.I if keyframe else PictureType.NONE
        try:
            packets = context.encode(picture)
        except av.FFmpegError as error:
            packets = self._again(picture, error)
        return [Encoded(packet, packet.is_keyframe, frame.captured, self._size) for packet in packets]

    def _open(self, whole: Size) -> VideoCodecContext:
        self._whole, self._size = whole, scaled(whole, self.scale)
        bitrate = max(LEAST, int(self.share * nominal_bitrate(whole, self.fps)))
        self._on_card = self.codec == "h264" and hardware.uses_nvenc(self._size)
        if self._on_card:
            try:
                self._context = open_nvenc(self._size, self.fps, bitrate)
            except av.FFmpegError as error:  # every session of the card is taken
                self._tell(hardware.nvenc_failed(error))
                self._on_card = False
        if not self._on_card:
            self._context = open_codec(self.codec, self._size, self.fps, bitrate)
        assert self._context is not None
        return self._context

    def _again(self, picture: av.VideoFrame, error: av.FFmpegError) -> list[av.Packet[Any]]:
        """The picture by x264 where it was the card that failed; a viewer sees a keyframe. Raises UserError."""
        if not self._on_card:
            raise UserError(f"{self.codec} stopped encoding: {error.strerror}") from None
        self._tell(hardware.nvenc_failed(error))
        return self._open(self._whole).encode(picture)


def open_nvenc(size: Size, fps: float, bitrate: int) -> VideoCodecContext:
    """An open encoder on the card; raises av.FFmpegError. PyAV holds the interpreter lock meanwhile: do it rarely."""
    context = cast("VideoCodecContext", av.CodecContext.create(hardware.NVENC, "w"))
    _describe(context, size, fps, bitrate)
    buffer = int(bitrate / fps * BUFFER_FRAMES)
    context.options = hardware.live_options(bitrate, buffer) | {"profile": "baseline"}
    context.open()
    return context


def open_codec(codec: str, size: Size, fps: float, bitrate: int) -> VideoCodecContext:
    """An open encoder; raises UserError. PyAV holds the interpreter lock for its 1 to 3 ms: do it rarely."""
    try:
        context = cast("VideoCodecContext", av.CodecContext.create(ENCODERS[codec], "w"))
        _describe(context, size, fps, bitrate)
        # libvpx's threads wait busily for each other: two cost 1.7 times the CPU of one
        context.thread_count = min(4, os.cpu_count() or 1) if codec == "h264" and size[0] * size[1] >= LARGE else 1
        context.options = _x264(size, fps, bitrate) if codec == "h264" else _vpx(bitrate)
        if codec == "h264":
            context.profile = "Baseline"
        context.open()
    except (av.FFmpegError, UnknownCodecError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot encode {codec}: {reason}", hint="`livestyle doctor` lists the codecs") from None
    return context


def _describe(context: VideoCodecContext, size: Size, fps: float, bitrate: int) -> None:
    context.width, context.height, context.pix_fmt = *size, "yuv420p"
    context.time_base, context.framerate = TIME_BASE, Fraction(fps).limit_denominator(1001)
    context.bit_rate, context.gop_size, context.max_b_frames = bitrate, max(1, round(fps * GOP_S)), 0
    context.color_range, context.colorspace = ColorRange.MPEG, 6  # BT.601's matrix …
    context.color_primaries = context.color_trc = 1  # … with sRGB's primaries, those of BT.709


def _x264(size: Size, fps: float, bitrate: int) -> dict[str, str]:
    return {
        "preset": "superfast" if size[0] * size[1] <= SMALL else "ultrafast",
        "tune": "zerolatency",
        "forced-idr": "1",
        "maxrate": str(bitrate),
        "bufsize": str(int(bitrate / fps * BUFFER_FRAMES)),
    }


def _vpx(bitrate: int) -> dict[str, str]:
    return {
        "deadline": "realtime",
        "cpu-used": "-8",  # always that quick; a positive one wavers with the load of the machine
        "lag-in-frames": "0",
        "error-resilient": "default",
        "minrate": str(bitrate),
        "maxrate": str(bitrate),
        "bufsize": str(bitrate // 2),
        "max-intra-rate": "300",  # percent of a frame's share that a keyframe may take
    }


class SoundCoder:
    """Opus, 20 ms a packet. One thread uses it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._context: AudioCodecContext | None = None
        self._next: int | None = None  # pts

    def encode(self, sound: Sound, keyframe: bool) -> list[Encoded]:
        """One packet per piece, in unbroken time but for real gaps; raises UserError.

        The time is that of sending: sound is held back until it is due, by playing it a little slower or faster.
        """
        context = self._context = self._context or self._open()
        pts = round(self._clock() * RATE)
        if self._next is not None and pts < self._next + SOUND_GAP:
            pts = self._next
        self._next = pts + sound.frame.samples
        # a frame of our own: the encoder writes pts into it, and this one is everybody's
        frame = av.AudioFrame.from_ndarray(sound.frame.to_ndarray(), format="s16", layout="stereo")
        frame.sample_rate, frame.time_base, frame.pts = RATE, TICK, pts
        try:
            packets = context.encode(frame)
        except av.FFmpegError as error:
            raise UserError(f"Opus stopped encoding: {error.strerror}") from None
        for packet in packets:  # Opus counts its look-ahead as time before the beginning; a receiver need not know
            packet.pts, packet.time_base = pts, TICK
        return [Encoded(packet, True, sound.captured, (0, 0)) for packet in packets]

    def _open(self) -> AudioCodecContext:
        try:
            context = av.CodecContext.create("libopus", "w")
            context.sample_rate, context.format, context.layout = RATE, "s16", "stereo"
            context.bit_rate, context.time_base = SOUND_BITRATE, TICK
            context.open()
        except (av.FFmpegError, UnknownCodecError, ValueError) as error:
            raise UserError(f"cannot encode Opus: {error}") from None
        return context
