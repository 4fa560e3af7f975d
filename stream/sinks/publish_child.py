"""The process that encodes and publishes: `python -m stream.sinks.publish_child`, one connection in its life.

Reads a line of JSON (`Target`), then pictures and sound (`stream.sinks.wire`) from its standard input, and says on its
standard output how it goes, a line of JSON each: {"state": "connecting" | "live" | "failed", "why": …}. It ends with
its input, so it never outlives its parent.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, BinaryIO, cast

import av
from av.container import OutputContainer
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from accel.errors import UserError
from stream import hardware
from stream.frame import Frame, to_ticks
from stream.mailbox import Mailbox
from stream.sinks.audio import SoundTrack
from stream.sinks.wire import receive
from stream.sources.container import reason

TICK = Fraction(1, 90_000)
KEYFRAME_S = 2.0  # what Twitch and YouTube ask for
BITS_PER_PIXEL = 0.12
LEAVE_S = 3.0  # for hanging up, once the input has ended
MUXERS: dict[str, tuple[str, dict[str, str]]] = {  # scheme without its s → muxer, options; times in µs
    "rtmp": ("flv", {"flvflags": "no_duration_filesize", "rw_timeout": "5000000"}),
    "rtsp": ("rtsp", {"rtsp_transport": "tcp"}),
    "srt": ("mpegts", {"pat_period": "0.5"}),
}
PROMPT = {"flush_packets": "1", "max_interleave_delta": "300000"}  # µs
RELAY = (  # bytes in, bytes out, in the packets that MPEG-TS over SRT has
    *("-hide_banner", "-loglevel", "error", "-fflags", "nobuffer", "-probesize", "32", "-analyzeduration", "0"),
    *("-f", "data", "-raw_packet_size", "1316", "-i", "pipe:0", "-map", "0", "-c", "copy", "-f", "data"),
    *("-flush_packets", "1", "-progress", "pipe:1", "-stats_period", "0.2"),
)
STUFFING = (b"\x47\x1f\xff\x10" + b"\xff" * 184) * 7  # null packets, ISO 13818-1 §2.4.3.3


@dataclass(frozen=True, slots=True)
class Target:
    """What is published where. `relay`: the ffmpeg program that knows the protocol where this library does not."""

    url: str
    width: int  # even
    height: int
    fps: float
    relay: str | None = None
    patience_s: float = 10.0  # for connecting
    encoder: str = "auto"

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @property
    def kind(self) -> str:
        """The row of `MUXERS`."""
        scheme = self.url.partition("://")[0].lower()
        return scheme if scheme in MUXERS else scheme.removesuffix("s")


class Broadcast:
    """An open connection, H.264 without delay and a stereo AAC track (services refuse pictures without sound)."""

    def __init__(self, output: OutputContainer, target: Target) -> None:
        self._output, self._target = output, target
        self._scaler = VideoReformatter()
        self._video = self._h264()
        self.track = SoundTrack(output)
        self._first: int | None = None  # µs
        self._last = -1  # ticks
        self._keyframe = 0

    def start(self) -> None:
        """Connect; returns when the server has accepted, raises av.FFmpegError."""
        self._output.start_encoding()

    def write(self, frame: Frame) -> None:
        """Encode and send one picture, and the sound up to it."""
        if self._first is None:
            self._first = frame.pts
        pts = max(to_ticks(frame.pts - self._first, TICK), self._last + 1)
        picture = self._picture(frame)
        picture.pts, picture.time_base = pts, TICK
        if self._last < 0 or (pts - self._keyframe) * TICK >= KEYFRAME_S:
            picture.pict_type = PictureType.I  # by time: a slate comes at 5 fps
            self._keyframe = pts
        self._last = pts
        self._output.mux(self._video.encode(picture))
        self.track.mux(self._output, float(pts * TICK), frame.captured)

    def finish(self) -> None:
        """Send what the encoders hold, and hang up."""
        if self._last >= 0:
            self._output.mux(self._video.encode(None))
            self.track.finish(self._output)
        self._output.close()

    def _h264(self) -> VideoStream:
        target = self._target
        fps = Fraction(target.fps).limit_denominator(1001)
        on_card = hardware.uses_nvenc((target.width, target.height))  # when it breaks off, so does this process
        codec = hardware.NVENC if on_card else "libx264"
        stream = cast("VideoStream", self._output.add_stream(codec, rate=fps))
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = target.width, target.height, "yuv420p"
        context.time_base = TICK
        context.gop_size = max(1, round(target.fps * KEYFRAME_S))
        context.max_b_frames = 0
        context.color_range = ColorRange.MPEG
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.bit_rate = max(600_000, round(target.width * target.height * target.fps * BITS_PER_PIXEL))
        rate = str(context.bit_rate)
        context.options = (
            hardware.live_options(context.bit_rate, context.bit_rate)
            if on_card
            else {"preset": "superfast", "tune": "zerolatency", "forced-idr": "1", "maxrate": rate, "bufsize": rate}
        )
        return stream

    def _picture(self, frame: Frame) -> av.VideoFrame:
        size = self._target.width, self._target.height
        image = frame.image
        if image.shape[1::-1] != size:
            from stream.sinks.letterbox import boxed

            image = boxed(image, size)
        return self._scaler.reformat(
            av.VideoFrame.from_ndarray(image, "rgb24"),
            width=size[0],
            height=size[1],
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )


class Relay:
    """The system's ffmpeg, which sends the bytes of our MPEG-TS on as they are."""

    def __init__(self, target: Target) -> None:
        assert target.relay
        command = [target.relay, *RELAY, target.url]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe)
        self._connected = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def connect(self) -> BinaryIO:
        """Where to write, once the other side has accepted; raises OSError."""
        assert self.process.stdin
        while not self._connected.is_set():
            self.process.stdin.write(STUFFING)  # only with something to send does ffmpeg say how it goes
            self._connected.wait(0.1)
        return cast("BinaryIO", self.process.stdin)

    def finish(self) -> None:
        """Let it send what it has, and end."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(LEAVE_S)

    def why(self) -> str:
        """What ffmpeg said last, without the URL, which may hold a passphrase."""
        assert self.process.stderr
        said = self.process.stderr.read().decode(errors="replace").strip().splitlines()
        what = said[-1].rpartition(": ")[2].strip().lower() if said else "ffmpeg ended"
        return "no answer" if what == "input/output error" else what

    def _watch(self) -> None:
        """Progress is printed from when the connection stands."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(b"total_size="):
                self._connected.set()


