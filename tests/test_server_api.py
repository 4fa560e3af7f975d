"""The control API over a real connection."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream.server import api
from stream.server.settings import ServerSettings
from tests.fakes import SIZE
from tests.serving import eventually, serving


def refused(response, status: int, *words: str) -> None:  # type: ignore[no-untyped-def]
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "hint"}
    for word in words:
        assert word in body["error"] + body["hint"]


def test_a_stream_is_opened_changed_and_removed(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        made = s.client.post(
            "/api/v1/streams", json={"name": "cam", "source": "test", "size": "64x64", "params": {"style.steps": 2}}
        )
        assert made.status_code == 201, made.text
        assert made.json()["params"]["style.steps"] == 2
        refused(s.client.post("/api/v1/streams", json={"name": "cam"}), 409, "cam")
        eventually(lambda: s.client.get("/api/v1/streams/cam").json()["phase"] == "live")
        assert [row["name"] for row in s.client.get("/api/v1/streams").json()] == ["cam"]

        changed = s.client.patch("/api/v1/streams/cam/params", json={"style.prompt": "neon", "style.strength": 0.5})
        assert changed.status_code == 200
        assert changed.json()["style.prompt"] == "neon"
        wrong = s.client.patch("/api/v1/streams/cam/params", json={"style.prompt": "ink", "style.steps": 99})
        refused(wrong, 422, "style.steps")
        refused(s.client.patch("/api/v1/streams/cam/params", json={"style.promt": "x"}), 422, "style.prompt")
        assert s.client.get("/api/v1/streams/cam/params").json()["style.prompt"] == "neon"  # nothing was changed
        for key in ("style.lora", "style.picture", "style.embeddings", "style.control"):
            for value in ("/etc/passwd", "../secret.png", "~/x.safetensors:0.5", "canny=C:x"):
                refused(s.client.patch("/api/v1/streams/cam/params", json={key: value}), 422, "no paths")

        assert s.client.put("/api/v1/streams/cam/source", json={"url": "demo"}).status_code == 202
        assert s.client.delete("/api/v1/streams/cam/source").status_code == 204
        assert s.client.get("/api/v1/streams/cam").json()["source"] is None
        assert s.client.delete("/api/v1/streams/cam").status_code == 204
        refused(s.client.delete("/api/v1/streams/cam"), 404, "cam")
        refused(s.client.get("/api/v1/streams/cam"), 404)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "no spaces"}, 422),
        ({"name": "cam", "model": "none-such"}, 422),
        ({"name": "cam", "size": "big"}, 422),
        ({"name": "cam", "params": {"style.steps": 0}}, 422),
        ({"name": "cam", "colour": "red"}, 422),
        ({"name": "cam", "source": "/etc/passwd"}, 403),
        ({"name": "cam", "source": "file:///etc/passwd"}, 403),
        ({"name": "cam", "source": "camera"}, 403),
        ({"name": "cam", "source": "gopher://x"}, 422),
        ({"name": "cam", "source": "rtsp://elsewhere/1"}, 403),
        ("not an object", 422),
    ],
)
def test_a_stream_that_cannot_be_leaves_nothing_behind(tmp_path: Path, body: object, status: int) -> None:
    with serving(tmp_path) as s:
        refused(s.client.post("/api/v1/streams", json=body), status)
        assert s.hub.streams() == []


def test_more_streams_than_there_may_be_are_to_come_back_later(tmp_path: Path) -> None:
    with serving(tmp_path, live={"max_streams": 1}) as s:
        assert s.client.post("/api/v1/streams", json={"name": "one"}).status_code == 201
        full = s.client.post("/api/v1/streams", json={"name": "two"})
        refused(full, 503)
        assert int(full.headers["retry-after"]) > 0


def test_a_stream_takes_another_model_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"name": name, "ready": name != "far"} for name in ("mini", "sd15-lcm", "far")]
    monkeypatch.setattr(api, "available", lambda: rows)
    with serving(tmp_path) as s:
        stream, path = s.stream(), "/api/v1/streams/cam/model"
        assert (stream.model, stream.params.style.steps) == ("mini", 1)
        told = s.hub.events.subscribe(64)
        swapped = s.client.put(path, json={"model": "sd15-lcm"})
        assert swapped.status_code == 202
        assert swapped.json()["model"] == "sd15-lcm"
        assert swapped.json()["params"]["style.steps"] == 4  # as that one is best run
        assert any(event.kind == "params" and "sd15-lcm" in event.text for event in iter(told.poll, None))
        shown = stream.meter.frames_out
        eventually(lambda: stream.meter.frames_out > shown)
        assert stream.phase == "live"
        refused(s.client.put(path, json={"model": "none-such"}), 422, "none-such")
        refused(s.client.put(path, json={"model": "/etc/passwd"}), 422, "no such model")
        refused(s.client.put(path, json={"model": "far"}), 422, "livestyle fetch far")
        refused(s.client.put("/api/v1/streams/other/model", json={"model": "mini"}), 404)
        assert stream.model == "sd15-lcm"
        assert s.client.put(path, json={"model": "mini"}).json()["params"]["style.steps"] == 1


def test_what_is_not_json_or_not_there_is_refused_in_the_same_form(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        refused(s.client.post("/api/v1/streams", content=b"{", headers={"content-type": "application/json"}), 422)
        refused(s.client.get("/nothing/here"), 404)
        refused(s.client.put("/api/v1/streams"), 405)
        refused(s.client.get("/api/v1/streams/no%20such"), 422)


def test_a_bug_is_told_to_the_log_and_not_to_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as s:
        monkeypatch.setattr(s.hub, "streams", lambda: 1 / 0)
        answer = s.client.get("/api/v1/streams")
        refused(answer, 500, "internal error")
        assert "ZeroDivision" not in answer.text
        monkeypatch.undo()


def test_what_the_page_needs_to_know(tmp_path: Path) -> None:
    servers = [{"urls": ["turn:turn.lan:3478"], "username": "ada", "credential": "s3cret"}]
    with serving(tmp_path, ice_servers=servers) as s:
        info = s.client.get("/api/v1/info").json()
        assert info["ice_servers"][0]["credential"] == "s3cret"
        assert info["tokens"] == {"publish": False, "view": False, "control": False}
        assert info["secure"] is False
        schema = s.client.get("/api/v1/schema").json()
        assert schema["defaults"]["style.steps"] == 1
        assert "properties" in schema["schema"]
        assert s.client.get("/api/v1/models").json()[0]["name"] == "mini"
        styles = s.client.get("/api/v1/styles").json()
        assert {"name": "oil painting", "picture": "/static/styles/oil-painting.jpg"} in styles
        drawn = s.client.get("/api/v1/qr", params={"text": "http://10.0.0.7:8787/"})
        assert drawn.headers["content-type"] == "image/svg+xml"
        assert drawn.text.startswith("<svg")
        refused(s.client.get("/api/v1/qr", params={"text": "x" * 1001}), 422)


def test_turn_credentials_are_for_those_with_a_token(tmp_path: Path) -> None:
    servers = [{"urls": ["turn:turn.lan:3478"], "username": "ada", "credential": "s3cret"}]
    with serving(tmp_path, ice_servers=servers, tokens={"view": "see", "control": "do"}) as s:
        stranger = s.client.get("/api/v1/info")
        assert "s3cret" not in stranger.text
        assert stranger.json()["tokens"] == {"publish": True, "view": True, "control": True}
        assert "s3cret" in s.client.get("/api/v1/info?token=see").text


def test_outputs_are_started_listed_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fakes import FakeSink

    sink = FakeSink()
    monkeypatch.setattr("stream.server.outputs.open_sink", lambda url, spec: sink)
    with serving(tmp_path, output_hosts=("192.0.2.7",), max_outputs=1) as s:
        s.stream()
        made = s.client.post("/api/v1/streams/cam/outputs", json={"url": "rtmp://192.0.2.7/live/s3cret-key"})
        assert made.status_code == 201, made.text
        assert made.json()["url"] == "rtmp://192.0.2.7/…"  # the path is the key
        assert made.json()["state"] == "live"
        refused(s.client.post("/api/v1/streams/cam/outputs", json={"url": "rtmp://192.0.2.7/live/2"}), 409)
        eventually(lambda: sink.written > 2)
        assert sink.frames[0].image.shape == (SIZE[1], SIZE[0], 3)
        (listed,) = s.client.get("/api/v1/streams/cam/outputs").json()
        assert s.client.delete(f"/api/v1/streams/cam/outputs/{listed['id']}").status_code == 204
        assert sink.closed.is_set()
        refused(s.client.delete(f"/api/v1/streams/cam/outputs/{listed['id']}"), 404)
        for url, status in (("out.mp4", 403), ("null", 403), ("rtmp://elsewhere/1", 403), ("x://y", 422)):
            refused(s.client.post("/api/v1/streams/cam/outputs", json={"url": url}), status)


def test_settings_know_who_can_reach_them() -> None:
    assert not ServerSettings(host="127.0.0.1").exposed
    assert ServerSettings(host="0.0.0.0").exposed
    assert ServerSettings(host="::1", hosts=("video.example.com",)).exposed  # a proxy passes the world on
