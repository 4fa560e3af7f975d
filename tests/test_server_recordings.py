"""Recordings on the server: complete, safe to name, playable whatever ends them."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from stream.sinks import disk
from stream.sound import RATE, SAMPLES, sound_of
from tests.fakes import SIZE
from tests.serving import Paced, Serving, eventually, serving


def pictures(path: Path) -> list[tuple[float, int, int]]:
    """(time in s, width, height) of every picture of a file."""
    with av.open(str(path)) as container:
        return [(float(p.time or 0), p.width, p.height) for p in container.decode(video=0)]


def record(s: Serving, name: str = "cam") -> dict[str, Any]:
    answer = s.client.post(f"/api/v1/streams/{name}/recordings")
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def shown(s: Serving, id: str, name: str = "cam") -> dict[str, Any]:
    rows = s.client.get(f"/api/v1/streams/{name}/recordings").json()
    return next(row for row in rows if row["id"] == id)


def test_a_recording_is_made_fetched_whole_and_by_ranges(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        s.stream()
        made = record(s)
        assert made["url"] == f"/api/v1/recordings/{made['id']}"
        assert s.client.get(made["url"]).status_code == 409  # not complete yet
        eventually(lambda: shown(s, made["id"])["frames"] > 10)
        ended = s.client.delete(f"/api/v1/streams/cam/recordings/{made['id']}").json()
        assert (ended["state"], ended["status"]) == ("done", 200)
        again = s.client.delete(f"/api/v1/streams/cam/recordings/{made['id']}")
        assert (again.status_code, again.json()) == (200, ended)
        whole = s.client.get(made["url"])
        assert whole.headers["content-type"] == "video/mp4"
        (tmp_path / "copy.mp4").write_bytes(whole.content)
        found = pictures(tmp_path / "copy.mp4")
        assert len(found) == ended["frames"]
        assert found[-1][0] == pytest.approx(ended["seconds"], abs=0.1)
        part = s.client.get(made["url"], headers={"Range": "bytes=4-11"})
        assert (part.status_code, part.content) == (206, whole.content[4:12])
        assert s.client.get(made["url"], headers={"Range": "bytes=99999999-"}).status_code == 416


def test_a_recording_outlives_a_change_of_size_and_a_source_that_comes_back(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        stream = s.stream()
        made = record(s)
        eventually(lambda: shown(s, made["id"])["frames"] > 5)
        stream.feed(lambda box, fit: Paced(50.0, (128, 160)), "a phone, turned", retry=False)
        eventually(lambda: stream.size == (128, 160))
        before = shown(s, made["id"])["frames"]
        eventually(lambda: shown(s, made["id"])["frames"] > before + 5)
        s.client.delete(f"/api/v1/streams/cam/recordings/{made['id']}")
        found = pictures(tmp_path / "recordings" / made["file"])
        assert {(width, height) for _, width, height in found} == {SIZE}
        times = [time for time, *_ in found]
        assert times == sorted(set(times))


def test_sound_is_recorded_with_the_pictures(tmp_path: Path) -> None:
    over = threading.Event()
    with serving(tmp_path) as s:
        stream = s.stream()

        def speak() -> None:
            while not over.wait(0.02):
                stream.hear(sound_of(np.full((SAMPLES, 2), 1000, np.int16), time.monotonic()))

        speaker = threading.Thread(target=speak)
        speaker.start()
        made = record(s)
        eventually(lambda: shown(s, made["id"])["frames"] > 40)
        s.client.delete(f"/api/v1/streams/cam/recordings/{made['id']}")
        over.set()
        speaker.join()
        assert len(stream.sound) == 0  # it has let go
        with av.open(str(tmp_path / "recordings" / made["file"])) as container:
            heard = sum(piece.samples for piece in container.decode(audio=0)) / RATE
        assert heard == pytest.approx(pictures(tmp_path / "recordings" / made["file"])[-1][0], abs=0.3)


def test_a_full_disk_ends_the_recording_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = [3000]

    def write(fd: int, data: bytes) -> int:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(fd, data)

    with serving(tmp_path) as s:
        stream = s.stream(size=(320, 240))
        events = s.hub.events.subscribe(64)
        monkeypatch.setattr(disk, "os", SimpleNamespace(**{**vars(os), "write": write}))
        made = record(s)
        eventually(lambda: shown(s, made["id"])["state"] == "failed")
        row = shown(s, made["id"])
        assert row["status"] == 507
        assert "no space left" in row["error"]
        assert str(tmp_path) not in row["error"]
        eventually(lambda: "no space left" in getattr(events.poll(), "text", ""))
        before = stream.meter.frames_out
        eventually(lambda: stream.meter.frames_out > before + 5)
        assert stream.phase == "live"
        assert s.client.delete(f"/api/v1/streams/cam/recordings/{made['id']}").json()["status"] == 507


def test_without_room_none_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as s:
        s.stream()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
        full = s.client.post("/api/v1/streams/cam/recordings")
        assert (full.status_code, full.json()["error"]) == (507, "the disk is full")
        monkeypatch.undo()
    (tmp_path / "taken").write_text("")
    with serving(tmp_path, recordings=tmp_path / "taken" / "inside") as s:
        s.stream()
        assert s.client.post("/api/v1/streams/cam/recordings").status_code == 507


def test_so_many_recordings_at_a_time(tmp_path: Path) -> None:
    with serving(tmp_path, max_recordings=1) as s:
        s.stream()
        made = record(s)
        assert s.client.post("/api/v1/streams/cam/recordings").status_code == 409
        s.client.delete(f"/api/v1/streams/cam/recordings/{made['id']}")
        record(s)


def test_only_recordings_are_given_out(tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    (folder / "private.mp4").write_bytes(b"private")
    (tmp_path / "cam-20261120-101500-abcd.mp4").write_bytes(b"outside")
    (folder / "cam-20261120-101500-abcd.mp4").symlink_to(tmp_path / "cam-20261120-101500-abcd.mp4")
    (folder / "cam-20261120-101500-beef.mp4").write_bytes(b"of an earlier run")
    with serving(tmp_path) as s:
        s.stream()
        s.stream("cam-20261120")
        rows = s.client.get("/api/v1/streams/cam/recordings").json()
        assert "cam-20261120-101500-beef" in [row["id"] for row in rows]
        assert s.client.get("/api/v1/streams/cam-20261120/recordings").json() == []
        assert s.client.get("/api/v1/recordings/cam-20261120-101500-beef").content == b"of an earlier run"
        for id in ("private", "cam-20261120-101500-abcd", "none-20261120-101500-abcd"):
            assert s.client.get(f"/api/v1/recordings/{id}").status_code == 404, id
        for id in ("..%2Fprivate", "%2e%2e", "x.mp4", "a%00b"):
            assert s.client.get(f"/api/v1/recordings/{id}").status_code in (404, 422), id
        assert s.client.delete("/api/v1/streams/cam/recordings/cam-20261120-101500-beef").status_code == 404


def test_the_end_of_the_stream_or_of_the_server_completes_recordings(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        s.stream("one")
        s.stream("two")
        first, second = record(s, "one"), record(s, "two")
        for made, name in ((first, "one"), (second, "two")):
            eventually(lambda made=made, name=name: shown(s, made["id"], name)["frames"] > 3)
        s.client.delete("/api/v1/streams/one")
        assert len(pictures(tmp_path / "recordings" / first["file"])) > 3
    assert len(pictures(tmp_path / "recordings" / second["file"])) > 3
