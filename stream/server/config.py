"""A server's settings from every side: defaults < the `[server]` table of a TOML file < flags of the command line."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from accel.errors import UserError
from stream.server.settings import SCOPES, ServerSettings

WORDS = ("camera", "screen")  # what --allow-source takes besides hosts


def load_server_settings(path: Path | None = None, flags: Mapping[str, Any] | None = None) -> ServerSettings:
    """The settings of a server; `flags` are dotted (`live.model`), those that are None are not given. Raises UserError.

    >>> load_server_settings(flags={"port": 9000, "live.model": "mini"}).port
    9000
    """
    table = _table(path)
    for key, value in (flags or {}).items():
        if value is None:
            continue
        *sections, name = key.split(".")
        place = table
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    try:
        return ServerSettings.model_validate(table)
    except ValidationError as error:
        raise _mistake(error) from None


def allowed(table: ServerSettings, sources: Sequence[str], outputs: Sequence[str]) -> ServerSettings:
    """The settings with what `--allow-source` and `--allow-output` add: hosts, or the words camera and screen."""
    schemes = [word for word in sources if word in WORDS]
    hosts = [host for host in sources if host not in WORDS]
    return table.model_copy(
        update={
            "source_schemes": (*table.source_schemes, *schemes),
            "source_hosts": (*table.source_hosts, *hosts),
            "output_hosts": (*table.output_hosts, *outputs),
        }
    )


def tokens_of(pairs: Sequence[str]) -> dict[str, str]:
    """`--token TOKEN` for every scope, `--token SCOPE=TOKEN` for one; as flags.

    >>> tokens_of(["view=see"])
    {'tokens.view': 'see'}
    """
    flags: dict[str, str] = {}
    for pair in pairs:
        scope, equals, token = pair.partition("=")
        if not equals or scope not in SCOPES:
            scope, token = "", pair
        if not token:
            raise UserError("an empty token", hint=f"--token TOKEN, or --token SCOPE=TOKEN ({', '.join(SCOPES)})")
        flags |= {f"tokens.{name}": token for name in SCOPES if scope in ("", name)}
    return flags


def pairs_of(texts: Sequence[str], flag: str) -> dict[str, str]:
    """`NAME=VALUE`s as a table; raises UserError.

    >>> pairs_of(["door=rtsp://door.lan/1"], "--stream")
    {'door': 'rtsp://door.lan/1'}
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UserError(f"{flag} needs NAME=SOURCE", hint=f"for example {flag} door=rtsp://door.lan/1")
        found[name] = value
    return found


def ports_of(text: str | None) -> tuple[int, int] | None:
    """`A-B` as a pair; raises UserError.

    >>> ports_of("50000-50100")
    (50000, 50100)
    """
    if text is None:
        return None
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()):
        raise UserError(f"bad port range: {text}", hint="--udp-ports takes FIRST-LAST, for example 50000-50100")
    return int(first), int(last)


def ice_server_of(text: str) -> dict[str, Any]:
    """`stun:host:port`, or `turn:user:password@host:port`, as an entry of `ice_servers`.

    >>> ice_server_of("turn:ada:secret@turn.lan:3478")["urls"]
    ['turn:turn.lan:3478']
    """
    scheme, colon, rest = text.partition(":")
    if not colon or scheme not in ("stun", "stuns", "turn", "turns"):
        raise UserError("an ICE server is stun:HOST or turn:USER:PASSWORD@HOST", hint="for example stun:stun.lan:3478")
    secrets, at, address = rest.rpartition("@")
    if not address:
        raise UserError(f"no host in that {scheme} server", hint=f"for example {scheme}:{scheme}.lan:3478")
    user, _, password = secrets.partition(":")
    return {"urls": [f"{scheme}:{address}"], **({"username": user, "credential": password} if at else {})}


def _table(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("server", {})
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", hint="check the path given to --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not TOML: {reason}", hint="for example: [server] port = 8787") from None
    if not isinstance(table, dict):
        raise UserError("server is a table", hint="for example: [server] port = 8787")
    return table


def _mistake(error: ValidationError) -> UserError:
    """The first thing that is wrong; its value is not told, it may be a secret."""
    first = error.errors(include_input=False)[0]
    path = [str(part) for part in first["loc"]]
    name = ".".join(["server", *path])
    if first["type"] == "extra_forbidden":
        known = list(_section(path[:-1]).model_fields)
        close = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"the settings are: {', '.join(known)}"
        return UserError(f"unknown setting: {name}", hint=hint)
    said = first["msg"].removeprefix("Value error, ")
    return UserError(f"{name}: {said}", hint="see the settings of [server] in the documentation")


def _section(path: Sequence[str]) -> type[BaseModel]:
    section: type[BaseModel] = ServerSettings
    for part in path:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        inner = [annotation, *getattr(annotation, "__args__", ())]
        section = next((kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)), section)
    return section
