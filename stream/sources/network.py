"""Network streams: RTSP, RTMP and SRT live; HTTP(S) live, or as a recording where the server tells its length."""

from __future__ import annotations

import time
from urllib.parse import urlsplit, urlunsplit

import av
from av.container import InputContainer

from accel.errors import UserError
from stream.sources.container import ContainerSource, Opening, reason

OPEN_S = 10.0
READ_S = 5.0  # silence longer than this is a lost source

# Not `nobuffer`: it throws away what was read while looking at the stream, the keyframe with it, so that the first
# picture comes with the next one, a second or ten later. The few pictures that wait are caught up with.
_LIVE = {"flags": "low_delay", "analyzeduration": "100000"}  # µs
_RTSP = _LIVE | {"max_delay": "100000", "allowed_media_types": "video+audio"}  # µs
_RTMP = _LIVE | {"rtmp_live": "live"}
_SOCKET = {"rtsp": "timeout", "rtmp": "rw_timeout", "http": "rw_timeout"}  # RTMP's own `timeout` would mean: listen

ATTEMPTS: dict[str, list[dict[str, str]]] = {  # options to try, in order
    "rtsp": [_RTSP | {"rtsp_transport": "tcp"}, _RTSP | {"rtsp_transport": "udp"}],
    "rtmp": [_RTMP],
    "srt": [_LIVE],
    "http": [{}],
}


FINAL = (  # another transport meets the same server
    av.error.ConnectionRefusedError,
    av.error.HTTPError,
    av.error.HTTPUnauthorizedError,
    av.error.HTTPForbiddenError,
    av.error.HTTPNotFoundError,
)
SILENT = (av.error.TimeoutError, av.error.ExitError)


def open_source(url: str, size: tuple[int, int] | None, fit: str) -> ContainerSource:
    """Open a stream and wait for its first picture; raises UserError when it is refused, silent or unknown."""
    name = public(url)
    container = _connect(url, name)
    recorded = urlsplit(url).scheme.lower().startswith("http") and bool(container.duration)
    audio = url if recorded else None
    return ContainerSource(
        container, Opening(name, live=not recorded, size=size, fit=fit, audio=audio, silence_s=READ_S)
    )


def public(url: str) -> str:
    """The URL without user, password and query, fit for messages and logs.

    >>> public("rtsp://admin:secret@10.0.0.7/stream?token=x")
    'rtsp://10.0.0.7/stream'
    """
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _connect(url: str, name: str) -> InputContainer:
    scheme = urlsplit(url).scheme.lower()
    kind = scheme if scheme in ATTEMPTS else scheme.removesuffix("s")
    why = ""
    limit = {_SOCKET[kind]: str(round(READ_S * 1e6))} if kind in _SOCKET else {}
    for options in ATTEMPTS[kind]:
        began = time.monotonic()
        try:
            return av.open(url, options=options | limit, timeout=(OPEN_S, READ_S))
        except av.error.ProtocolNotFoundError:
            raise UserError(
                f"{scheme}:// is not in this build of FFmpeg",
                hint="republish the stream as rtsp:// (MediaMTX or go2rtc do)",
            ) from None
        except av.FFmpegError as error:
            # a time limit within RTSP ends as "invalid data"
            silent = isinstance(error, SILENT) or time.monotonic() - began >= READ_S
            why = "no answer in time" if silent else reason(error)
            if silent or isinstance(error, FINAL):
                break
    raise UserError(f"cannot open {name}: {why}", hint="is the sender running, and are host, port and path right?")
