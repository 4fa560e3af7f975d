"""The HTTP side of a WHIP client (RFC 9725): offers an SDP, follows redirects, reads Location and Link, deletes."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlencode, urljoin, urlsplit, urlunsplit

TIMEOUT_S = 8.0
REDIRECTS = 3
MOST = 128 * 1024  # bytes of an answer
WORDS = {
    401: "it wants a token, or another one",
    403: "this token may not publish",
    404: "no such endpoint",
    409: "somebody else is publishing there",
}


class Failed(Exception):
    """The endpoint did not take the offer; `retry_after` s where it said so."""

    def __init__(self, words: str, retry_after: float = 0.0) -> None:
        super().__init__(words)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class IceServer:
    """A STUN or TURN server that the endpoint names."""

    urls: tuple[str, ...]
    username: str | None = None
    credential: str | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to publish. `token` is sent as a Bearer token and never shown."""

    url: str
    token: str | None = None


@dataclass(frozen=True, slots=True)
class Resource:
    """A session that the endpoint has made."""

    answer: str
    url: str
    servers: tuple[IceServer, ...]


def endpoint_of(url: str) -> Endpoint:
    """What `whip+https://TOKEN@host/path` or `whip+https://host/path?token=TOKEN` says.

    >>> endpoint_of("whip+https://secret@example.org/live").url
    'https://example.org/live'
    """
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    query = parse_qsl(parts.query, keep_blank_values=True)
    token = next((value for name, value in query if name == "token"), None) or unquote(user.rpartition(":")[2]) or None
    rest = urlencode([(name, value) for name, value in query if name != "token"])
    return Endpoint(urlunsplit((parts.scheme.lower().removeprefix("whip+"), host, parts.path, rest, "")), token)


def post(endpoint: Endpoint, offer: str) -> Resource:
    """Offer; blocks for `TIMEOUT_S` at most. Raises Failed."""
    url = endpoint.url
    for _ in range(REDIRECTS + 1):
        status, headers, body = _request("POST", url, endpoint.token, offer)
        if status not in (307, 308):
            break
        away = urljoin(url, headers.get("Location", ""))
        if urlsplit(away).scheme not in ("http", "https") or (url.startswith("https:") and away.startswith("http:")):
            raise Failed("it redirects to where no token may go")
        url = away
    if status != 201:
        raise Failed(WORDS.get(status, f"HTTP status {status}"), _seconds(headers.get("Retry-After", "")))
    location = headers.get("Location")
    if not location or not body.startswith("v=0"):
        raise Failed("its answer has no SDP or no Location: not a WHIP endpoint")
    return Resource(body, urljoin(url, location), ice_servers(headers.get_all("Link", [])))


def options(endpoint: Endpoint) -> tuple[IceServer, ...]:
    """The ICE servers that the endpoint tells beforehand, where it does; raises Failed where it cannot be reached."""
    status, headers, _ = _request("OPTIONS", endpoint.url, endpoint.token)
    return ice_servers(headers.get_all("Link", [])) if status in (200, 204) else ()


def delete(resource: Resource, token: str | None, timeout: float = TIMEOUT_S) -> None:
    """End the session; raises Failed where the endpoint cannot be reached."""
    _request("DELETE", resource.url, token, timeout=timeout)


def ice_servers(links: Iterable[str]) -> tuple[IceServer, ...]:
    """The servers that `Link: <turn:h>; rel="ice-server"; username="u"; credential="c"` headers name (RFC 9725 §4.6).

    >>> ice_servers(['<turn:b?transport=tcp>; rel="ice-server"; username="u"; credential="c"'])
    (IceServer(urls=('turn:b?transport=tcp',), username='u', credential='c'),)
    """
    found = []
    for link in links:
        for url, rest in re.findall(r"<([^>]*)>((?:[^<\"]|\"(?:[^\"\\]|\\.)*\")*)", link):
            values = {
                name.lower(): re.sub(r"\\(.)", r"\1", quoted) if quoted else bare
                for name, quoted, bare in re.findall(r';\s*([\w-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;,"]+))', rest)
            }
            if values.get("rel") == "ice-server" and re.match(r"(stun|turn)s?:", url):
                found.append(IceServer((url,), values.get("username"), values.get("credential")))
    return tuple(found)


def _request(
    method: str, url: str, token: str | None, body: str | None = None, timeout: float = TIMEOUT_S
) -> tuple[int, http.client.HTTPMessage, str]:
    parts = urlsplit(url)
    connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if body is not None:
        headers["Content-Type"] = "application/sdp"
    try:
        connection = connect(parts.hostname or "", parts.port, timeout=timeout)
        try:
            path = urlunsplit(("", "", parts.path or "/", parts.query, ""))
            connection.request(method, path, body=body.encode() if body is not None else None, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read(MOST).decode(errors="replace")
        finally:
            connection.close()
    except TimeoutError:
        raise Failed("no answer in time") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Failed(str(getattr(error, "strerror", None) or error or type(error).__name__).lower()) from None


def _seconds(text: str) -> float:
    return float(text) if text.isdigit() else 0.0
