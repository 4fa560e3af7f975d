"""The control API, `/api/v1`: streams, their settings, sources, recordings and outputs, and what pages need."""

from __future__ import annotations

import asyncio
import io
import re
import time
from importlib import metadata
from typing import Annotated, Any

import segno
from fastapi import APIRouter, Body, Depends, Path, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from accel.errors import UserError
from models.assets import check_bare
from models.params import Params
from models.spec import available
from stream.config import flatten, moved, parse_size, patched
from stream.hub import Busy, Hub
from stream.live import Stream
from stream.rtc import ice
from stream.server.auth import Guard, token_of
from stream.server.errors import Problem, Refused
from stream.server.outputs import Outputs
from stream.server.reach import Admitted, Reach
from stream.server.recordings import Recordings, url_of
from stream.server.settings import SCOPES, ServerSettings

NAME = r"^[A-Za-z0-9_-]{1,64}$"
Value = str | int | float | bool

Name = Annotated[str, Path(pattern=NAME, description="name of the stream")]
Id = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,100}$")]
Changes = Annotated[
    dict[str, Value],
    Body(description="settings by their dotted names", examples=[{"style.prompt": "oil painting", "style.steps": 2}]),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class NewStream(_Body):
    """A stream to be opened."""

    name: Annotated[str, Field(pattern=NAME)]
    model: Annotated[str | None, Field(max_length=100, description="see /api/v1/models")] = None
    size: Annotated[str | None, Field(max_length=11, description="WxH, the box pictures are fitted into")] = None
    source: Annotated[str | None, Field(max_length=2048, description="demo, test, or the address of a source")] = None
    params: Annotated[dict[str, Value], Field(description="settings by their dotted names")] = {}


class Chosen(_Body):
    """A model."""

    model: Annotated[str, Field(max_length=1000, description="see /api/v1/models")]


class Address(_Body):
    """A source or an output."""

    url: Annotated[str, Field(max_length=2048, examples=["rtsp://camera.lan/1"])]


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in (400, 401, 403, 408, 413, 421, 422, 429, *statuses)}


def router(hub: Hub, settings: ServerSettings, guard: Guard, reach: Reach) -> APIRouter:
    """Every route of `/api/v1` but the events."""
    routes = APIRouter(prefix="/api/v1", responses=_refusals())
    routes.include_router(_about(hub, settings, guard))
    routes.include_router(_streams(hub, guard, reach))
    routes.include_router(_recordings(hub, settings, guard))
    routes.include_router(_outputs(hub, settings, guard, reach))
    return routes


def _about(hub: Hub, settings: ServerSettings, guard: Guard) -> APIRouter:
    routes = APIRouter(tags=["about"])
    viewing = [Depends(guard("view"))]

    @routes.get("/info")
    async def info(request: Request) -> dict[str, Any]:
        """What a client needs to begin with. Credentials and addresses only for those with a token."""
        known = bool(guard.scopes(token_of(request)))
        servers = settings.ice_servers if known else ()
        return {
            "version": version(),
            "ice_servers": [
                {
                    "urls": list(server.urls),
                    **dict(zip(("username", "credential"), ice.credentials(server, time.time()), strict=True)),
                }
                for server in servers
            ],
            "secure": request.url.scheme == "https",
            "tokens": {scope: guard.on for scope in SCOPES},
            "urls": list(request.app.state.urls) if known else [],
            "limits": {
                "max_body": settings.max_body,
                "max_streams": hub.settings.max_streams,
                "max_viewers": settings.max_viewers,
                "max_recordings": settings.max_recordings,
                "max_outputs": settings.max_outputs,
                "box": list(hub.settings.box),
            },
        }

    @routes.get("/schema")
    async def schema() -> dict[str, Any]:
        """The one schema of all settings, and their defaults."""
        return {"schema": Params.model_json_schema(), "defaults": flatten(hub.settings.params.model_dump())}

    @routes.get("/models")
    async def models() -> list[dict[str, Any]]:
        """What can run here."""
        return available()

    @routes.get("/styles")
    async def styles() -> list[dict[str, str]]:
        """The styles the default model was made for, each with a picture."""
        names: list[str] = next((row["styles"] for row in available() if row["name"] == hub.settings.model), [])
        return [{"name": name, "picture": f"/static/styles/{_slug(name)}.jpg"} for name in names]

    @routes.get(
        "/qr", dependencies=viewing, response_class=Response, responses={200: {"content": {"image/svg+xml": {}}}}
    )
    async def qr(text: Annotated[str, Query(min_length=1, max_length=1000)]) -> Response:
        """A QR code, for a phone to come here."""
        drawn = io.BytesIO()
        try:
            segno.make(text, micro=False).save(drawn, kind="svg", scale=4, xmldecl=False, dark="#000", light="#fff")
        except ValueError:  # too much for the largest code, or not encodable
            raise Refused(422, "that does not go into a QR code", "use a shorter text") from None
        return Response(drawn.getvalue(), media_type="image/svg+xml")

    return routes


