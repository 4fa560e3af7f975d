"""The page, the bare page for OBS, and their files: from memory, with headers that let in no other site's code."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

from stream.server.errors import Refused

WEB = Path(__file__).parents[1] / "web"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
}
PICTURE_S = 86_400  # a picture may be a day old; everything else is asked for again, and answered 304
POLICY = {  # Content-Security-Policy, https://www.w3.org/TR/CSP3; 'self' stands for WebSockets of this host, too
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' blob:",
    "media-src": "'self' blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
}
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Asset:
    """A file as it is served."""

    body: bytes
    headers: Mapping[str, str]


def policy(ancestors: str) -> str:
    """The Content-Security-Policy of a page that `ancestors` may show in a frame.

    >>> policy("'none'").startswith("default-src 'none'; script-src 'self'")
    True
    """
    return "; ".join(f"{name} {value}" for name, value in {**POLICY, "frame-ancestors": ancestors}.items())


def load(path: Path) -> Asset:
    """Read one file and work out its headers."""
    body = path.read_bytes()
    picture = path.suffix == ".jpg"
    headers = {
        "Content-Type": TYPES[path.suffix],
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "Cache-Control": f"public, max-age={PICTURE_S}" if picture else "no-cache",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",  # a token may stand in the address
        "Cross-Origin-Resource-Policy": "same-origin",
    }
    if path.suffix in (".html", ".svg"):
        # A bare page may be framed by pages of this host, the page with the controls by nobody.
        headers["Content-Security-Policy"] = policy("'self'" if path.name == "view.html" else "'none'")
    if path.suffix == ".html":
        headers["Permissions-Policy"] = "camera=(self), microphone=(self), geolocation=()"
        headers["Cross-Origin-Opener-Policy"] = "same-origin"
    return Asset(body, headers)


def assets(folder: Path) -> dict[str, Asset]:
    """Every file that is served, by its path under `folder`: what is not listed here cannot be asked for."""
    files = (path for path in sorted(folder.rglob("*")) if path.suffix in TYPES)
    return {path.relative_to(folder).as_posix(): load(path) for path in files}


def answer(asset: Asset, request: Request) -> Response:
    """The file, or 304 when the client has it already (RFC 9110 §13.1.2)."""
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")}
    if asset.headers["ETag"] in known:
        return Response(status_code=304, headers=asset.headers)
    return Response(asset.body, headers=asset.headers)


def router(folder: Path = WEB) -> APIRouter:
    """`GET /`, `/view/{stream}` and `/static/…`; open to anybody, since they hold nothing secret."""
    routes = APIRouter(include_in_schema=False)
    files = assets(folder)
    static = {name: asset for name, asset in files.items() if not name.endswith(".html")}

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return answer(files["index.html"], request)

    @routes.api_route("/view/{stream}", methods=["GET", "HEAD"])
    async def view(request: Request, stream: str) -> Response:
        if not NAME.fullmatch(stream):
            raise Refused(404, "no stream can have that name", "letters, digits, - and _, at most 64")
        return answer(files["view.html"], request)

    @routes.api_route("/static/{path:path}", methods=["GET", "HEAD"])
    async def file(request: Request, path: str) -> Response:
        if path not in static:
            raise Refused(404, "no such file")
        return answer(static[path], request)

    return routes
