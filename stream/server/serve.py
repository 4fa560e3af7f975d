"""`livestyle serve`: listen, say where, run until a signal, and end in bounded time with every recording complete."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import ssl
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from urllib.parse import quote

import psutil
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr

from accel.errors import UserError
from models.params import Params
from stream import hardware, osc
from stream.hub import Hub, LiveSettings
from stream.server.app import create_app
from stream.server.reach import opener
from stream.server.settings import SCOPES, ServerSettings, is_loopback
from stream.source import scheme_of
from stream.sources.network import public

log = logging.getLogger(__name__)

GRACE_S = 3  # s requests under way get when the server ends
EXIT_S = 25.0  # s after which it ends whatever happens
FORCED = 130
INNER = ("docker", "br-", "veth", "virbr", "lxc", "cni", "flannel")  # interfaces nobody else is on

Say = Callable[[str], None]


def serve(settings: ServerSettings, params: Params, *, browser: bool = False, say: Say = print) -> int:
    """Run a server until SIGTERM or Ctrl-C; returns 0. A second signal ends it at once, exit status 130.

    `say` prints on the terminal: addresses, and once the tokens that were made. Raises UserError.
    """
    settings, made = with_tokens(settings)
    live = settings.live
    _check(settings)
    with listening(settings) as sock:
        settings = settings.model_copy(update={"port": sock.getsockname()[1]})
        hub = Hub(LiveSettings(live.model, live.engine, live.box, params, live.max_streams, live.stall_s, live.batch))
        try:
            app = create_app(hub, settings)
            app.state.urls = addresses(settings)
            server = Server(configured(app, settings), app, lambda: _announce(settings, made, browser, say))
            with server.signals():
                asyncio.run(_run(server, hub, settings, sock))
        finally:
            hub.close()
    return 0


def _check(settings: ServerSettings) -> None:
    """Raise UserError for what could not work, where it would only show once somebody comes."""
    from accel.select import choose
    from models.weights import found

    live = settings.live
    hardware.choose(live.decode, live.encoder)
    found(live.model)
    if live.engine != "auto":
        choose(live.engine)
    for name, url in settings.streams.items():
        source = url.get_secret_value()
        if scheme_of(source) == "file" and not Path(source.removeprefix("file://")).exists():
            raise UserError(f"stream {name}: no such file: {source}", hint="check the path")
    if settings.recordings.exists() and not settings.recordings.is_dir():
        raise UserError(f"{settings.recordings} is not a folder", hint="--recordings FOLDER is where recordings go")


class Server(uvicorn.Server):
    """uvicorn's server with our way to end: the first signal asks, the second forces, and time forces too."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._app, self._ready = app, ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watchdog: threading.Timer | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, then say so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own way ends the process by the signal it got; `signals` is ours."""
        yield

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Take Ctrl-C and SIGTERM, and give them back."""
        before = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            if self._watchdog is not None:
                self._watchdog.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """Begin to end: endless answers first. From any thread, and from a signal's handler."""
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._app.state.closing.set)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self._watchdog is not None:
            os._exit(FORCED)
        self._watchdog = threading.Timer(EXIT_S, os._exit, (1,))
        self._watchdog.daemon = True
        self._watchdog.start()
        self.stop()


async def _run(server: Server, hub: Hub, settings: ServerSettings, sock: socket.socket) -> None:
    """The streams of the settings, OSC, and HTTP."""
    for name, url in settings.streams.items():
        source = url.get_secret_value()
        label = public(source) if "://" in source else Path(source).name  # viewers see it
        hub.open(name).feed(opener(source), label, retry=True)
    faders = None
    if settings.osc_port is not None:
        faders, _ = await osc.listen(hub, settings.osc_host, settings.osc_port)
    try:
        await server.serve(sockets=[sock])
    finally:
        if faders is not None:
            faders.close()


