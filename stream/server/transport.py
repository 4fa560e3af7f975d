"""H.264 in an MPEG transport stream (ISO/IEC 13818-1), for VLC, ffplay and OBS media sources."""

from __future__ import annotations

from fractions import Fraction

import av
import cv2
import numpy as np
from av.container import OutputContainer
from av.video.frame import PictureType

from stream.frame import Frame
from stream.server.station import Chunk

CLOCK = 90_000  # Hz
KEYFRAME_S = 2.0
BITRATE = 4_000_000  # bits per second at most
_H264 = {"preset": "ultrafast", "tune": "zerolatency", "crf": "23", "forced-idr": "1"}
_MUXER = {"mpegts_flags": "pat_pmt_at_frames", "flush_packets": "1"}


class TransportStream:
    """A `station.Encoding`: every keyframe's chunk begins with the tables, so that one can begin there.

    A change of size starts a new sequence, which players follow.
    """

    def __init__(self) -> None:
        self._pipe = _Pipe()
        self._output: OutputContainer | None = None
        self._size = (0, 0)
        self._origin: float | None = None  # s
        self._last = -1  # pts

    def encode(self, frame: Frame, start: bool) -> Chunk | None:
        """One access unit; nothing when the encoder gives none yet."""
        high, wide = frame.image.shape[:2]
        size = (wide & ~1, high & ~1)
        if self._output is None or size != self._size:
            self._open(size)
            start = True
        if self._origin is None:
            self._origin = frame.captured
        # BT.601 in limited range, as tagged; OpenCV converts ten times as fast as swscale
        planes = cv2.cvtColor(frame.image[: size[1], : size[0]], cv2.COLOR_RGB2YUV_I420)
        picture = av.VideoFrame.from_ndarray(planes.astype(np.uint8, copy=False), "yuv420p")
        self._last = max(self._last + 1, round((frame.captured - self._origin) * CLOCK))
        picture.pts, picture.time_base = self._last, Fraction(1, CLOCK)
        picture.pict_type = PictureType.I if start else PictureType.NONE
        assert self._output is not None
        packets = self._stream.encode(picture)
        self._output.mux(packets)
        data = self._pipe.take()
        return Chunk(data, any(packet.is_keyframe for packet in packets)) if data else None

    def close(self) -> None:
        """Let go of the encoder."""
        if self._output is not None:
            self._output.close()
            self._output = None

    def _open(self, size: tuple[int, int]) -> None:
        self.close()
        self._pipe.take()
        self._size = size
        self._output = av.open(self._pipe, "w", format="mpegts", container_options=_MUXER)
        self._stream = self._output.add_stream("libx264", rate=30, options=_H264)
        context = self._stream.codec_context
        context.width, context.height, context.pix_fmt = *size, "yuv420p"
        context.time_base = Fraction(1, CLOCK)
        context.gop_size = round(30 * KEYFRAME_S)
        context.max_b_frames = 0
        context.colorspace = context.color_primaries = context.color_trc = 6  # SMPTE 170M
        context.bit_rate_tolerance = BITRATE
        context.thread_count = 1


class _Pipe:
    """Where the muxer writes, until it is taken."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def write(self, data: bytes) -> int:
        """Keep."""
        self._bytes += data
        return len(data)

    def take(self) -> bytes:
        """Everything written since the last time."""
        data = bytes(self._bytes)
        self._bytes.clear()
        return data
