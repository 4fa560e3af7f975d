"""Who may do what: a bearer token per scope, RFC 6750."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable

from pydantic import SecretStr
from starlette.requests import HTTPConnection

from stream.server.errors import Refused
from stream.server.settings import SCOPES, Scope, Tokens

ANYBODY = frozenset(SCOPES)
NOBODY: frozenset[Scope] = frozenset()


class Guard:
    """Lets a request in by its `Authorization: Bearer …` or `?token=…`.

    Open to anybody while no token is set and none is `required` (the server is on loopback). The token of `control`
    opens every scope; a scope without a token of its own needs that one.

    >>> guard = Guard(settings.tokens, required=settings.exposed)
    >>> @router.get("/secret", dependencies=[Depends(guard("view"))])
    """

    def __init__(self, tokens: Tokens, *, required: bool = False) -> None:
        secrets: dict[Scope, SecretStr | None] = {scope: getattr(tokens, scope) for scope in SCOPES}
        self._tokens = {scope: secret.get_secret_value() for scope, secret in secrets.items() if secret is not None}
        self.on = required or bool(self._tokens)

    def __call__(self, scope: Scope) -> Callable[[HTTPConnection], Awaitable[None]]:
        """A FastAPI dependency for HTTP and WebSocket routes; raises Refused 401 or 403."""

        async def check(connection: HTTPConnection) -> None:
            self.check(scope, token_of(connection))

        return check

    def check(self, scope: Scope, token: str | None) -> None:
        """Raise Refused unless `token` opens `scope`: 401 without a known one, 403 when it opens something else."""
        scopes = self.scopes(token)
        if scope in scopes:
            return
        if scopes:
            challenge = f'Bearer error="insufficient_scope", scope="{scope}"'
            hint = f"this needs the token for {scope}"
            raise Refused(403, "this token does not open that", hint, {"WWW-Authenticate": challenge})
        challenge = "Bearer" if token is None else 'Bearer error="invalid_token"'
        message = "a token is needed" if token is None else "no such token"
        hint = f"send Authorization: Bearer TOKEN, or ?token=TOKEN, with the token for {scope}"
        raise Refused(401, message, hint, {"WWW-Authenticate": challenge})

    def scopes(self, token: str | None) -> frozenset[Scope]:
        """What a token opens; every comparison takes the same time."""
        if not self.on:
            return ANYBODY
        if not token:
            return NOBODY
        offered = token.encode("utf-8", "surrogateescape")
        opened = {scope for scope in SCOPES if hmac.compare_digest(self._secret(scope), offered)}
        return ANYBODY if "control" in opened else frozenset(opened)

    def _secret(self, scope: Scope) -> bytes:
        return self._tokens.get(scope, "").encode("utf-8", "surrogateescape")


def token_of(connection: HTTPConnection) -> str | None:
    """The token a request brings; the header counts before the query."""
    kind, _, value = connection.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    return connection.query_params.get("token")
