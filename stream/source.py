"""Where frames come from: the protocol, the scheme table, and the retry schedule of live sources.

A kind of source is one row in `SCHEMES` and one file in `stream/sources/`. Opening raises `UserError`; a live source
that breaks off later raises `SourceLost` from `frames()`, and only the pump, or a live stream's feed, retries.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Protocol
from urllib.parse import urlsplit

from accel.errors import UserError
from stream.frame import Frame, VideoSpec

Size = tuple[int, int]  # W, H

HEALTHY_S = 30.0  # a source that delivered for so long starts the retry schedule anew


class SourceLost(Exception):
    """A live source broke off; opening it again may help. The pts of the new one start at 0 again."""


class SourceChanged(SourceLost):
    """The pictures took another shape (a phone was turned): open again at once, at the shape they have now."""


class Source(Protocol):
    """An open source of frames, read by one thread.

    `frames()` is used once: it ends at the end of the stream and raises `SourceLost` when a live source breaks off.
    `close()` may come from any thread; a reader inside the library ends at its next frame or read timeout.
    """

    spec: VideoSpec
    warnings: list[str]  # one line each, complete when `frames()` has ended

    @property
    def skipped(self) -> int: ...  # packets that could not be decoded

    def frames(self) -> Iterator[Frame]: ...
    def close(self) -> None: ...


# scheme → module of stream/sources that has `open_source(url, size, fit)`; imported when used
SCHEMES: dict[str, str] = {
    "file": "file",
    "http": "network",
    "https": "network",
    "rtsp": "network",
    "rtsps": "network",
    "rtmp": "network",
    "rtmps": "network",
    "srt": "network",
    "camera": "camera",
    "screen": "screen",
    "test": "pattern",
    "demo": "demo",
}

KINDS = "a source is a file, camera[:N], /dev/videoN, screen, rtsp:// rtmp:// srt:// http(s)://, demo or test"


def scheme_of(url: str) -> str:
    """The row of the scheme table a SOURCE belongs to; a bare path is `file`. Raises UserError for an unknown one.

    >>> scheme_of("camera:1"), scheme_of("/dev/video0"), scheme_of("cat.mp4"), scheme_of("RTSP://cam/1")
    ('camera', 'camera', 'file', 'rtsp')
    """
    if re.fullmatch(r"camera(:\d+)?|/dev/video\d+", url):
        return "camera"
    if re.fullmatch(r"screen(:\d+)?", url):
        return "screen"
    if url in ("test", "demo"):
        return url
    if not url:
        raise UserError("no source is named", hint=KINDS)
    scheme, separator, _ = url.partition("://")
    if not separator:
        return "file"
    if scheme.lower() not in SCHEMES:
        raise UserError(
            f"no source of kind {scheme}://",
            hint=KINDS,
        )
    if SCHEMES[scheme.lower()] == "network":
        check_address(url)
    return scheme.lower()


def check_address(url: str) -> None:
    """Raise UserError for what cannot be a URL, or has no host; SRT may listen, and has none then."""
    scheme = url.partition("://")[0].lower()
    try:
        parts = urlsplit(url)
        found = parts.hostname or (scheme == "srt" and parts.port)
    except ValueError:
        found = None
    if not found:
        raise UserError(f"no host in that {scheme}:// address", hint=f"for example {scheme}://camera.lan/1")


def open_source(url: str, *, size: Size | None = None, fit: str = "fit", realtime: bool = False) -> Source:
    """Open `url` and decode as far as its first picture; delivers RGB frames of one constant size.

    `size` is the box W×H (multiples of 8) that the pictures are brought into by `fit` (see `stream.fit`); without it
    they keep their own size. `realtime` plays a recording at its own rate, as if live. Raises UserError.

    >>> with closing(open_source("cat.mp4", size=(512, 512))) as source:
    ...     for frame in source.frames(): ...
    """
    module = import_module(f"stream.sources.{SCHEMES[scheme_of(url)]}")
    source: Source = module.open_source(url, size, fit)
    if realtime and not source.spec.live:
        from stream.sources.realtime import Realtime

        return Realtime(source)
    return source


def retry_delays(jitter: Callable[[], float] = random.random) -> Iterator[float]:
    """Endless waits in s before each attempt to reopen a live source: 1 s five times, 5 s up to the tenth, 10 s up to
    the twentieth, then 60 s; each up to a quarter longer, so that many clients do not return at once.

    The caller takes a new schedule once a reopened source has delivered for `HEALTHY_S`. An attempt fails by
    `UserError` from `open_source` (which is final only for the very first one) or by `SourceLost`. After go2rtc.

    >>> delays = retry_delays(jitter=lambda: 0.0)
    >>> [next(delays) for _ in range(6)]
    [1.0, 1.0, 1.0, 1.0, 1.0, 5.0]
    """
    attempt = 0
    while True:
        attempt += 1
        base = 1.0 if attempt <= 5 else 5.0 if attempt <= 10 else 10.0 if attempt <= 20 else 60.0
        yield base * (1.0 + 0.25 * jitter())
