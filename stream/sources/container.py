"""Frames out of an open FFmpeg container: what files, network streams and cameras have in common."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import av
from av.codec.context import Flags
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from accel.errors import UserError
from stream.frame import Frame, VideoSpec, to_us
from stream.sound import Sound
from stream.source import SourceLost
from stream.sources.decoding import Decoding
from stream.sources.ear import Ear
from stream.sources.picture import Picture

av.logging.set_level(None)  # FFmpeg's log callback takes the GIL from its own threads and can deadlock with them

JUMP_US = 1_000_000  # pts going back further than this start a new epoch
WAITED_S = 0.002  # a packet without pts that took less had been waiting for us
STALE_S = 0.3  # a first picture that waited longer for its reader is not shown
BEHIND_S = 0.05  # more than a frame
BACKLOG = 300  # frames at most that are thrown away to catch up with a live source
SILENCE_S = 5.0  # a live source that sends no picture for so long is lost, whatever else it sends


@dataclass(frozen=True, slots=True)
class Opening:
    """How a container is to be read."""

    name: str  # as messages call it; no password
    live: bool
    size: tuple[int, int] | None = None  # box W×H
    fit: str = "fit"
    origin: str | None = None  # path, where it is a file
    audio: str | None = None  # path or URL to copy the audio from, where there is any
    silence_s: float = SILENCE_S
    clock: Callable[[], float] = time.monotonic


def reason(error: av.FFmpegError) -> str:
    """What FFmpeg says went wrong, in lower case."""
    return (error.strerror or type(error).__name__).lower()


class ContainerSource:
    """Decodes the first video stream of a container; the first picture is decoded by the constructor.

    Raises UserError where there is no video to decode. Owns the container: closed when `frames()` ends or by `close()`,
    which never pulls it from under a reading thread. `sound`, where it is set before `frames()`, is called by the
    reading thread with the sound of a live source as it comes.
    """

    def __init__(self, container: InputContainer, opening: Opening) -> None:
        self._container, self._opening = container, opening
        self.warnings: list[str] = []
        self.skipped = 0
        self.sound: Callable[[Sound], None] | None = None
        self.has_sound = False  # a live source sends some
        self._lock = threading.Lock()
        self._reading = self._closed = False
        self._fault = ""  # why reading ended before its end
        self._waited = 0.0
        self._ear: Ear | None = None
        try:
            self._stream = _video_stream(container, opening)
            if opening.live and container.streams.audio:
                self._ear = Ear(container.streams.audio[0], opening.clock)
                self.has_sound = True
            self._decoder = Decoding(self._stream)
            self._decoded = self._decode()
            self._first = self._first_picture()
            self._opened = opening.clock()
        except BaseException:
            container.close()
            raise
        self._time_base = self._stream.time_base or Fraction(1, 90_000)
        self._picture = Picture(self._first, self._stream.sample_aspect_ratio, opening.size, opening.fit)
        self.spec = self._spec()

    def frames(self) -> Iterator[Frame]:
        """Every decodable picture in order of showing; raises SourceLost when a live source ends or breaks."""
        with self._lock:
            if self._closed:
                return
            self._reading = True
        try:
            yield from self._timed()
            self._ended()
        finally:
            with self._lock:
                self._reading = False
                self._closed = True
                self._decoded.close()
                self._container.close()

    def close(self) -> None:
        """End reading; from another thread than the reader's it takes effect at the next packet."""
        with self._lock:
            self._closed = True
            if not self._reading:
                self._decoded.close()
                self._container.close()

    def _timed(self) -> Iterator[Frame]:
        """Frames with pts in µs: a file's own, a live source's since it opened; never jumping back by more than 1 s."""
        live, clock = self._opening.live, self._opening.clock
        step = round(1e6 / self.spec.fps)
        self._last = -step
        epoch = 0
        for seq, picture in enumerate(self._current() if live else self._pictures()):
            pts = self._last + step if picture.pts is None else to_us(picture.pts, self._time_base) + epoch
            if seq == 0 and live:
                epoch, pts = -pts, 0
            elif seq and pts < self._last - JUMP_US:
                epoch += self._last + step - pts
                pts = self._last + step
            self._last = pts
            frame = Frame(self._picture(picture), pts, seq, clock())
            if self._ear and picture.pts is not None:
                self._ear.seen(float(picture.pts * self._time_base), frame.captured)
            yield frame
            if self._closed:
                return

    def _pictures(self) -> Iterator[av.VideoFrame]:
        yield self._first
        yield from self._decoded

    def _current(self) -> Iterator[av.VideoFrame]:
        """The first picture at once where it is fresh, then without those that piled up between opening and reading."""
        then = self._opening.clock()
        if then - self._opened < STALE_S:
            yield self._first
            then = self._opening.clock()
        zero = shown = self._first.time  # RTSP does not always tell it of the first
        for count, picture in enumerate(self._decoded):
            now = self._opening.clock()
            if picture.time is None:
                old = self._waited < WAITED_S
            else:
                if zero is None or shown is None:
                    zero = shown = picture.time - 1 / self.spec.fps
                # it came much sooner after the one before than it was taken, or is further behind than the clock says
                old = now - then < (picture.time - shown) / 2 or now - self._opened - (picture.time - zero) > BEHIND_S
                shown = picture.time
            if count == BACKLOG or not old:
                yield picture
                break
            then = now
        yield from self._decoded

    def _decode(self) -> Generator[av.VideoFrame, None, None]:
        """Decoded pictures; packets that cannot be decoded are counted, a broken read ends the stream."""
        packets = self._packets()
        clock = self._opening.clock
        while not self._closed:
            asked = clock()
            try:
                packet = next(packets, None)
            except av.FFmpegError as error:
                self._fault = reason(error)
                packet = None
            self._waited = clock() - asked
            try:
                yield from self._decoder.decode(packet)
            except av.EOFError:  # flushed twice: the demuxer's own last packet did it
                return
            except av.FFmpegError:
                self.skipped += 1
            if packet is None:
                return

    def _packets(self) -> Iterator[Packet[VideoStream]]:
        """Packets of the pictures; those of a live source's sound are heard on the way."""
        if self._ear is None:
            yield from self._container.demux(self._stream)
            return
        clock, seen = self._opening.clock, self._opening.clock()
        for packet in self._container.demux(self._stream, self._ear.stream):
            if packet.stream.type == "video":
                yield cast("Packet[VideoStream]", packet)
                seen = clock()
            elif clock() - seen > self._opening.silence_s:  # sound alone keeps every time limit of the network happy
                self._fault = f"sound but no picture for {self._opening.silence_s:.0f} s"
                return
            elif self.sound:
                self._ear.hear(packet, self.sound)

    def _first_picture(self) -> av.VideoFrame:
        picture = next(self._decoded, None)
        if picture is None:
            why = f" ({self._fault})" if self._fault else ""
            raise UserError(
                f"no picture can be decoded from {self._opening.name}{why}", hint="is it a damaged or empty video?"
            )
        return picture

    def _ended(self) -> None:
        if self._closed:
            return
        name = self._opening.name
        if self._opening.live:
            raise SourceLost(f"{name}: {self._fault or 'the stream ended'}")
        step = 1e6 / self.spec.fps
        if self.spec.end is not None and self._last + 3 * step + 100_000 < self.spec.end:
            at, end = (self._last + step) * 1e-6, self.spec.end * 1e-6
            self.warnings.append(f"{name} is cut short: pictures end at {at:.2f} s of {end:.2f} s")
        elif self._fault:
            self.warnings.append(f"{name} is damaged at its end ({self._fault})")
        if self.skipped:
            self.warnings.append(f"{name} is damaged: {self.skipped} packets could not be decoded")

    def _spec(self) -> VideoSpec:
        stream, opening = self._stream, self._opening
        audio = opening.audio if self._container.streams.audio else None
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        return VideoSpec(
            *self._picture.size,
            fps=fps if 0.1 <= fps <= 1000 else 30.0,
            live=opening.live,
            time_base=self._time_base,
            frames=stream.frames or None,
            audio=audio,
            native=self._picture.native,
            end=None if opening.live else _end(self._container, stream),
            origin=opening.origin,
        )


def _video_stream(container: InputContainer, opening: Opening) -> VideoStream:
    # the cover picture of a music file is a video stream too
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise UserError(f"no video in {opening.name}", hint="it has sound or data only; choose a file with pictures")
    stream = streams[0]
    if stream.codec_context is None:
        raise UserError(f"no decoder for the video in {opening.name}", hint="convert it to H.264 first")
    if opening.live:
        stream.thread_type = "SLICE"  # frame threads would hold pictures back
        stream.codec_context.flags |= Flags.low_delay
    else:
        stream.thread_type = "AUTO"
    return stream


def _end(container: InputContainer, stream: VideoStream) -> int | None:
    """The pts in µs at which the pictures should end, by the first place that tells."""
    start = to_us(stream.start_time, stream.time_base) if stream.start_time and stream.time_base else 0
    if stream.duration and stream.time_base:
        return start + to_us(stream.duration, stream.time_base)
    with contextlib.suppress(KeyError, ValueError):  # Matroska keeps it per stream, as 00:00:10.000000000
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return round((int(hours) * 3600 + int(minutes) * 60 + float(seconds)) * 1e6)
    if container.duration and not container.streams.audio:
        return start + container.duration
    return None
