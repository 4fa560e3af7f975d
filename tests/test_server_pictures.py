"""Snapshots, motion JPEG and transport streams, as clients that know nothing of us take them."""

from __future__ import annotations

import socket as sockets
from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from tests.fakes import PATIENCE, SIZE
from tests.serving import Paced, Serving, eventually, serving

LARGE = (320, 240)


def parts(pieces: Iterator[bytes], count: int) -> list[np.ndarray]:
    """The first pictures of a multipart stream, read as a browser would."""
    data = b""
    found: list[np.ndarray] = []
    for piece in pieces:
        data += piece
        while len(found) < count:
            head, blank, rest = data.partition(b"\r\n\r\n")
            if not blank:
                break
            assert head.splitlines()[0] == b"--frame"
            length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
            if len(rest) < length + 2:
                break
            found.append(cv2.imdecode(np.frombuffer(rest[:length], np.uint8), cv2.IMREAD_COLOR))
            data = rest[length + 2 :]
        if len(found) == count:
            break
    return found


def test_a_snapshot_is_the_next_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream.server.pictures.SNAPSHOT_S", 2.0)
    with serving(tmp_path) as s:
        s.stream()
        for query in ("", "?original=1"):
            answer = s.client.get(f"/stream/cam.jpg{query}")
            assert answer.headers["content-type"] == "image/jpeg"
            picture = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR)
            assert picture.shape == (SIZE[1], SIZE[0], 3)
        s.hub.open("empty")
        assert s.client.get("/stream/empty.jpg").status_code == 200  # the slate
        waiting = s.client.get("/stream/empty.jpg?original=1")
        assert (waiting.status_code, waiting.headers["retry-after"]) == (503, "2")
        assert s.client.get("/stream/none.jpg").status_code == 404


def test_motion_jpeg_is_encoded_once_for_everybody(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        stream = s.stream()
        with s.client.stream("GET", "/stream/cam.mjpg") as one, s.client.stream("GET", "/stream/cam.mjpg") as two:
            assert one.headers["content-type"].startswith("multipart/x-mixed-replace")
            first, second = one.iter_bytes(), two.iter_bytes()
            assert len(parts(first, 5)) == len(parts(second, 5)) == 5
            assert len(stream.outlets) == 1
            assert stream.viewers == 2
        eventually(lambda: stream.viewers == 0)
        eventually(lambda: len(stream.outlets) == 0)  # nobody watches, nobody encodes


def test_a_viewer_that_never_reads_costs_the_others_nothing(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        stream = s.stream(size=LARGE)
        port = int(s.url.rpartition(":")[2])
        with sockets.create_connection(("127.0.0.1", port)) as deaf:
            deaf.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
            deaf.sendall(b"GET /stream/cam.mjpg HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            eventually(lambda: stream.viewers == 1)
            with s.client.stream("GET", "/stream/cam.mjpg") as other:
                assert len(parts(other.iter_bytes(), 20)) == 20
        eventually(lambda: stream.viewers == 0)


def read(s: Serving, path: str, count: int) -> list[tuple[int, int, int]]:
    """(width, height, pts) of the first pictures of a transport stream."""
    with av.open(s.url + path, timeout=PATIENCE) as container:
        found = []
        for picture in container.decode(video=0):
            assert picture.pts is not None
            found.append((picture.width, picture.height, picture.pts))
            if len(found) == count:
                break
    return found


def test_a_transport_stream_begins_with_a_keyframe_for_everybody(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        s.stream(size=LARGE)
        for path in ("/stream/cam.ts", "/stream/cam.ts?original=1", "/stream/cam.ts"):
            found = read(s, path, 10)
            assert {(width, height) for width, height, _ in found} == {LARGE}
            times = [pts for *_, pts in found]
            assert times == sorted(set(times))


def test_a_transport_stream_outlives_a_change_of_size(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        stream = s.stream(size=LARGE)
        data = b""
        with s.client.stream("GET", "/stream/cam.ts") as answer:
            pieces = answer.iter_bytes()
            while len(data) < 20_000:
                data += next(pieces)
            stream.feed(lambda box, fit: Paced(50.0, (160, 128)), "another", retry=False)
            eventually(lambda: stream.size == (160, 128))
            more = b""
            while len(more) < 40_000:
                more += next(pieces)
        path = tmp_path / "both.ts"
        path.write_bytes(data + more)
        with av.open(str(path)) as container:
            sizes = {(picture.width, picture.height) for picture in container.decode(video=0)}
        assert {LARGE, (160, 128)} <= sizes


def test_there_is_room_for_so_many_viewers(tmp_path: Path) -> None:
    with serving(tmp_path, max_viewers=1) as s:
        stream = s.stream()
        with s.client.stream("GET", "/stream/cam.mjpg") as one:
            pieces = one.iter_bytes()
            assert parts(pieces, 1)
            full = s.client.get("/stream/cam.ts")
            assert (full.status_code, full.headers["retry-after"]) == (503, "10")
        eventually(lambda: stream.viewers == 0)


def test_the_end_of_a_stream_ends_its_pictures(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        s.stream()
        with s.client.stream("GET", "/stream/cam.mjpg") as one, s.client.stream("GET", "/stream/cam.ts") as two:
            first, second = one.iter_bytes(), two.iter_bytes()
            assert parts(first, 1)
            assert next(second)
            s.hub.remove("cam")
            assert sum(1 for _ in first) >= 0  # both come to an end
            assert sum(1 for _ in second) >= 0