def _streams(hub: Hub, guard: Guard, reach: Reach) -> APIRouter:
    routes = APIRouter(tags=["streams"])
    viewing, controlling = [Depends(guard("view"))], [Depends(guard("control"))]
    unknown = _refusals(404)

    @routes.get("/streams", dependencies=viewing)
    async def list_streams() -> list[dict[str, Any]]:
        """The status of every stream."""
        return [stream.status() for stream in hub.streams()]

    @routes.post("/streams", dependencies=controlling, status_code=201, responses=_refusals(409, 503))
    async def open_stream(new: NewStream) -> dict[str, Any]:
        """Open a stream, and its source where one is given."""
        if hub.get(new.name):
            raise _exists(new.name)
        if new.model is not None:
            _check_model(hub, new.model)
        _check_files(new.params)
        model = hub.settings.model if new.model is None else new.model
        params = patched(moved(hub.settings.params, hub.settings.model, model), new.params)
        box = parse_size(new.size)[0] if new.size else None
        admitted = await asyncio.to_thread(reach.source, new.source) if new.source else None
        stream = _opened(hub, new.name, params, new.model, box)
        if admitted:
            _feed(stream, admitted)
        return stream.status()

    @routes.get("/streams/{name}", dependencies=viewing, responses=unknown)
    async def show_stream(name: Name) -> dict[str, Any]:
        """The status of a stream."""
        return known(hub, name).status()

    @routes.delete("/streams/{name}", dependencies=controlling, status_code=204, responses=unknown)
    async def remove_stream(name: Name) -> None:
        """End a stream; its recordings are complete when this answers."""
        if not await asyncio.to_thread(hub.remove, name):
            raise _unknown(name)

    @routes.get("/streams/{name}/params", dependencies=viewing, responses=unknown)
    async def show_params(name: Name) -> dict[str, Value]:
        """The settings of a stream."""
        return flatten(known(hub, name).params.model_dump())

    @routes.patch("/streams/{name}/params", dependencies=controlling, responses=unknown)
    async def change_params(name: Name, changes: Changes) -> dict[str, Value]:
        """Change settings, live; nothing is changed when one of them is wrong."""
        _check_files(changes)
        params = await asyncio.to_thread(known(hub, name).patch, changes)
        return flatten(params.model_dump())

    @routes.put("/streams/{name}/model", dependencies=controlling, status_code=202, responses=unknown)
    async def set_model(name: Name, chosen: Chosen) -> dict[str, Any]:
        """Another model from as soon as it is loaded; the present one goes on until then, or if that fails.

        Settings that nobody has touched become those that the new one is best run with.
        """
        stream = known(hub, name)
        _check_model(hub, chosen.model)
        if chosen.model != stream.model:
            await asyncio.to_thread(stream.swap, chosen.model)
        return stream.status()

    @routes.put("/streams/{name}/source", dependencies=controlling, status_code=202, responses=unknown)
    async def set_source(name: Name, address: Address) -> dict[str, Any]:
        """Take another source from now on. It is opened after the answer; the status tells how that went."""
        stream = known(hub, name)
        _feed(stream, await asyncio.to_thread(reach.source, address.url))
        return stream.status()

    @routes.delete("/streams/{name}/source", dependencies=controlling, status_code=204, responses=unknown)
    async def end_source(name: Name) -> None:
        """End the source, whatever it is; the stream stays."""
        await asyncio.to_thread(known(hub, name).unfeed)

    return routes


