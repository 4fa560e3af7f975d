"""Every WebRTC session of a server, from its POST to its end; lives on the server's event loop."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from aiortc import RTCIceCandidate

from stream.encoder import Encoders
from stream.live import Stream
from stream.server.errors import Refused
from stream.server.settings import ServerSettings

Kind = Literal["whip", "whep"]

CONNECT_S = 10.0  # from the answer to a connection
RETRY_S = 5  # how long somebody who was refused should wait
CLOSE_S = 10.0  # what all sessions together get to end


class Peer(Protocol):
    """A publisher or a viewer."""

    @property
    def state(self) -> str: ...

    on_closed: Callable[[], None] | None

    async def answer(self, offer: str) -> str: ...
    async def add_candidates(self, candidates: Iterable[RTCIceCandidate]) -> None: ...
    def close(self, reason: str) -> asyncio.Task[None]: ...


def _secret() -> str:
    return secrets.token_urlsafe(16)


@dataclass(eq=False, slots=True)
class Session:
    """One WHIP or WHEP resource (RFC 9725 §4.1)."""

    kind: Kind
    name: str  # of the stream
    client: str  # address
    username: str  # ICE ufrag of the client
    peer: Peer
    on_end: Callable[[], None] = lambda: None  # what is to be done when it is over
    secret: str = field(default_factory=_secret, repr=False)  # 128 bits: who knows it may end the session
    id: str = field(default_factory=lambda: secrets.token_hex(8))  # for logs, opens nothing
    etag: str = field(default_factory=lambda: f'"{secrets.token_hex(8)}"', repr=False)


class Peers:
    """The sessions by their secrets, and how many there may be.

    >>> peers.admit("whip", "cam", "10.0.0.7")
    >>> session = peers.open(Session("whip", "cam", "10.0.0.7", "EsAw", publisher))
    """

    def __init__(self, settings: ServerSettings, connect_s: float = CONNECT_S) -> None:
        self._settings, self._connect_s = settings, connect_s
        self._sessions: dict[str, Session] = {}
        self._encoders: dict[str, tuple[Stream, Encoders]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def sessions(self) -> list[Session]:
        """Those that are not over."""
        return list(self._sessions.values())

    @property
    def half_open(self) -> list[Session]:
        """Those that were answered and are not connected."""
        return [session for session in self._sessions.values() if session.peer.state != "connected"]

    def admit(self, kind: Kind, name: str, client: str) -> None:
        """Raise Refused where one more session of that kind, or of that client, would be too many."""
        wait = {"Retry-After": str(RETRY_S)}
        if kind == "whip" and self.publisher(name):
            hint = "publish to another name, or end the other one first"
            raise Refused(409, f"somebody publishes to {name} already", hint, wait)
        waiting, most = self.half_open, self._settings.max_half_open
        if sum(session.client == client for session in waiting) >= max(1, most // 2):
            raise Refused(429, "too many sessions that never connected", "is UDP blocked on the way?", wait)
        if len(waiting) >= most:
            raise Refused(503, "too many sessions are being connected", "try again in a moment", wait)
        if kind == "whep" and sum(session.kind == "whep" for session in self.sessions) >= self._settings.max_viewers:
            raise Refused(503, f"{self._settings.max_viewers} viewers are all this server takes", "try later", wait)

    def open(self, session: Session) -> Session:
        """Keep a session until its peer is closed, or is not connected in time."""
        self._sessions[session.secret] = session
        timer = asyncio.get_running_loop().call_later(self._connect_s, self._expire, session)

        def closed() -> None:
            timer.cancel()
            self._sessions.pop(session.secret, None)
            self.spawn(session.peer.close(""))  # it is closing already: this only waits for it
            session.on_end()

        session.peer.on_closed = closed
        return session

    def find(self, kind: Kind, name: str, secret: str) -> Session:
        """The session of that URL; Refused 404 when there is none (any more)."""
        session = self._sessions.get(secret)
        if session is None or (session.kind, session.name) != (kind, name) or session.peer.state == "closed":
            raise Refused(404, "there is no such session", "it may have ended; POST a new offer")
        return session

    def publisher(self, name: str) -> Session | None:
        """The session that publishes to a stream, or is about to."""
        return next((s for s in self._sessions.values() if (s.kind, s.name) == ("whip", name)), None)

    def end(self, session: Session, reason: str) -> None:
        """Close a session; it is not found any more from now on, its sockets are gone soon."""
        self._sessions.pop(session.secret, None)
        self.spawn(session.peer.close(reason))

    def encoders(self, stream: Stream) -> Encoders:
        """Those that all viewers of a stream share."""
        known = self._encoders.get(stream.name)
        if known is None or known[0] is not stream:
            gone = [name for name, (other, _) in self._encoders.items() if other.phase == "ended"]
            for name in gone:
                del self._encoders[name]
            known = self._encoders[stream.name] = (stream, Encoders(stream))
        return known[1]

    def spawn(self, work: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> None:
        """Run something to its end that nobody waits for."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End every session and wait until sockets and threads are gone."""
        for session in self.sessions:
            self.end(session, "the server stops")
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)

    def _expire(self, session: Session) -> None:
        if session.peer.state != "connected":
            self.end(session, f"not connected within {self._connect_s:g} s")
