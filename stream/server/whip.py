"""WHIP (RFC 9725) and WHEP (draft-ietf-wish-whep-03): offers in, answers out, trickle, and the end of sessions."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from aiortc import RTCConfiguration
from fastapi import APIRouter, Depends, FastAPI, Request, Response

from accel.errors import UserError
from stream.hub import Busy, Hub
from stream.live import Stream
from stream.rtc import ice
from stream.rtc.network import Network
from stream.rtc.offer import read
from stream.rtc.publisher import Publisher
from stream.rtc.sdp import Malformed, Unusable
from stream.rtc.viewer import Viewer
from stream.server.auth import Guard, token_of
from stream.server.errors import Problem, Refused
from stream.server.limits import client_of
from stream.server.origins import PREFLIGHT, cross_origin
from stream.server.peers import Kind, Peers, Session
from stream.server.settings import Scope, ServerSettings

log = logging.getLogger(__name__)

SDP = "application/sdp"
FRAGMENT = "application/trickle-ice-sdpfrag"
SCOPES: dict[Kind, Scope] = {"whip": "publish", "whep": "view"}


def router(hub: Hub, settings: ServerSettings, guard: Guard, peers: Peers | None = None) -> APIRouter:
    """The routes under `/whip` and `/whep`. Its lifespan closes `peers`, before that of the app it is included in."""
    desk = Desk(hub, settings, guard, peers or Peers(settings))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await desk.peers.close()

    routes = APIRouter(tags=["WebRTC"], lifespan=lifespan, route_class=cross_origin(settings, guard))
    for kind in SCOPES:
        _add_routes(routes, desk, kind)
    return routes


class Desk:
    """What all the routes share, and what they do."""

    def __init__(self, hub: Hub, settings: ServerSettings, guard: Guard, peers: Peers) -> None:
        self.hub, self.settings, self.guard, self.peers = hub, settings, guard, peers
        self.network = Network(settings.udp_ports, settings.public_ip)

    async def post(self, request: Request, kind: Kind, name: str) -> Response:
        """An offer: 201 with the answer, or a refusal that leaves nothing behind."""
        offer = await _body(request, SDP, self.settings.max_body, {"Accept-Post": SDP})
        client = client_of(request.scope)
        try:
            session = self.peers.open((self._publisher if kind == "whip" else self._viewer)(name, client, offer))
            answer = await self._answer(session, offer)
        except Malformed as error:
            raise Refused(400, str(error), f"the body must be an SDP offer ({SDP})") from None
        except Unusable as error:
            raise Refused(422, str(error), "nothing is served rather than a part of what was offered") from None
        log.info("%s session %s of %s", kind, session.id, name)
        base = request.scope.get("root_path", "")
        response = Response(answer, 201, media_type=SDP)
        response.headers.update(
            {
                "Location": f"{base}/{kind}/{name}/{session.secret}",
                "ETag": session.etag,
                "ID": session.id,
                "Accept-Patch": FRAGMENT,
            }
        )
        self._link(response)
        return response

    async def patch(self, request: Request, kind: Kind, name: str, secret: str) -> Response:
        """Trickled candidates: 204. There is no ICE restart in aiortc: 422, and the session goes on."""
        session = self.peers.find(kind, name, secret)
        body = await _body(request, FRAGMENT, self.settings.max_body, {"Accept-Patch": FRAGMENT})
        tags = [tag.strip() for tag in request.headers.get("if-match", "*").split(",")]
        if "*" not in tags and session.etag not in tags:
            raise Refused(412, "that is not the ETag of this session", "send the one of the answer, or none")
        try:
            fragment = ice.fragment(body)
        except Malformed as error:
            raise Refused(400, str(error), f"the body must be {FRAGMENT} (RFC 8840)") from None
        if fragment.username not in (None, session.username):
            raise Refused(422, "ICE cannot be restarted here", "DELETE this session and POST a new offer")
        await session.peer.add_candidates(fragment.candidates)
        return Response(status_code=204)

    async def delete(self, request: Request, kind: Kind, name: str, secret: str) -> Response:
        """The end of a session; If-Match is ignored."""
        self.peers.end(self.peers.find(kind, name, secret), "ended by the client")
        return Response(status_code=200)

    async def look(self, request: Request, kind: Kind, name: str, secret: str | None = None) -> Response:
        """GET and HEAD: there is nothing to read, but that it is there; HEAD of WHEP tells what it takes."""
        if secret is not None:
            self.peers.find(kind, name, secret)
        elif kind == "whep":
            self._stream(name)
            if request.method == "HEAD":
                return Response(status_code=200, media_type=SDP)
        return Response(status_code=204, headers={"Accept-Post": SDP})

    async def options(self, request: Request, kind: Kind, name: str, secret: str | None = None) -> Response:
        """What may be asked. A CORS preflight carries no token, so it gets no ICE servers."""
        response = Response(status_code=200, headers={"Accept-Post": SDP, "Accept-Patch": FRAGMENT, **PREFLIGHT})
        if "access-control-request-method" not in request.headers:
            try:
                self.guard.check(SCOPES[kind], token_of(request))
            except Refused:
                return response
            self._link(response)
        return response

    def _publisher(self, name: str, client: str, offer: str) -> Session:
        """A publisher for a stream, which is opened where there is none of that name."""
        wanted = read(offer)
        wanted.publishes()  # before anything is made for it
        self.peers.admit("whip", name, client)
        stream = self.hub.get(name)
        made = stream is None
        if stream is None:
            try:
                stream = self.hub.open(name, transient=True)
            except Busy as busy:
                wait = {"Retry-After": str(max(1, round(busy.retry_after_s)))}
                raise Refused(503, str(busy), busy.hint, wait) from None
            except UserError as error:
                raise Refused(400, str(error), error.hint or "") from None
        publisher = Publisher(stream, self._configuration())
        session = Session("whip", name, client, wanted.username, publisher)
        if made:
            session.on_end = partial(self._unmake, stream, publisher)
        return session

    def _viewer(self, name: str, client: str, offer: str) -> Session:
        wanted, stream = read(offer), self._stream(name)
        self.peers.admit("whep", name, client)
        viewer = Viewer(stream, self.peers.encoders(stream), self._configuration())
        return Session("whep", name, client, wanted.username, viewer)

    def _configuration(self) -> RTCConfiguration:
        return ice.configuration(self.settings.ice_servers, time.time())

    async def _answer(self, session: Session, offer: str) -> str:
        with self.network.applied():
            try:
                answer = await session.peer.answer(offer)
            except BaseException:
                self.peers.end(session, "refused")
                raise
        if "a=candidate:" not in answer:
            self.peers.end(session, "no candidates")
            wait = {"Retry-After": "5"}
            raise Refused(503, "no network address or UDP port is free for this", "try again in a moment", wait)
        return self.network.announced(answer)

    def _stream(self, name: str) -> Stream:
        stream = self.hub.get(name)
        if stream is None:
            raise Refused(404, "there is no such stream", "publish to it first, or create it in the control API")
        return stream

    def _unmake(self, stream: Stream, publisher: Publisher) -> None:
        """Forget a stream that was opened for somebody who never came, unless others use it by now."""
        used = publisher.connected or stream.feeding or stream.viewers or stream.outputs
        if used or any(session.name == stream.name for session in self.peers.sessions):
            return
        if self.hub.get(stream.name) is stream:
            self.hub.remove(stream.name)  # quick: it never had a source nor an output

    def _link(self, response: Response) -> None:
        for link in ice.links(self.settings.ice_servers, time.time()):
            response.headers.append("Link", link)


def _add_routes(routes: APIRouter, desk: Desk, kind: Kind) -> None:
    """The endpoint and the session of one protocol. Preflights need no token (they cannot carry one)."""
    endpoint, resource = f"/{kind}/{{stream}}", f"/{kind}/{{stream}}/{{secret}}"
    needed = [Depends(desk.guard(SCOPES[kind]))]

    async def post(request: Request, stream: str) -> Response:
        return await desk.post(request, kind, stream)

    async def patch(request: Request, stream: str, secret: str) -> Response:
        return await desk.patch(request, kind, stream, secret)

    async def delete(request: Request, stream: str, secret: str) -> Response:
        return await desk.delete(request, kind, stream, secret)

    async def look(request: Request, stream: str) -> Response:
        return await desk.look(request, kind, stream)

    async def look_at(request: Request, stream: str, secret: str) -> Response:
        return await desk.look(request, kind, stream, secret)

    async def options(request: Request, stream: str) -> Response:
        return await desk.options(request, kind, stream)

    async def options_of(request: Request, stream: str, secret: str) -> Response:
        return await desk.options(request, kind, stream, secret)

    def add(path: str, method: str, work: Callable[..., Any], ok: int, *refusals: int, takes: str = "") -> None:
        body = {"requestBody": {"required": True, "content": {takes: {"schema": {"type": "string"}}}}} if takes else {}
        routes.add_api_route(
            path,
            work,
            methods=[method],
            status_code=ok,
            dependencies=[] if method == "OPTIONS" else needed,
            response_class=Response,
            responses={status: {"model": Problem} for status in refusals},
            operation_id=f"{kind}_{work.__name__}_{method.lower()}",
            openapi_extra=body,
        )

    taken = (400, 409, 413, 415, 422, 429, 503) if kind == "whip" else (400, 404, 413, 415, 422, 429, 503)
    add(endpoint, "POST", post, 201, 401, 403, *taken, takes=SDP)
    add(endpoint, "GET", look, 204, 401, 403, 404)
    add(endpoint, "HEAD", look, 200 if kind == "whep" else 204, 401, 403, 404)
    add(endpoint, "OPTIONS", options, 200)
    add(resource, "PATCH", patch, 204, 400, 401, 403, 404, 412, 413, 415, 422, takes=FRAGMENT)
    add(resource, "DELETE", delete, 200, 401, 403, 404)
    add(resource, "GET", look_at, 204, 401, 403, 404)
    add(resource, "HEAD", look_at, 204, 401, 403, 404)
    add(resource, "OPTIONS", options_of, 200)
    _refuse_others(routes, endpoint, ["PUT", "PATCH", "DELETE"], "POST, GET, HEAD, OPTIONS")
    _refuse_others(routes, resource, ["PUT", "POST"], "PATCH, DELETE, GET, HEAD, OPTIONS")


def _refuse_others(routes: APIRouter, path: str, methods: list[str], allowed: str) -> None:
    """405 with every method there is: of itself only that of the first route would be told."""

    async def refuse() -> Response:
        raise Refused(405, "method not allowed", f"this address takes {allowed}", {"Allow": allowed})

    routes.add_api_route(path, refuse, methods=methods, include_in_schema=False)


async def _body(request: Request, media_type: str, limit: int, accepted: Mapping[str, str]) -> str:
    """The text of a request: 415 for another type, 413 beyond `limit` bytes, 400 unless it is UTF-8."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != media_type:
        raise Refused(415, f"the body must be {media_type}", f"send Content-Type: {media_type}", accepted)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise Refused(413, f"more than {limit} bytes", "an offer has a few thousand")
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise Refused(400, "the body is not UTF-8 text", f"the body must be {media_type}") from None
