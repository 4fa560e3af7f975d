"""A refusal with its HTTP status, and the one form in which every error leaves the server."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.responses import JSONResponse
from pydantic import BaseModel


class Refused(Exception):
    """A request that is answered with `status` and `{"error": message, "hint": hint}`.

    >>> raise Refused(409, "there is a stream of that name", hint="choose another name, or DELETE it first")
    """

    def __init__(self, status: int, message: str, hint: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.hint = hint
        self.headers = dict(headers or {})


class Problem(BaseModel):
    """The body of every refusal."""

    error: str
    hint: str


def problem(status: int, message: str, hint: str = "", headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer to a request that is refused or went wrong."""
    return JSONResponse({"error": message, "hint": hint}, status, dict(headers or {}))
