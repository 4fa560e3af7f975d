"""A video file: pts and sound of the source kept, playable even when the writing is cut off."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.container import OutputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from accel.errors import UserError
from stream import hardware
from stream.frame import Frame, VideoSpec, to_ticks
from stream.sinks.audio import AudioCopy, SoundTrack
from stream.sinks.disk import Disk
from stream.sinks.letterbox import boxed
from stream.sound import Sound
from stream.sources.container import reason

# packets reach the disk as they come, and pictures wait no longer than 2 s (in µs) for sound that has ended
_PROMPT = {"flush_packets": "1", "max_interleave_delta": "2000000"}
# hybrid: fragments while it is written, an ordinary file once it is closed; delay_moov: keeps the first pts
_HYBRID = {"movflags": "hybrid_fragmented+frag_keyframe+delay_moov"}
FORMATS: dict[str, tuple[str, dict[str, str]]] = {  # suffix → muxer, its options
    ".mp4": ("mp4", _HYBRID),
    ".mov": ("mov", _HYBRID),
    ".mkv": ("matroska", {"cluster_time_limit": "1000"}),  # ms lost at most when killed
}
CODECS = {"h264": "libx264", "mpeg4": "mpeg4", "ffv1": "ffv1"}
MILLISECOND = Fraction(1, 1000)  # Matroska's tick
KEYFRAME_S = 1.0  # a killed process loses at most this much


def check(url: str, codec: str, origin: str | None) -> None:
    """Raise UserError for a name, place or codec that cannot be written; creates nothing."""
    path = Path(url.removeprefix("file://"))
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"cannot write {path.name}: unknown kind of file", hint=f"choose one of {' '.join(FORMATS)}")
    if codec not in CODECS:
        raise UserError(f"no such codec: {codec}", hint=f"choose one of {' '.join(CODECS)}")
    try:
        av.codec.Codec(CODECS[codec], "w")
    except av.codec.codec.UnknownCodecError:
        raise UserError(f"this FFmpeg was built without {CODECS[codec]}", hint="--set sink.codec=mpeg4") from None
    if codec == "ffv1" and suffix != ".mkv":
        raise UserError(
            f"ffv1 does not go into {suffix}", hint=f"name it {path.with_suffix('.mkv').name}, or use codec h264"
        )
    if not path.parent.is_dir():
        raise UserError(f"no such folder: {path.parent}", hint="create it first, or choose another place")
    if path.is_dir():
        raise UserError(f"{path} is a folder", hint="name a file inside it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"not allowed to write {path}", hint="check its permissions, or choose another place")
    if origin and path.exists() and os.path.samefile(path, origin):
        raise UserError(f"{path} is the file being read", hint="choose another name for the result")


def open_sink(url: str, spec: VideoSpec, codec: str, crf: int) -> FileSink:
    """Open a path or `file://` URL that `check` found good."""
    return FileSink(Path(url.removeprefix("file://")), spec, codec, crf)


class FileSink:
    """Encodes frames at their own pts, with the source's sound up to each: copied from a recording, or live as heard.

    Frames whose pts do not grow are moved one tick on and counted in `nudged`. A failed write raises UserError once;
    what was written before it stays playable.
    """

    def __init__(self, path: Path, spec: VideoSpec, codec: str, crf: int) -> None:
        self.written = 0
        self.nudged = 0
        self.warnings: list[str] = []
        self._path, self._spec, self._codec = path, spec, codec
        muxer, options = FORMATS[path.suffix.lower()]
        self._tick = _tick(spec.time_base, muxer, codec)
        self._last: int | None = None  # ticks
        self._shift = 0  # ticks that everything is moved by
        self._scaler = VideoReformatter()
        try:
            self._disk = Disk(str(path))
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {(error.strerror or '').lower()}", hint="choose another place"
            ) from None
        self._crf = crf
        self._on_card = codec == "h264" and hardware.uses_nvenc((spec.width & ~1, spec.height & ~1))
        self._begin(muxer, options | _PROMPT)
        self._encoder: VideoStream | VideoCodecContext = self._stream
        self._audio = AudioCopy(spec.audio, self._output, self.warnings) if spec.audio else None
        self._track: SoundTrack | None = None
        self._open = True

    def sounding(self) -> None:
        """Live sound is going to come: give the file a track for it. Before the first frame; a copied one stays."""
        if self._audio is None and self._track is None and not self.written:
            self._track = SoundTrack(self._output)

    def hear(self, sound: Sound) -> None:
        """Take 20 ms of live sound, from any thread; without `sounding()` before the first frame it is not kept."""
        if self._track:
            self._track.hear(sound)

    def write(self, frame: Frame) -> None:
        """Encode one frame; raises UserError when the disk is full or gone."""
        pts = self._grown(to_ticks(frame.pts, self._tick))
        picture = self._pixels(frame.image)
        picture.pts, picture.time_base = pts, self._tick
        try:
            self._output.mux(self._encoded(picture))
            if self._audio:
                self._audio.copy(self._output, float(pts * self._tick), float(self._shift * self._tick))
            if self._track:
                self._track.mux(self._output, float(pts * self._tick), frame.captured)
            self._disk.mark()
        except (OSError, av.FFmpegError) as error:
            raise self._failed(error) from None
        self.written += 1

    def close(self) -> None:
        """Finish the file; raises UserError when its end could not be written."""
        if not self._open:
            return
        self._open = False
        try:
            if self.written and self._disk.failure is None:  # a muxer that could not write must get no more packets
                self._output.mux(self._encoded(None))
                self._rest_of_audio()
                if self._track:
                    self._track.finish(self._output)
            self._output.close()
        except (OSError, av.FFmpegError) as error:
            if self._disk.failure is None or self._disk.failure is error:
                raise self._failed(error) from None
        finally:
            if self._audio:
                self._audio.close()
            self._disk.close()

    def _begin(self, muxer: str, options: dict[str, str]) -> None:
        """The container and its track of pictures; without the card where that has no session left."""
        fps = Fraction(self._spec.fps).limit_denominator(1001)
        self._output: OutputContainer = av.open(self._disk, "w", format=muxer, container_options=options)
        codec = hardware.NVENC if self._on_card else CODECS[self._codec]
        self._stream = cast("VideoStream", self._output.add_stream(codec, rate=fps))
        self._describe(self._stream.codec_context)
        if self._on_card:
            try:
                self._stream.codec_context.open()
            except av.FFmpegError as error:
                hardware.nvenc_failed(error)
                self._on_card = False
                self._begin(muxer, options)  # nothing has been written yet

    def _describe(self, context: VideoCodecContext) -> None:
        spec, crf = self._spec, self._crf
        context.time_base = self._tick
        context.gop_size = max(1, round(spec.fps * KEYFRAME_S))
        if self._codec == "ffv1":  # lossless in RGB
            context.width, context.height, context.pix_fmt = spec.width, spec.height, "bgr0"
            context.gop_size = 1
            context.options = {"level": "3", "slicecrc": "1"}
            return
        # 4:2:0 has one colour sample for two by two pixels; a last odd row or column is cut off
        context.width, context.height, context.pix_fmt = spec.width & ~1, spec.height & ~1, "yuv420p"
        context.color_range = ColorRange.MPEG
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.max_b_frames = 0
        if self._on_card:
            context.bit_rate, context.options = 0, hardware.file_options(crf)
        elif self._codec == "h264":
            context.options = {"preset": "veryfast", "crf": str(crf)}
        else:  # MPEG-4 part 2 knows no crf: quantizer 2 (best) to 31
            context.options = {"qmin": "2", "qmax": str(2 + crf * 29 // 51)}
            context.bit_rate = 50_000_000

    def _encoded(self, picture: av.VideoFrame | None) -> list[av.Packet[VideoStream]]:
        """The packets of a picture; when the card fails, this one and all further ones are x264's."""
        try:
            packets = self._encoder.encode(picture)
        except av.FFmpegError as error:
            if not self._on_card:
                raise
            hardware.nvenc_failed(error)
            self._on_card = False
            self._encoder = self._x264()
            packets = self._encoder.encode(picture)
        for packet in packets:
            packet.stream, packet.time_base = self._stream, self._tick
        return packets

    def _x264(self) -> VideoCodecContext:
        """An encoder for a track that another began: its parameter sets have their own number, and come in band."""
        context = av.CodecContext.create("libx264", "w")
        self._describe(context)
        context.framerate = Fraction(self._spec.fps).limit_denominator(1001)
        context.options |= {"x264-params": "sps-id=1"}
        return context

    def _pixels(self, image: np.ndarray) -> av.VideoFrame:
        width, height = self._stream.codec_context.width, self._stream.codec_context.height
        image = boxed(image, (self._spec.width, self._spec.height))  # the stream may change its size
        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), "rgb24")
        if self._codec == "ffv1":
            return self._scaler.reformat(rgb, width=width, height=height, format="bgr0")
        return self._scaler.reformat(
            rgb,
            width=width,
            height=height,
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )

    def _grown(self, pts: int) -> int:
        if self._last is None:
            self._shift = -min(pts, 0)  # MP4 cuts off what is shown before 0
        pts += self._shift
        if self._last is not None and pts <= self._last:
            pts = self._last + 1
            self.nudged += 1
        self._last = pts
        return pts

    def _rest_of_audio(self) -> None:
        """All of it when all pictures came, else up to the end of the last picture."""
        if self._audio is None or self._last is None:
            return
        end = float(self._last * self._tick) + 1 / self._spec.fps
        shift = float(self._shift * self._tick)
        complete = self._spec.end is not None and end - shift + 0.25 >= self._spec.end * 1e-6
        self._audio.copy(self._output, None if complete else end, shift)

    def _failed(self, error: OSError | av.FFmpegError) -> UserError:
        cause = self._disk.failure or error
        why = reason(cause) if isinstance(cause, av.FFmpegError) else (cause.strerror or str(cause)).lower()
        return UserError(
            f"cannot go on writing {self._path}: {why}",
            hint=f"make room or choose another place; of {self.written} frames only the last second may be missing",
        )


def _tick(time_base: Fraction, muxer: str, codec: str) -> Fraction:
    """The finest tick of the source that the container and the codec can keep."""
    if muxer == "matroska":
        return max(time_base, MILLISECOND)
    if codec == "mpeg4" and time_base.denominator > 65_535:
        return Fraction(1, 60_000)
    return time_base
