"""The WebSocket that tells what happens."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.fakes import PATIENCE
from tests.serving import eventually, serving


def until(socket: ClientConnection, true: Any) -> dict[str, Any]:
    """The first message for which something is true."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        message: dict[str, Any] = json.loads(socket.recv(timeout=PATIENCE))
        if true(message):
            return message
    raise AssertionError("it was never told")


def test_statuses_come_at_once_and_again_when_something_changes(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        s.stream("cam")
        s.stream("other")
        with connect(s.url.replace("http", "ws") + "/api/v1/events?stream=cam") as socket:
            first = json.loads(socket.recv(timeout=PATIENCE))
            assert (first["type"], first["stream"], first["status"]["phase"]) == ("status", "cam", "live")
            s.client.patch("/api/v1/streams/cam/params", json={"style.prompt": "neon"})
            event = until(socket, lambda m: m["type"] == "event" and m["kind"] == "params")
            assert event["stream"] == "cam"
            assert event["data"] == {"style.prompt": "neon"}
            assert until(socket, lambda m: m["type"] == "status")["status"]["params"]["style.prompt"] == "neon"
            s.hub.get("other").patch({"style.prompt": "ink"})  # type: ignore[union-attr]
            s.client.delete("/api/v1/streams/cam")
            over = until(socket, lambda m: m.get("data", {}).get("phase") == "ended" or m["stream"] == "other")
            assert over["stream"] == "cam"


def test_without_a_name_every_stream_is_told(tmp_path: Path) -> None:
    with serving(tmp_path) as s, connect(s.url.replace("http", "ws") + "/api/v1/events") as socket:
        s.stream("one")
        s.stream("two")
        for name in ("one", "two"):
            assert until(socket, lambda m, name=name: m["type"] == "status" and m["stream"] == name)


def test_what_listeners_send_is_ignored_and_who_leaves_is_forgotten(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        s.stream()
        with connect(s.url.replace("http", "ws") + "/api/v1/events") as socket:
            socket.send('{"type": "nonsense"}')
            socket.send(b"\x00\xff")
            until(socket, lambda m: m["type"] == "status")
            assert len(s.hub.events) == 1
        eventually(lambda: len(s.hub.events) == 0)


def test_the_end_of_the_server_ends_the_connection(tmp_path: Path) -> None:
    with serving(tmp_path) as s, connect(s.url.replace("http", "ws") + "/api/v1/events") as socket:
        s.server.stop()
        with pytest.raises(ConnectionClosed) as closed:
            until(socket, lambda m: False)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code in (1001, 1012)
