"""Where frames go: the protocol and the scheme table.

A kind of sink is one row in `SCHEMES` and one file in `stream/sinks/`. Opening raises `UserError`.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Protocol

from accel.errors import UserError
from stream.frame import Frame, VideoSpec
from stream.source import check_address


class SinkClosed(Exception):
    """The viewer closed the sink: the session ends in order."""


class Sink(Protocol):
    """An open receiver of frames, used by one writer thread.

    `write()` raises `SinkClosed` when the viewer is gone and `UserError` when nothing more can be written, after which
    only `close()` may be called. `close()` may be called twice.
    """

    written: int  # frames
    warnings: list[str]  # one line each

    def write(self, frame: Frame) -> None: ...
    def close(self) -> None: ...


# scheme → module of stream/sinks that has `check(url, codec, origin)` and `open_sink(url, spec, codec, crf)`
SCHEMES: dict[str, str] = {
    "file": "file",
    "window": "window",
    "null": "null",
    "virtualcam": "virtualcam",
    "rtmp": "publish",
    "rtmps": "publish",
    "rtsp": "publish",
    "rtsps": "publish",
    "srt": "publish",
    "whip+http": "whip",
    "whip+https": "whip",
}

KINDS = "a sink is a file (.mp4 .mkv .mov), virtualcam, rtmp:// rtsp:// srt:// whip+https://, window or null"
OUTWARD = ("virtualcam", "publish", "whip")  # modules whose viewers see frames when they are written


def scheme_of(url: str) -> str:
    """The row of the scheme table a SINK belongs to; a bare path is `file`. Raises UserError for an unknown one.

    >>> scheme_of("out.mp4"), scheme_of("null"), scheme_of("virtualcam:/dev/video9"), scheme_of("RTMP://host/live")
    ('file', 'null', 'virtualcam', 'rtmp')
    """
    if url in ("window", "null"):
        return url
    if not url:
        raise UserError("no sink is named", hint=KINDS)
    if re.fullmatch(r"virtualcam(:.+)?", url):
        return "virtualcam"
    scheme, separator, _ = url.partition("://")
    if not separator:
        return "file"
    if scheme.lower() not in SCHEMES:
        raise UserError(
            f"no sink of kind {scheme}://",
            hint=KINDS,
        )
    if SCHEMES[scheme.lower()] in ("publish", "whip"):
        check_address(url)
    return scheme.lower()


def is_outward(url: str) -> bool:
    """Whether a SINK shows frames to others at once: a recording must be played at its own rate for it."""
    return SCHEMES[scheme_of(url)] in OUTWARD


def check_sink(url: str, *, codec: str = "h264", origin: str | None = None) -> None:
    """Raise the UserError that `open_sink` would, without creating anything; `origin` is the file being read."""
    import_module(f"stream.sinks.{SCHEMES[scheme_of(url)]}").check(url, codec, origin)


def open_sink(url: str, spec: VideoSpec, *, codec: str = "h264", crf: int = 18) -> Sink:
    """Open `url` for frames of `spec`, whose width and height are those that will be written. Raises UserError.

    `codec` (`h264`, `mpeg4`, or lossless `ffv1`) and `crf` (0–51, lower is better) are for files.

    >>> with closing(open_sink("out.mp4", source.spec)) as sink:
    ...     for frame in source.frames(): sink.write(frame)
    """
    check_sink(url, codec=codec, origin=spec.origin)
    sink: Sink = import_module(f"stream.sinks.{SCHEMES[scheme_of(url)]}").open_sink(url, spec, codec, crf)
    return sink
