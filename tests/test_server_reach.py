"""What a client may make the server reach, and what it may not."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from accel.errors import UserError
from stream.frame import VideoSpec
from stream.server.errors import Refused
from stream.server.reach import Reach, is_public
from stream.server.settings import ServerSettings
from stream.sink import open_sink
from stream.source import SourceLost
from tests.fakes import frame

NAMES = {
    "door.lan": ["192.168.1.20"],
    "cam.example": ["93.184.216.34"],
    "inside.example": ["10.0.0.7"],
    "both.example": ["93.184.216.34", "127.0.0.1"],
    "mapped.example": ["::ffff:169.254.169.254"],
    "other.test": ["93.184.216.35"],
}


def resolve(host: str) -> list[str]:
    if host[0].isdigit() or ":" in host:
        return [host]
    if host not in NAMES:
        raise OSError("unknown")
    return NAMES[host]


def reach(*hosts: str, **changes: Any) -> Reach:
    return Reach(ServerSettings(source_hosts=hosts, output_hosts=hosts, **changes), resolve)


def outcome(function: Callable[[str], object], url: str) -> int:
    try:
        function(url)
    except Refused as refused:
        return refused.status
    except UserError:
        return 422
    return 200


@pytest.mark.parametrize(
    ("hosts", "url", "expected"),
    [
        ((), "rtsp://door.lan/1", 403),  # nothing by default
        (("door.lan",), "rtsp://door.lan/1", 200),  # listed: may be in the LAN
        (("door.lan",), "rtsp://DOOR.lan./1", 200),
        (("door.lan",), "rtsp://ada:secret@door.lan:8554/1", 200),
        (("door.lan",), "rtsp://door.lan@evil.test/1", 403),
        (("door.lan",), "rtsp://evil.test/door.lan", 403),
        (("192.168.1.0/24",), "rtsp://192.168.1.20/1", 200),
        (("192.168.1.0/24",), "rtsp://192.168.2.20/1", 403),
        (("::1",), "rtsp://[::1]/1", 200),
        (("*.example",), "rtsp://cam.example/1", 200),
        (("*.example",), "rtsp://inside.example/1", 403),  # a wildcard stands for public addresses only
        (("*.example",), "rtsp://both.example/1", 403),
        (("*.example",), "http://mapped.example/1", 403),  # the cloud's metadata in disguise
        (("*.example", "10.0.0.0/8"), "rtsp://inside.example/1", 200),
        (("*.example",), "rtsp://notexample/1", 403),
        (("*",), "http://cam.example/clip.mp4", 200),
        (("*",), "rtsp://cam.example/1", 403),  # FFmpeg follows redirects of RTSP: only what is named
        (("*",), "http://169.254.169.254/latest/meta-data", 403),
        (("*",), "http://127.0.0.1:8787/", 403),
        (("*",), "http://[::1]/", 403),
        (("*",), "http://nowhere.example/", 422),
        (("*",), "http://cam.example\\@127.0.0.1/", 422),
        (("*",), "http://cam.example%2f@127.0.0.1/", 403),
        (("*",), "http://cam.example%00/", 422),
        (("*",), "http://cam.example:99999/", 422),
        (("*",), "http:///etc/passwd", 422),
        (("*",), "http://cam.example/\r\nHost:x", 422),
        (("*",), "http://cam.exämple/", 422),
        (("*",), "http://" + "a" * 3000, 422),
        (("*",), "file:///etc/passwd", 403),
        (("*",), "/etc/passwd", 403),
        (("*",), "FILE:///etc/passwd", 403),
        (("*",), "concat:http://cam.example/a|/etc/passwd", 422),
        (("*",), "subfile,,start,0,end,0,,://cam.example/", 422),
        (("*",), "data:text/plain,x", 403),
        (("*",), "camera", 403),
        (("*",), "/dev/video0", 403),
        (("*",), "screen", 403),
        (("door.lan",), "srt://door.lan:9000?mode=listener", 403),
        (("door.lan",), "srt://door.lan:9000?mode=caller", 200),
        ((), "demo", 200),
        ((), "test", 200),
    ],
)
def test_sources(hosts: tuple[str, ...], url: str, expected: int) -> None:
    assert outcome(reach(*hosts).source, url) == expected


@pytest.mark.parametrize(
    ("hosts", "url", "expected"),
    [
        ((), "virtualcam", 200),
        ((), "virtualcam:/dev/video9", 200),
        ((), "virtualcam:/dev/sda", 403),
        ((), "rtmp://cam.example/live/key", 403),
        (("cam.example",), "rtmp://cam.example/live/key", 200),
        (("*",), "rtmp://cam.example/live/key", 403),
        (("*.example",), "whip+https://inside.example/whip/1", 403),
        (("*.example",), "whip+https://cam.example/whip/1", 200),
        (("*",), "out.mp4", 403),
        (("*",), "file:///tmp/out.mp4", 403),
        (("*",), "window", 403),
        (("*",), "null", 403),
    ],
)
def test_outputs(hosts: tuple[str, ...], url: str, expected: int) -> None:
    assert outcome(reach(*hosts).output, url) == expected


def test_cameras_are_opened_where_the_owner_said_so() -> None:
    allowed = reach(source_schemes=("camera",))
    assert outcome(allowed.source, "camera") == 200
    assert outcome(allowed.source, "demo") == 403


def test_secrets_are_not_in_names() -> None:
    assert reach("door.lan").source("rtsp://ada:secret@door.lan/1?token=x").label == "rtsp://door.lan/1"
    assert reach("cam.example").output("rtmp://ada:pw@cam.example/live/key") == "rtmp://cam.example/…"


def test_public_addresses() -> None:
    inside = "10.0.0.1 172.16.0.1 192.168.0.1 127.0.0.1 169.254.1.1 0.0.0.0 224.0.0.1 100.64.0.1 ::1 fe80::1 fc00::1"
    disguised = "::ffff:10.0.0.1 64:ff9b::a00:1 2002:a00:1:: x"
    assert not any(is_public(address) for address in (inside + " " + disguised).split())
    assert is_public("2a00:1450:4001::1")


@contextlib.contextmanager
def site(answers: dict[str, tuple[int, dict[str, str], bytes]]) -> Iterator[tuple[str, list[str]]]:
    """A web server with these answers; what it was asked."""
    asked: list[str] = []

    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Host"] + self.path)
            status, headers, body = answers.get(self.path.partition("?")[0], (404, {}, b""))
            start = int(self.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
            if start:
                status = 206
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body[start:])

        def log_message(self, *arguments: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://clips.test:{server.server_port}", asked
        finally:
            server.shutdown()


def clip(path: Path) -> bytes:
    sink = open_sink(str(path), VideoSpec(64, 48, 25.0, live=False))
    for seq in range(10):
        sink.write(frame(seq))
    sink.close()
    return path.read_bytes()


def here(*hosts: str) -> Reach:
    """Every name is this machine."""
    return Reach(ServerSettings(source_hosts=hosts), lambda host: ["127.0.0.1"])


def test_a_clip_is_read_from_the_address_that_was_checked(tmp_path: Path) -> None:
    data = clip(tmp_path / "clip.mp4")
    for ranges in ({"Accept-Ranges": "bytes"}, {}):
        with site({"/clip.mp4": (200, ranges, data)}) as (url, asked):
            admitted = here("clips.test").source(f"{url}/clip.mp4?key=1")  # there is no clips.test
            with contextlib.closing(admitted.open((64, 48), "fit")) as source:
                assert sum(1 for _ in source.frames()) == 10
            assert asked[0] == f"{url.removeprefix('http://')}/clip.mp4?key=1"


def test_motion_jpeg_is_live_and_lost_when_it_ends() -> None:
    import cv2

    part = cv2.imencode(".jpg", frame(0).image)[1].tobytes()
    body = b"".join(b"--b\r\nContent-Type: image/jpeg\r\n\r\n" + part + b"\r\n" for _ in range(8))
    with contextlib.ExitStack() as opened:
        headers = {"Content-Type": "multipart/x-mixed-replace; boundary=b"}
        url, _ = opened.enter_context(site({"/": (200, headers, body)}))
        source = opened.enter_context(contextlib.closing(here("clips.test").source(f"{url}/").open((64, 48), "fit")))
        assert source.spec.live
        with pytest.raises(SourceLost):
            list(source.frames())


@pytest.mark.parametrize(
    "target", ["http://other.test:{port}/secret", "http://127.0.0.1:{port}/secret", "file:///etc/passwd", "//[bad"]
)
def test_a_redirect_does_not_lead_out(target: str) -> None:
    answers: dict[str, tuple[int, dict[str, str], bytes]] = {"/secret": (200, {}, b"secret")}
    with site(answers) as (url, asked):
        answers["/"] = (302, {"Location": target.format(port=url.rpartition(":")[2])}, b"")
        admitted = here("clips.test").source(f"{url}/")
        with pytest.raises(UserError):
            admitted.open((64, 48), "fit")
        assert not any("secret" in path for path in asked)


def test_a_redirect_to_an_allowed_place_is_followed_and_a_circle_left(tmp_path: Path) -> None:
    data = clip(tmp_path / "clip.mp4")
    answers = {
        "/old": (307, {"Location": "/clip.mp4"}, b""),
        "/clip.mp4": (200, {}, data),
        "/round": (302, {"Location": "/round"}, b""),
    }
    with site(answers) as (url, asked):
        with contextlib.closing(here("clips.test").source(f"{url}/old").open(None, "fit")) as source:
            assert source.spec.width == 64
        with pytest.raises(UserError, match="redirects"):
            here("clips.test").source(f"{url}/round").open(None, "fit")
        assert len(asked) < 12


@pytest.mark.parametrize(
    "playlist",
    [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://clips.test:%d/secret.ts\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile 'http://clips.test:%d/secret.ts'\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 26\n",
    ],
)
def test_lists_of_other_addresses_are_not_read(playlist: bytes) -> None:
    answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
    with site(answers) as (url, asked):
        body = playlist.replace(b"%d", url.rpartition(":")[2].encode())
        answers["/list.m3u8"] = (200, {"Content-Type": "application/vnd.apple.mpegurl"}, body)
        with pytest.raises(UserError):
            here("clips.test").source(f"{url}/list.m3u8").open((64, 48), "fit")
        assert [path.rpartition("/")[2] for path in asked] == ["list.m3u8"]


def test_an_address_that_has_moved_inside_since_is_not_opened() -> None:
    answers = [["93.184.216.34"], ["127.0.0.1"]]
    moving = Reach(ServerSettings(source_hosts=("*",)), lambda host: answers.pop(0))
    admitted = moving.source("http://rebind.example/clip.mp4")
    with pytest.raises(UserError, match="inside"):
        admitted.open((64, 48), "fit")