def main() -> int:
    """Publish until the input ends (0) or the connection fails (1)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    pipe = sys.stdin.buffer
    line = pipe.readline()
    if not line:
        return 0
    target = Target(**json.loads(line))
    report("connecting")
    with suppress(UserError):  # where the card has no session left by now, x264 it is
        hardware.choose("software", target.encoder)
    # A connection under way holds the interpreter, so that not even the end of the input is noticed; this clock runs
    # outside of it.
    with open(os.devnull, "wb") as nowhere:
        faulthandler.dump_traceback_later(target.patience_s, exit=True, file=nowhere.fileno())
        return _run(target, pipe)


def _run(target: Target, pipe: BinaryIO) -> int:
    relay = Relay(target) if target.relay else None
    try:
        _publish(target, pipe, relay)
    except (OSError, av.FFmpegError, ValueError) as error:
        if relay:
            relay.process.wait(LEAVE_S)
        report("failed", relay.why() if relay else _why(error))
        return 1
    return 0


def report(state: str, why: str = "") -> None:
    """A line for the parent; nothing where it is gone."""
    with suppress(OSError):
        print(json.dumps({"state": state, "why": why}), flush=True)


def _publish(target: Target, pipe: BinaryIO, relay: Relay | None) -> None:
    muxer, options = MUXERS[target.kind]
    place: Any = relay.connect() if relay else target.url
    output = av.open(place, "w", format=muxer, options=options, container_options=options | PROMPT)
    broadcast = Broadcast(output, target)
    frames = Mailbox[Frame](2)
    threading.Thread(target=_read, args=(pipe, frames, broadcast.track), daemon=True).start()
    broadcast.start()
    faulthandler.cancel_dump_traceback_later()
    report("live")
    for frame in frames:
        broadcast.write(frame)
    broadcast.finish()
    if relay:
        relay.finish()


def _read(pipe: BinaryIO, frames: Mailbox[Frame], track: SoundTrack) -> None:
    """Keep the newest pictures while the connection is slow."""
    while (item := receive(pipe)) is not None:
        if isinstance(item, Frame):
            frames.put(item)
        else:
            track.hear(item)
    frames.close()
    watchdog = threading.Timer(LEAVE_S, os._exit, (1,))  # the network may hold the other thread for ever
    watchdog.daemon = True
    watchdog.start()


def _why(error: Exception) -> str:
    if isinstance(error, av.FFmpegError):
        return reason(error)
    return str(error).lower() or type(error).__name__


if __name__ == "__main__":
    os._exit(main())  # at once, whatever the reading thread waits for
