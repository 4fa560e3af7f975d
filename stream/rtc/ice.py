"""ICE: which servers our peers use, how they are told to clients, and what of a client's candidates we take."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aiortc import RTCBundlePolicy, RTCConfiguration, RTCIceCandidate, RTCIceServer, RTCPeerConnection

from stream.rtc.sdp import Malformed

REST_TTL_S = 6 * 3600  # how long TURN credentials that are made for a client hold
MAX_CANDIDATES = 24  # of one peer; each costs connectivity checks to an address that somebody else chose


class Server(Protocol):
    """One STUN or TURN server of the settings; `secret` is a coturn `static-auth-secret`, instead of a credential."""

    @property
    def urls(self) -> Sequence[str]: ...
    @property
    def username(self) -> Any: ...
    @property
    def credential(self) -> Any: ...


def credentials(server: Server, now: float, user: str = "livestyle") -> tuple[str | None, str | None]:
    """Username and password for a server; `now` in s since 1970 makes those of coturn's REST API run out."""
    secret = _plain(getattr(server, "secret", None))
    if secret is None:
        return _plain(server.username), _plain(server.credential)
    name = f"{int(now) + REST_TTL_S}:{user}"
    return name, base64.b64encode(hmac.new(secret.encode(), name.encode(), hashlib.sha1).digest()).decode()


def configuration(servers: Iterable[Server], now: float) -> RTCConfiguration:
    """What our own peers use. Never aiortc's default STUN server: an unreachable one holds every answer up for 5 s."""
    rows = []
    for server in servers:
        username, credential = credentials(server, now)
        rows.append(RTCIceServer(urls=list(server.urls), username=username, credential=credential))
    return RTCConfiguration(iceServers=rows, bundlePolicy=RTCBundlePolicy.MAX_BUNDLE)


def links(servers: Iterable[Server], now: float) -> list[str]:
    """`Link` headers, one per server URL, which tell a client its ICE servers (RFC 9725 §4.6)."""
    headers = []
    for server in servers:
        username, credential = credentials(server, now)
        for url in server.urls:
            link = f'<{url}>; rel="ice-server"'
            if username is not None and credential is not None:
                link += f'; username="{_quoted(username)}"; credential="{_quoted(credential)}"'
                link += '; credential-type="password"'
            headers.append(link)
    return headers


def with_public_ip(sdp: str, public_ip: str) -> str:
    """The SDP with every host candidate of the same family at `public_ip`, and none of them twice in a section.

    >>> with_public_ip("a=candidate:1 1 udp 5 10.0.0.4 5000 typ host\\r\\n", "203.0.113.9")
    'a=candidate:1 1 udp 5 203.0.113.9 5000 typ host\\r\\n'
    """
    version = ipaddress.ip_address(public_ip).version
    lines: list[str] = []
    ports: set[str] = set()
    for line in sdp.splitlines():
        bits = line.split()
        if line.startswith("m="):
            ports.clear()
        if line.startswith(f"c=IN IP{version} ") and not line.endswith((" 0.0.0.0", " ::")):
            line = f"c=IN IP{version} {public_ip}"
        if line.startswith("a=candidate:") and "host" in bits and _version(bits[4]) == version:
            if bits[5] in ports:
                continue
            ports.add(bits[5])
            line = " ".join([*bits[:4], public_ip, *bits[5:]])
        lines.append(line)
    return "\r\n".join(lines) + "\r\n"


def candidate_of(value: str) -> RTCIceCandidate | None:
    """A candidate from what stands behind `candidate:` (RFC 8839 §5.1); None for one that we cannot use.

    Those over TCP are, and those with an mDNS name: to resolve it takes a second, and the peer's own checks reach us.
    """
    bits = value.split()
    if len(bits) < 8 or bits[6] != "typ" or bits[1] != "1" or bits[2].lower() != "udp":
        return None
    foundation, priority, host, port, kind = bits[0], bits[3], bits[4], bits[5], bits[7]
    if len(foundation) > 32 or kind not in ("host", "srflx", "relay") or not _sendable(host):
        return None
    if not (_is_int(priority, 2**32 - 1) and _is_int(port, 65_535) and int(port)):
        return None
    return RTCIceCandidate(1, foundation, str(ipaddress.ip_address(host)), int(port), int(priority), "udp", kind)


@dataclass(frozen=True, slots=True)
class Fragment:
    """What a trickle body tells (RFC 8840 §9): of which ICE session it is, and further candidates."""

    username: str | None
    password: str | None
    candidates: tuple[RTCIceCandidate, ...]


def fragment(body: str) -> Fragment:
    """Read an `application/trickle-ice-sdpfrag` body; raises Malformed. Candidates of no use to us are left out.

    >>> fragment("a=ice-ufrag:EsAw\\r\\nm=audio 9 RTP/AVP 0\\r\\na=mid:0\\r\\na=end-of-candidates\\r\\n")
    Fragment(username='EsAw', password=None, candidates=())
    """
    username = password = None
    found = []
    for line in body.splitlines():
        if not line.strip():
            continue
        if line[1:2] != "=" or line[0] not in "abcimostvkbzerupy":
            raise Malformed("not an SDP fragment: a line has no type")
        name, _, value = line[2:].partition(":")
        if line[0] != "a":
            continue
        if name == "ice-ufrag":
            username = value
        elif name == "ice-pwd":
            password = value
        elif name == "candidate" and (candidate := candidate_of(value)):
            found.append(candidate)
    if username is None and not any(line.startswith(("a=", "m=")) for line in body.splitlines()):
        raise Malformed("not an SDP fragment: nothing in it")
    return Fragment(username, password, tuple(found[:MAX_CANDIDATES]))


async def add_candidates(pc: RTCPeerConnection, candidates: Iterable[RTCIceCandidate]) -> None:
    """Give a bundled peer further candidates, `MAX_CANDIDATES` in all; the end of them is never told.

    So a peer that told useless ones only can still reach us: aioice fails at once when it knows that no more will come.
    """
    transceivers = pc.getTransceivers()
    if not transceivers:
        return
    transport = transceivers[0].receiver.transport.transport
    for candidate in candidates:
        if len(transport.getRemoteCandidates()) >= MAX_CANDIDATES:
            return
        await transport.addRemoteCandidate(candidate)


def _plain(secret: Any) -> str | None:
    """The text of a pydantic SecretStr, or the text."""
    value = secret.get_secret_value() if hasattr(secret, "get_secret_value") else secret
    return None if value is None else str(value)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _version(host: str) -> int:
    try:
        return ipaddress.ip_address(host).version
    except ValueError:
        return 0


def _sendable(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return not (address.is_multicast or address.is_unspecified or "%" in host or str(address) == "255.255.255.255")


def _is_int(text: str, most: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= most
