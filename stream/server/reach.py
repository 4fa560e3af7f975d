"""What a client may make this server reach: sources and outputs by scheme and host, against request forgery.

A host is allowed by its exact name or address, by a network (`192.168.1.0/24`), or by a wildcard. What is listed
exactly may be anywhere, a camera in the LAN above all. A wildcard (`*.example.com`) stands for public addresses only,
and is looked up again before every opening. `*` alone counts for http(s) sources, which we read ourselves
(`remote.py`): the address that was checked is the address that is asked, and a redirect is checked like the first
request. RTSP and RTMP are opened by FFmpeg, which follows a redirect that an RTSP server sends; so only list servers
that you trust.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from urllib.parse import SplitResult, parse_qs, urlsplit

from accel.errors import UserError
from stream.feed import Opener
from stream.server.errors import Refused
from stream.server.settings import ServerSettings
from stream.sink import scheme_of as sink_scheme
from stream.source import Size, Source, open_source
from stream.source import scheme_of as source_scheme
from stream.sources.network import public

URL = re.compile(
    r"[\x21-\x5b\x5d-\x7e]{1,2048}"
)  # printable ASCII without space and backslash: parsers disagree on those
INNER = ("demo", "test", "camera", "screen")  # sources without a host
CAMERA = re.compile(r"virtualcam(:(/dev/video\d+|[\w.-]+))?")  # no other device file
LISTENING = ("listener", "rendezvous")  # modes of SRT that open a port here
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A source that may be opened: what opens it, and its name without secrets."""

    open: Opener
    label: str


def resolve(host: str) -> list[str]:
    """Every address of a name; raises OSError."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


class Reach:
    """The allow-lists of a server. Its methods look names up: call them in a thread.

    >>> Reach(settings).source("rtsp://door.lan/1").label
    'rtsp://door.lan/1'
    """

    def __init__(self, settings: ServerSettings, resolve: Resolve = resolve) -> None:
        self._settings = settings
        self._resolve = resolve

    def source(self, url: str) -> Admitted:
        """What opens `url`; raises Refused 403 where that is not allowed, UserError where it is no source."""
        scheme = source_scheme(_clean(url))
        if scheme == "file":
            raise Refused(403, "local files are not opened for clients", "give an http(s):// or rtsp:// address")
        if scheme not in self._settings.source_schemes:
            raise Refused(403, f"{scheme} is not allowed as a source here", f"start with --allow-source {scheme}")
        if scheme in INNER:
            return Admitted(partial(_open, url), url)
        self._source_addresses(url)
        return Admitted(partial(self._open_checked, url), public(url))

    def output(self, url: str) -> str:
        """The URL as it may be shown; raises Refused 403 where it is not allowed, UserError where it is no output."""
        scheme = sink_scheme(_clean(url))
        if scheme not in self._settings.output_schemes:
            raise Refused(
                403, f"{scheme} is not allowed as an output here", "give an rtmp://, srt:// or whip+https:// address"
            )
        if scheme == "virtualcam":
            if not CAMERA.fullmatch(url):
                raise Refused(403, "that is no camera", "virtualcam, virtualcam:/dev/video9 or virtualcam:NAME")
            return url
        parts = _split(url)
        self._addresses(parts, self._settings.output_hosts, "--allow-output", anywhere=False)
        return f"{parts.scheme}://{_host_port(parts)}/…"  # the path is often the key

    def _open_checked(self, url: str, box: Size | None, fit: str) -> Source:
        try:
            addresses = self._source_addresses(url)
        except Refused as refused:
            raise UserError(refused.message, hint=refused.hint) from None
        if not url.lower().startswith("http"):
            return _open(url, box, fit)
        from stream.server.remote import open_remote

        return open_remote(url, addresses, self._source_addresses, box, fit)

    def _source_addresses(self, url: str) -> list[str]:
        parts = _split(url)
        if parts.scheme not in self._settings.source_schemes:
            raise Refused(403, f"{parts.scheme} is not allowed as a source here")
        anywhere = parts.scheme in ("http", "https")
        return self._addresses(parts, self._settings.source_hosts, "--allow-source", anywhere=anywhere)

    def _addresses(self, parts: SplitResult, patterns: Iterable[str], flag: str, *, anywhere: bool) -> list[str]:
        """The addresses of an allowed host; raises Refused 403, or UserError when there is no such host."""
        host = (parts.hostname or "").rstrip(".")
        known = [pattern for pattern in patterns if anywhere or pattern != "*"]
        exact, wild = _listed(host, known)
        if not exact and not wild:
            raise Refused(403, f"{host[:200]} is not an allowed host", f"start with {flag} {host[:200]}")
        try:
            found = list(self._resolve(host))
        except (OSError, UnicodeError):
            raise UserError(f"no such host: {host[:200]}", hint="check the address") from None
        inside = [address for address in found if not is_public(address) and not _listed(address, known)[0]]
        if not exact and (inside or not found):
            hint = f"start with {flag} {host[:200]} where this is meant to be"
            raise Refused(403, f"{host[:200]} is an address inside this network", hint)
        return found


def is_public(address: str) -> bool:
    """Whether an address is one of the open Internet; one that is embedded in an IPv6 address counts.

    >>> is_public("8.8.8.8"), is_public("10.0.0.7"), is_public("::ffff:127.0.0.1")
    (True, False, False)
    """
    try:
        found: Address = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if found in NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        found = inner or found
    return found.is_global and not found.is_multicast


def _clean(url: str) -> str:
    if not URL.fullmatch(url):
        raise UserError(
            "that is no address", hint="for example rtsp://camera.lan/1; no spaces, at most 2048 characters"
        )
    return url


def _split(url: str) -> SplitResult:
    """The parts of a URL with a host; raises UserError."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    if not parts.hostname or "%" in parts.netloc.rpartition("@")[2]:
        raise UserError("there is no host in that address", hint="for example rtsp://camera.lan/1")
    if parse_qs(parts.query).get("mode", [""])[-1] in LISTENING:
        raise Refused(403, "this server opens no port for that", "let it call: leave mode out")
    return parts


def _listed(host: str, patterns: Iterable[str]) -> tuple[bool, bool]:
    """Whether a host is on the list itself (name, address or network), and whether a wildcard covers it."""
    exact = wild = False
    name = host.lower()
    for pattern in (pattern.strip().strip("[]").rstrip(".").lower() for pattern in patterns):
        if pattern == "*" or (pattern.startswith("*.") and name.endswith(pattern[1:])):
            wild = True
        elif pattern == name or _in_network(name, pattern):
            exact = True
    return exact, wild


def _in_network(host: str, pattern: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(pattern, strict=False)
    except ValueError:
        return False


def _host_port(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]


def _open(url: str, box: Size | None, fit: str) -> Source:
    return open_source(url, size=box, fit=fit, realtime=True)


def opener(url: str) -> Opener:
    """What opens a source that the server's owner named: anything goes."""
    return partial(_open, url)
