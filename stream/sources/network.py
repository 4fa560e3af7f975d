"""Network streams: RTSP, RTMP and SRT live; HTTP(S) live, or as a recording where the server tells its length."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

import av
from av.container import InputContainer

from accel.errors import UserError
from stream.sources.container import ContainerSource, Opening, reason

OPEN_S = 10.0
READ_S = 5.0  # silence longer than this is a lost source

_LIVE = {"fflags": "nobuffer", "flags": "low_delay", "analyzeduration": "100000"}  # µs
_RTSP = _LIVE | {"timeout": "5000000", "max_delay": "100000", "allowed_media_types": "video"}  # µs
_RTMP = _LIVE | {"rw_timeout": "5000000", "rtmp_live": "live"}  # its `timeout` would mean: listen
_HTTP = {"rw_timeout": "5000000"}

ATTEMPTS: dict[str, list[dict[str, str]]] = {  # options to try, in order
    "rtsp": [_RTSP | {"rtsp_transport": "tcp"}, _RTSP | {"rtsp_transport": "udp"}],
    "rtmp": [_RTMP],
    "srt": [_LIVE],
    "http": [_HTTP],
}


def open_source(url: str, size: tuple[int, int] | None, fit: str) -> ContainerSource:
    """Open a stream and wait for its first picture; raises UserError when it is refused, silent or unknown."""
    name = public(url)
    container = _connect(url, name)
    recorded = urlsplit(url).scheme.lower().startswith("http") and bool(container.duration)
    audio = url if recorded else None
    return ContainerSource(container, Opening(name, live=not recorded, size=size, fit=fit, audio=audio))


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
    failure: av.FFmpegError | None = None
    for options in ATTEMPTS[kind]:
        try:
            return av.open(url, options=options, timeout=(OPEN_S, READ_S))
        except av.error.ProtocolNotFoundError:
            raise UserError(
                f"{scheme}:// is not in this build of FFmpeg",
                hint="republish the stream as rtsp:// (MediaMTX or go2rtc do)",
            ) from None
        except (av.error.ConnectionRefusedError, av.error.HTTPError) as error:
            failure = error
            break  # another transport meets the same server
        except av.FFmpegError as error:
            failure = error
    assert failure is not None
    why = "no answer in time" if isinstance(failure, av.error.ExitError | av.error.TimeoutError) else reason(failure)
    raise UserError(
        f"cannot open {name}: {why}", hint="is the sender running, and are host, port and path right?"
    ) from None