def configured(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    """uvicorn with the standard loop (aiortc is not tested with uvloop) and no access log: addresses carry tokens."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="websockets-sansio",
        ws_max_size=65_536,
        lifespan="on",
        log_config=None,
        log_level="warning",  # its info lines have addresses in them, with tokens
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        ssl_certfile=str(settings.tls_cert) if settings.tls_cert else None,
        ssl_keyfile=str(settings.tls_key) if settings.tls_key else None,
    )
    logging.getLogger("uvicorn.error").addFilter(_of_interest)
    logging.getLogger("aiortc").setLevel(logging.ERROR)  # it warns of every frame that a stranger codes wrongly
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        why = (error.strerror or str(error)).lower()
        raise UserError(
            f"cannot use the TLS certificate: {why}", hint="--tls-cert and --tls-key are PEM files"
        ) from None
    return config


def _of_interest(record: logging.LogRecord) -> bool:
    """A WebSocket that is refused, or a viewer that takes nothing, is not an error of ours."""
    return not record.getMessage().startswith("ASGI callable returned without completing")


@contextmanager
def listening(settings: ServerSettings) -> Iterator[socket.socket]:
    """A socket bound to the settings' address; raises UserError."""
    host, port = settings.host.strip("[]"), settings.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError):
        raise UserError(f"cannot listen on {host}: no such address here", hint="--host 127.0.0.1 or 0.0.0.0") from None
    with sock:
        if sys.platform != "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            sock.bind(address)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise UserError(f"cannot listen on {host}:{port}: {why}", hint="choose another --port or --host") from None
        yield sock


def with_tokens(settings: ServerSettings) -> tuple[ServerSettings, frozenset[str]]:
    """The settings with a random token for each scope that needs one and has none, and which scopes those are."""
    missing = [scope for scope in SCOPES if settings.exposed and getattr(settings.tokens, scope) is None]
    made: dict[str, SecretStr] = {scope: SecretStr(secrets.token_urlsafe(24)) for scope in missing}
    tokens = settings.tokens.model_copy(update=made)
    return settings.model_copy(update={"tokens": tokens}), frozenset(missing)


def addresses(settings: ServerSettings) -> tuple[str, ...]:
    """Where others reach the server: its names, then its addresses in the network, loopback last."""
    scheme = "https" if settings.secure else "http"
    hosts = [host for host in (*settings.hosts, settings.public_ip) if host]
    if settings.host in ("0.0.0.0", "::"):
        hosts += _own_addresses()
        hosts.append("127.0.0.1")
    else:
        hosts.append(settings.host)
    shown = [f"[{host}]" if ":" in host and not host.startswith("[") else host for host in hosts]
    return tuple(dict.fromkeys(f"{scheme}://{host}:{settings.port}" for host in shown))


def _own_addresses() -> list[str]:
    found = []
    for interface, entries in psutil.net_if_addrs().items():
        if not interface.startswith(INNER):
            found += [entry.address for entry in entries if entry.family == socket.AF_INET]
    return [address for address in found if not is_loopback(address) and not address.startswith("169.254.")]


def _announce(settings: ServerSettings, made: frozenset[str], browser: bool, say: Say) -> None:
    """Where to go. Tokens that the user chose are known already; those that were made are shown this once."""
    first = addresses(settings)[0]

    def query(scope: str, mark: str) -> str:
        token = getattr(settings.tokens, scope)
        return f"{mark}token={quote(token.get_secret_value(), safe='')}" if scope in made and token else ""

    page = f"{first}/{query('control', '?')}"
    say(f"page      {page}")
    bearer = settings.tokens.publish.get_secret_value() if "publish" in made and settings.tokens.publish else ""
    say(f"OBS in    {first}/whip/live" + (f"   bearer token {bearer}" if bearer else ""))
    say(f"OBS out   {first}/view/live?obs=1{query('view', '&')}")
    say(f"files     {settings.recordings}")
    if settings.exposed and not settings.secure:
        say("note      browsers give other machines' pages no camera without HTTPS: use --tls-cert and --tls-key")
    if browser:
        local = next(
            (url for url in addresses(settings) if is_loopback(url.rpartition(":")[0].partition("//")[2])), first
        )
        threading.Thread(target=webbrowser.open, args=(f"{local}/{query('control', '?')}",), daemon=True).start()
