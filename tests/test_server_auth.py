"""Who may do what, and in what form that is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from stream.server.auth import Guard
from stream.server.errors import Refused
from stream.server.settings import SCOPES, Scope, Tokens
from tests.serving import serving

TOKENS = {"publish": "pub", "view": "see", "control": "do"}


def status(guard: Guard, scope: Scope, token: str | None) -> int:
    try:
        guard.check(scope, token)
    except Refused as refused:
        return refused.status if refused.headers["WWW-Authenticate"].startswith("Bearer") else 0
    return 200


@pytest.mark.parametrize(
    ("scope", "token", "expected"),
    [
        ("view", None, 401),
        ("view", "", 401),
        ("view", "guess", 401),
        ("view", "see", 200),
        ("view", "pub", 403),
        ("publish", "pub", 200),
        ("publish", "see", 403),
        ("control", "see", 403),
        ("control", "do", 200),
        ("publish", "do", 200),  # control opens everything
        ("view", "sée\udcff", 401),
    ],
)
def test_a_token_opens_its_scope(scope: Scope, token: str | None, expected: int) -> None:
    assert status(Guard(Tokens(**TOKENS)), scope, token) == expected


def test_without_tokens_loopback_is_open_and_the_network_shut() -> None:
    for scope in SCOPES:
        assert status(Guard(Tokens()), scope, None) == 200
        assert status(Guard(Tokens(), required=True), scope, None) == 401
        assert status(Guard(Tokens(), required=True), scope, "") == 401


def test_a_scope_without_a_token_needs_that_of_control() -> None:
    guard = Guard(Tokens(control="do"))
    assert [status(guard, "view", token) for token in ("do", None, "")] == [200, 401, 401]
    assert status(Guard(Tokens(view="see")), "control", "see") == 403


ROUTES: list[tuple[str, str, Scope]] = [
    ("GET", "/api/v1/streams", "view"),
    ("POST", "/api/v1/streams", "control"),
    ("GET", "/api/v1/streams/cam", "view"),
    ("DELETE", "/api/v1/streams/cam", "control"),
    ("GET", "/api/v1/streams/cam/params", "view"),
    ("PATCH", "/api/v1/streams/cam/params", "control"),
    ("PUT", "/api/v1/streams/cam/source", "control"),
    ("DELETE", "/api/v1/streams/cam/source", "control"),
    ("GET", "/api/v1/streams/cam/recordings", "view"),
    ("POST", "/api/v1/streams/cam/recordings", "control"),
    ("DELETE", "/api/v1/streams/cam/recordings/x", "control"),
    ("GET", "/api/v1/recordings/x", "view"),
    ("GET", "/api/v1/streams/cam/outputs", "view"),
    ("POST", "/api/v1/streams/cam/outputs", "control"),
    ("DELETE", "/api/v1/streams/cam/outputs/x", "control"),
    ("GET", "/api/v1/qr", "view"),
    ("GET", "/stream/cam.jpg", "view"),
    ("GET", "/stream/cam.mjpg", "view"),
    ("GET", "/stream/cam.ts", "view"),
    ("GET", "/metrics", "view"),
    ("POST", "/whip/cam", "publish"),
    ("POST", "/whep/cam", "view"),
]


def test_every_route_asks_for_its_scope(tmp_path: Path) -> None:
    with serving(tmp_path, tokens=TOKENS) as s:
        for method, path, scope in ROUTES:
            stranger = s.client.request(method, path)
            assert stranger.status_code == 401, path
            assert stranger.headers["www-authenticate"] == "Bearer"
            assert set(stranger.json()) == {"error", "hint"}
            other = "see" if scope != "view" else "pub"
            assert s.client.request(method, f"{path}?token={other}").status_code == 403, path
            header = {"Authorization": f"Bearer {TOKENS[scope]}"}
            assert s.client.request(method, path, headers=header).status_code not in (401, 403), path
        for path in ("/healthz", "/readyz", "/api/v1/info", "/api/v1/openapi.json"):
            assert s.client.get(path).status_code == 200
        with pytest.raises(InvalidStatus) as wrong, connect(s.url.replace("http", "ws") + "/api/v1/events?token=guess"):
            pass
        assert wrong.value.response.status_code == 401
        with connect(s.url.replace("http", "ws") + "/api/v1/events?token=see") as socket:
            socket.ping()


def test_guessing_is_slowed_down(tmp_path: Path) -> None:
    with serving(tmp_path, tokens=TOKENS, rate_per_s=100) as s:
        statuses = [s.client.get(f"/api/v1/streams?token=guess{i}").status_code for i in range(20)]
        assert statuses[:5] == [401] * 5
        assert statuses[-1] == 429