def _recordings(hub: Hub, settings: ServerSettings, guard: Guard) -> APIRouter:
    routes = APIRouter(tags=["recordings"])
    viewing, controlling = [Depends(guard("view"))], [Depends(guard("control"))]
    kept = Recordings(settings.recordings, settings.max_recordings)

    @routes.get("/streams/{name}/recordings", dependencies=viewing, responses=_refusals(404))
    async def list_recordings(name: Name) -> list[dict[str, Any]]:
        """The recordings of a stream, newest first."""
        known(hub, name)
        return await asyncio.to_thread(kept.of, name)

    @routes.post(
        "/streams/{name}/recordings", dependencies=controlling, status_code=201, responses=_refusals(404, 409, 507)
    )
    async def start_recording(name: Name) -> dict[str, Any]:
        """Record what comes out to a file on the server."""
        recording = await asyncio.to_thread(kept.start, known(hub, name))
        return recording.record()

    @routes.delete("/streams/{name}/recordings/{id}", dependencies=controlling, responses=_refusals(404))
    async def stop_recording(name: Name, id: Id) -> dict[str, Any]:
        """End a recording; the file is complete when this answers."""
        recording = await asyncio.to_thread(kept.stop, name, id)
        return recording.record()

    @routes.get(
        url_of("{id}").removeprefix("/api/v1"),
        dependencies=viewing,
        responses=_refusals(404, 409) | {200: {"content": {"video/mp4": {}}}, 206: {"content": {"video/mp4": {}}}},
        response_class=FileResponse,
    )
    async def fetch_recording(id: Id) -> FileResponse:
        """The file, whole or by ranges."""
        path = await asyncio.to_thread(kept.path, id)
        return FileResponse(path, media_type="video/mp4", filename=path.name, content_disposition_type="inline")

    return routes


def _outputs(hub: Hub, settings: ServerSettings, guard: Guard, reach: Reach) -> APIRouter:
    routes = APIRouter(tags=["outputs"])
    viewing, controlling = [Depends(guard("view"))], [Depends(guard("control"))]
    running = Outputs(reach, settings.max_outputs)

    @routes.get("/streams/{name}/outputs", dependencies=viewing, responses=_refusals(404))
    async def list_outputs(name: Name) -> list[dict[str, Any]]:
        """The outputs of a stream."""
        return running.of(known(hub, name))

    @routes.post("/streams/{name}/outputs", dependencies=controlling, status_code=201, responses=_refusals(404, 409))
    async def start_output(name: Name, address: Address) -> dict[str, Any]:
        """Send what comes out somewhere: a virtual camera, RTMP, RTSP, SRT or WHIP."""
        output = await asyncio.to_thread(running.start, known(hub, name), address.url)
        return output.record()

    @routes.delete("/streams/{name}/outputs/{id}", dependencies=controlling, status_code=204, responses=_refusals(404))
    async def stop_output(name: Name, id: Id) -> None:
        """End an output."""
        await asyncio.to_thread(running.stop, known(hub, name), id)

    return routes


def known(hub: Hub, name: str) -> Stream:
    """The stream of that name; raises Refused 404."""
    stream = hub.get(name)
    if stream is None:
        raise _unknown(name)
    return stream


def version() -> str:
    """The installed version, or that of a source tree."""
    try:
        return metadata.version("livestyle")
    except metadata.PackageNotFoundError:
        return "0.0.0"


def _check_model(hub: Hub, model: str) -> None:
    """Raise Refused for what is not on the list of models; the server's own may be a folder."""
    ready = {row["name"]: row["ready"] for row in available()} | {hub.settings.model: True}
    if model not in ready:
        raise Refused(422, f"no such model: {model[:100]}", "GET /api/v1/models lists them")
    if not ready[model]:
        raise Refused(422, f"{model} is not here yet", f"on the server: livestyle fetch {model}")


def _check_files(changes: dict[str, Value]) -> None:
    for key, value in changes.items():
        check_bare(key, value)


def _opened(hub: Hub, name: str, params: Params, model: str | None, box: tuple[int, int] | None) -> Stream:
    try:
        return hub.open(name, params=params, model=model, box=box)
    except Busy as busy:
        raise Refused(503, str(busy), busy.hint, {"Retry-After": str(round(busy.retry_after_s))}) from None
    except UserError:
        if hub.get(name):
            raise _exists(name) from None
        raise


def _feed(stream: Stream, admitted: Admitted) -> None:
    stream.feed(admitted.open, admitted.label, retry=True)


def _exists(name: str) -> Refused:
    return Refused(409, f"there is a stream {name} already", "choose another name, or DELETE it first")


def _unknown(name: str) -> Refused:
    return Refused(404, f"no stream {name}", "GET /api/v1/streams lists them")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
