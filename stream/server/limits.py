"""What every request has to pass first: who it says it is for, where it comes from, how often, and how much."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stream.server.auth import Guard
from stream.server.errors import Refused, problem
from stream.server.settings import ServerSettings, is_loopback

CLIENTS = 4096  # remembered at a time, the longest silent go first
BURST_S = 3.0  # s of its rate that a client may use at once
WRITE_COST = 5.0
REFUSED_COST = 30.0  # a token that is wrong: ten guesses at once, then three a second
BODY_S = 10.0  # s a client may take to send its body
SAFE = ("GET", "HEAD", "OPTIONS")
CORS = ("/whip/", "/whep/")  # open to pages of other sites, once a token is needed

DEFAULTS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # addresses carry tokens
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Rate:
    """A token bucket per client, of `per_s` tokens per second; the time is an argument, s.

    >>> rate = Rate(10.0)
    >>> rate.take("10.0.0.7", 30.0, now=0.0), rate.take("10.0.0.7", 5.0, now=0.0)
    (0.0, 0.5)
    """

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens left, when, s

    def take(self, client: str, cost: float, now: float) -> float:
        """Take `cost` tokens and return 0, or take none and return after how many seconds they would be there."""
        if not self._per_s:
            return 0.0
        left, since = self._buckets.pop(client, (self._per_s * BURST_S, now))
        left = min(self._per_s * BURST_S, left + (now - since) * self._per_s)
        wait = max(0.0, (cost - left) / self._per_s)
        self._buckets[client] = (left if wait else left - cost, now)
        while len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return wait

    def charge(self, client: str, cost: float, now: float) -> None:
        """Take tokens that may not be there: the client goes into debt."""
        left, since = self._buckets.pop(client, (self._per_s * BURST_S, now))
        self._buckets[client] = (left - cost, since)


class Gate:
    """ASGI middleware: refuses with the same JSON as every route, and counts the answers by status.

    Names that are not this server's are refused because a page anywhere may make its own name point here (DNS
    rebinding); foreign origins because a browser sends what such a page asks for (CSRF).
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        guard: Guard,
        answers: Counter[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._settings, self._guard, self._answers, self._clock = app, settings, guard, answers, clock
        self._rate = Rate(settings.rate_per_s)
        self._names = own_names(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then hand on with a body that is all there."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        client = client_of(scope)
        try:
            self._admit(scope, client)
            if scope["type"] == "http":
                receive = await self._body(scope, receive)
        except Refused as refused:
            if scope["type"] == "websocket":
                await receive()
            if self._guard.on and scope["path"].startswith(CORS):
                refused.headers["Access-Control-Allow-Origin"] = "*"
            response: Response = problem(refused.status, refused.message, refused.hint, refused.headers)
            await response(scope, receive, self._noted(send, client))
            return
        await self._app(scope, receive, self._noted(send, client))

    def _admit(self, scope: Scope, client: str) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._ours(host):
            hint = 'put the name it is called by into hosts = ["…"] of [server]'
            raise Refused(421, "this server does not go by that name", hint)
        origin = headers.get("origin")
        writes = scope["type"] == "websocket" or scope["method"] not in SAFE
        if origin and writes and not self._same_site(origin, host, scope["path"]):
            hint = 'put it into origins = ["…"] of [server] where that is meant to be'
            raise Refused(403, "pages of another site may not do that", hint)
        wait = self._rate.take(client, WRITE_COST if writes else 1.0, self._clock())
        if wait:
            raise Refused(429, "too many requests", "slow down", {"Retry-After": str(int(wait) + 1)})

    def _ours(self, host: str) -> bool:
        name = _name(host)
        if name in self._names or is_loopback(name):
            return True
        return self._settings.exposed and _is_address(name)  # an address cannot be rebound

    def _same_site(self, origin: str, host: str, path: str) -> bool:
        if origin in self._settings.origins:
            return True
        if path.startswith(CORS) and self._guard.on:
            return True
        default = {"http": 80, "https": 443}
        ours = urlsplit(f"//{host}")
        try:
            theirs = urlsplit(origin)
            usual = default.get(theirs.scheme)
            return (theirs.hostname, theirs.port or usual) == (ours.hostname, ours.port or usual)
        except ValueError:
            return False

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the whole body, 413 beyond the limit; what it returns gives it out again."""
        headers, limit = Headers(scope=scope), self._settings.max_body
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > limit:
            raise Refused(413, f"more than {limit} bytes", "send less")
        if length == "0" and "transfer-encoding" not in headers:
            return receive
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                while (message := await receive())["type"] == "http.request":
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise Refused(413, f"more than {limit} bytes", "send less")
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise Refused(408, "the body did not come", "send it at once") from None
        first: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        return replay

    def _noted(self, send: Send, client: str) -> Send:
        async def noted(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                self._answers[message["status"]] += 1
                if message["status"] == 401:
                    self._rate.charge(client, REFUSED_COST, self._clock())
                headers = MutableHeaders(scope=message)
                for name, value in DEFAULTS.items():
                    headers.setdefault(name, value)
            await send(message)

        return noted


def own_names(settings: ServerSettings) -> frozenset[str]:
    """The names and addresses a request may be for, besides loopback."""
    names: set[str | None] = {settings.host, settings.public_ip, *settings.hosts}
    if settings.exposed:
        host = socket.gethostname()
        names |= {host, host.partition(".")[0], f"{host.partition('.')[0]}.local"}
    return frozenset(_name(name) for name in names if name)


def client_of(scope: Scope) -> str:
    """Whom a request is counted to: an IPv4 address, or the /64 an IPv6 address belongs to."""
    address = (scope.get("client") or ("", 0))[0]
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return str(address)
    if isinstance(found, ipaddress.IPv6Address) and not found.ipv4_mapped:
        return str(ipaddress.IPv6Network((found, 64), strict=False))
    return str(found)


def _name(host: str) -> str:
    """A Host header without its port, lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    name = host.rpartition(":")[0] if host.count(":") == 1 else host
    return name.rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
