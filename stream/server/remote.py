"""An http(s) source read by us and not by FFmpeg: every address is checked before it is asked, redirects too."""

from __future__ import annotations

import base64
import http.client
import io
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import suppress
from urllib.parse import unquote, urljoin, urlsplit

import av

from accel.errors import UserError
from stream.frame import Frame
from stream.server.errors import Refused
from stream.source import Size, Source
from stream.sources.container import ContainerSource, Opening, reason
from stream.sources.network import OPEN_S, READ_S, public
from stream.sources.realtime import Realtime

REDIRECTS = 5
# containers that name no other files or addresses: no playlists (hls, dash, concat), no sdp
FORMATS = "mov,mp4,matroska,webm,mpegts,mpeg,flv,avi,mpjpeg,mjpeg,h264,hevc,ogg,ivf,gif,asf"

Check = Callable[[str], list[str]]  # the addresses a URL may be asked at; raises Refused or UserError


def open_remote(url: str, addresses: list[str], check: Check, size: Size | None, fit: str) -> Source:
    """Open a recording, played at its own rate, or a live MJPEG or MPEG-TS stream; raises UserError."""
    name = public(url)
    try:
        body = Body(url, addresses, check)
    except Refused as refused:
        raise UserError(f"{name}: {refused.message}", hint=refused.hint) from None
    except (OSError, http.client.HTTPException) as error:
        why = "no answer in time" if isinstance(error, TimeoutError) else _words(error)
        raise UserError(f"cannot open {name}: {why}", hint="is the address right, and the server running?") from None
    try:
        container = av.open(body, "r", options={"format_whitelist": FORMATS, "protocol_whitelist": ""})
    except av.FFmpegError as error:
        body.close()
        hint = "recordings and MJPEG or MPEG-TS streams are; playlists (.m3u8) are not read from clients' addresses"
        raise UserError(f"{name} is not a video this server reads: {reason(error)}", hint=hint) from None
    recorded = bool(container.duration)
    try:
        source = ContainerSource(container, Opening(name, live=not recorded, size=size, fit=fit))
    except UserError:
        body.close()
        raise
    return Remote(Realtime(source) if recorded else source, body)


class Remote:
    """A source and the connection it reads from: both end together."""

    def __init__(self, source: Source, body: Body) -> None:
        self.spec, self.warnings = source.spec, source.warnings
        self._source, self._body = source, body

    @property
    def skipped(self) -> int:
        """Packets that could not be decoded."""
        return self._source.skipped

    def frames(self) -> Iterator[Frame]:
        """As they come."""
        return self._source.frames()

    def close(self) -> None:
        """Hang up; a reader that waits for bytes is at their end."""
        self._body.close()
        self._source.close()


class Body:
    """The bytes behind a URL as a file that FFmpeg reads; seeks by asking for a range, where the server can.

    A read that fails is the end of the file. Raises OSError, HTTPException, Refused or UserError when it is opened.
    """

    def __init__(self, url: str, addresses: list[str], check: Check) -> None:
        self._url, self._addresses, self._check = url, addresses, check
        self._credentials = _credentials(url)
        self._at = 0
        self._sock, self._response = self._ask(0)
        self._size = self._response.length
        self._ranges = self._response.getheader("Accept-Ranges", "").lower() == "bytes" and self._size is not None

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, as they come; none at the end."""
        try:
            data = self._response.read1(size)
        except (OSError, http.client.HTTPException, ValueError):  # ValueError: closed by another thread
            return b""
        self._at += len(data)
        return data

    def seekable(self) -> bool:
        """Whether the server answers ranges."""
        return self._ranges

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Ask again from there; where that fails, what follows is the end of the file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size or 0}[whence]
        target = max(0, base + offset)
        if target != self._at and whence != io.SEEK_END:
            self.close()
            with suppress(OSError, http.client.HTTPException, Refused, UserError):
                self._sock, self._response = self._ask(target)
        self._at = target
        return target

    def tell(self) -> int:
        """How far it has been read."""
        return self._at

    def close(self) -> None:
        """Hang up, also under another thread that reads."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._response.close()
        self._sock.close()

    def _ask(self, start: int) -> tuple[socket.socket, http.client.HTTPResponse]:
        for _ in range(REDIRECTS + 1):
            connection = _connect(self._url, self._addresses)
            sock = connection.sock
            parts = urlsplit(self._url)
            headers = {"User-Agent": "livestyle", "Accept": "*/*", "Accept-Encoding": "identity"} | self._credentials
            if start:
                headers["Range"] = f"bytes={start}-"
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            try:
                connection.request("GET", target, headers=headers)
                response = connection.getresponse()
            except BaseException:
                sock.close()
                raise
            location = response.getheader("Location")
            if response.status in (301, 302, 303, 307, 308) and location:
                response.close()
                sock.close()
                self._follow(location)
                continue
            if response.status != (206 if start else 200):
                response.close()
                sock.close()
                raise http.client.HTTPException(f"the server answered {response.status} {response.reason}"[:200])
            return sock, response
        raise http.client.HTTPException("too many redirects")

    def _follow(self, location: str) -> None:
        try:
            url = urljoin(self._url, location)
        except ValueError:
            raise http.client.HTTPException("a redirect to no address") from None
        if urlsplit(url).scheme not in ("http", "https"):
            raise http.client.HTTPException("a redirect to something else")
        self._addresses = self._check(url)
        if urlsplit(url).netloc != urlsplit(self._url).netloc:
            self._credentials = _credentials(url)
        self._url = url


def _connect(url: str, addresses: list[str]) -> http.client.HTTPConnection:
    """A connection to one of `addresses`, though named after the host in the URL."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    failure: OSError = ConnectionError("no address")
    for address in addresses:
        try:
            sock: socket.socket = socket.create_connection((address, port), OPEN_S)
            if secure:
                sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        except OSError as error:
            failure = error
            continue
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(host, port, timeout=READ_S)
        sock.settimeout(READ_S)
        connection.sock = sock
        return connection
    raise failure


def _credentials(url: str) -> dict[str, str]:
    parts = urlsplit(url)
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return {"Authorization": f"Basic {base64.b64encode(pair).decode()}"}


def _words(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).lower()
