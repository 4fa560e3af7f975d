"""`serve` as a process of its own: what it says, what it listens to, and how it ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
from pythonosc.udp_client import SimpleUDPClient

from accel.errors import UserError
from models.params import Params
from stream.server.config import allowed, ice_server_of, load_server_settings, ports_of, tokens_of
from stream.server.serve import addresses, serve, with_tokens
from stream.server.settings import ServerSettings
from tests.fakes import PATIENCE
from tests.serving import eventually

ROOT = Path(__file__).parent.parent
CODE = """
import sys
from tests import fakes
fakes.install()
from accel.errors import UserError
from models.params import Params
from stream.server.config import load_server_settings
from stream.server.serve import serve
from pathlib import Path
from typing import Any
try:
    sys.exit(serve(load_server_settings(Path(sys.argv[1])), Params(), say=lambda text: print(text, flush=True)))
except UserError as error:
    sys.exit(f"{error.message} / {error.hint}")
"""


class Process:
    """A server in a process of its own; its terminal's lines as they come."""

    def __init__(self, folder: Path, toml: str) -> None:
        (folder / "server.toml").write_text(toml)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.popen = subprocess.Popen(
            [sys.executable, "-c", CODE, "server.toml"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=self.lines.extend, args=(self.popen.stdout,)),
            threading.Thread(target=self.errors.extend, args=(self.popen.stderr,)),
        ]
        for reader in self._readers:
            reader.start()

    def url(self) -> str:
        """Where it is, once it is ready."""
        eventually(lambda: any("OBS out" in line for line in self.lines) or self.popen.poll() is not None)
        found = re.search(r"https?://[^/\s]+", "".join(self.lines))
        assert found, self.errors
        return found[0]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and wait."""
        self.popen.send_signal(number)
        status = self.popen.wait(30)
        for reader in self._readers:
            reader.join(PATIENCE)
        return status


@contextlib.contextmanager
def process(folder: Path, toml: str) -> Iterator[Process]:
    running = Process(folder, toml)
    try:
        yield running
    finally:
        if running.popen.poll() is None:
            running.popen.kill()
        running.popen.wait(PATIENCE)
        for reader in running._readers:
            reader.join(PATIENCE)
        for pipe in (running.popen.stdout, running.popen.stderr):
            assert pipe
            pipe.close()


SMALL = """
[server]
port = 0
recordings = "recordings"
live = { box = [128, 72] }
streams = { cam = "test" }
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_recording_leaves_a_playable_file(tmp_path: Path, number: int) -> None:
    with process(tmp_path, SMALL) as running, httpx.Client(base_url=running.url(), timeout=PATIENCE) as client:
        eventually(lambda: client.get("/api/v1/streams/cam").json()["phase"] == "live")
        made = client.post("/api/v1/streams/cam/recordings").json()
        eventually(lambda: client.get("/api/v1/streams/cam/recordings").json()[0]["frames"] > 20)
        with client.stream("GET", "/stream/cam.mjpg") as watching:  # somebody watches to the end
            pieces = watching.iter_bytes()
            next(pieces)
            began = time.monotonic()
            assert running.end(number) == 0, running.errors
            assert time.monotonic() - began < 15
        assert "Traceback" not in "".join(running.errors)
        with av.open(str(tmp_path / "recordings" / made["file"])) as container:
            assert sum(1 for _ in container.decode(video=0)) > 20


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_second_signal_forces(tmp_path: Path) -> None:
    with process(tmp_path, SMALL) as running:
        running.url()
        running.popen.send_signal(signal.SIGTERM)
        running.popen.send_signal(signal.SIGINT)
        assert running.popen.wait(PATIENCE) in (0, 130)  # 0: it was quicker than the second one


def test_off_loopback_tokens_are_made_and_shown_once_and_never_logged(tmp_path: Path) -> None:
    with process(tmp_path, SMALL + 'host = "0.0.0.0"\n') as running:
        url = running.url()
        said = "".join(running.lines)
        control = re.search(r"/\?token=(\S+)", said)
        publish = re.search(r"bearer token (\S+)", said)
        view = re.search(r"obs=1&token=(\S+)", said)
        assert control
        assert publish
        assert view
        assert len({control[1], publish[1], view[1]}) == 3
        assert "HTTPS" in said
        here = f"http://127.0.0.1:{url.rpartition(':')[2]}"
        with httpx.Client(base_url=here, timeout=PATIENCE) as client:
            assert client.get("/api/v1/streams").status_code == 401
            assert client.get(f"/api/v1/streams?token={view[1]}").status_code == 200
            assert client.post(f"/api/v1/streams?token={view[1]}", json={"name": "x"}).status_code == 403
            assert client.post(f"/api/v1/streams?token={control[1]}", json={"name": "x"}).status_code == 201
            assert client.get("/api/v1/info", headers={"Authorization": f"Bearer {view[1]}"}).json()["urls"]
            assert client.get(f"/api/v1/nothing?token={control[1]}").status_code == 404
        assert running.end() == 0
        assert not any(token in "".join(running.errors) for token in (control[1], publish[1], view[1]))


def test_osc_is_there_when_asked_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with process(tmp_path, SMALL + f"osc_port = {port}\n") as running:
        with httpx.Client(base_url=running.url(), timeout=PATIENCE) as client:
            fader = SimpleUDPClient("127.0.0.1", port)
            fader.send_message("/livestyle/cam/style/prompt", "neon")
            fader._sock.close()
            eventually(lambda: client.get("/api/v1/streams/cam/params").json()["style.prompt"] == "neon")
        assert running.end() == 0


def test_it_speaks_https(tmp_path: Path) -> None:
    subprocess.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
        " -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem",
        shell=True,
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    with process(tmp_path, SMALL + 'tls_cert = "cert.pem"\ntls_key = "key.pem"\n') as running:
        url = running.url()
        assert url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        with httpx.Client(base_url=url, verify=trusted, timeout=PATIENCE) as client:
            assert client.get("/api/v1/info").json()["secure"] is True
        assert running.end() == 0


def test_what_the_user_can_mend_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="in use"):
            serve(ServerSettings(port=port), Params())
    with pytest.raises(UserError, match="no such address"):
        serve(ServerSettings(host="no such host"), Params())
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("not a certificate")
    with pytest.raises(UserError, match="TLS"):
        serve(ServerSettings(port=0, tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem"), Params())
    with pytest.raises(UserError, match="TLS"):
        serve(ServerSettings(port=0, tls_cert=tmp_path / "none.pem", tls_key=tmp_path / "key.pem"), Params())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"live": {"model": "nope"}}, "no such model: nope"),
        ({"live": {"engine": "nope"}}, "unknown engine: nope"),
        ({"live": {"encoder": "x265"}}, "no such encoder: x265"),
        ({"live": {"decode": "magic"}}, "no such decoder: magic"),
        ({"streams": {"a": "gopher://x"}}, "no source of kind gopher"),
        ({"streams": {"a": "missing.mp4"}}, "stream a: no such file"),
        ({"recordings": Path(__file__)}, "is not a folder"),
    ],
)
def test_what_would_only_show_when_somebody_comes_is_said_at_once(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        serve(ServerSettings(port=0, **settings), Params())


def test_settings_come_from_the_file_and_from_flags(tmp_path: Path) -> None:
    path = tmp_path / "show.toml"
    path.write_text('[style]\nprompt = "ink"\n[server]\nport = 9000\n[server.tokens]\nview = "see"\n')
    settings = load_server_settings(path, {"host": "0.0.0.0", "live.model": "mini", "public_ip": None})
    assert (settings.port, settings.host, settings.live.model) == (9000, "0.0.0.0", "mini")
    assert "see" not in repr(settings)
    filled, made = with_tokens(settings)
    assert made == {"publish", "control"}
    assert filled.tokens.view == settings.tokens.view
    assert with_tokens(ServerSettings()) == (ServerSettings(), frozenset())
    both = allowed(settings, ["camera", "door.lan"], ["rtmp.lan"])
    assert "camera" in both.source_schemes
    assert (both.source_hosts, both.output_hosts) == (("door.lan",), ("rtmp.lan",))


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[server]\nprot = 1", ("server.prot", "port")),
        ("[server.tokens]\nviewer = 'secret-words'", ("server.tokens.viewer", "view")),
        ("[server.live]\nmodle = 'x'", ("server.live.modle", "model")),
        ("[[server.ice_servers]]\nurls = ['stun:x']\nuser = 'x'", ("user", "username")),
        ("[server]\nport = 'secret-words'", ("server.port",)),
        ("[server]\nport = 99999", ("server.port",)),
        ("[server]\ntls_cert = 'x'", ("tls_key",)),
        ("[server]\nudp_ports = [9, 8]", ("udp_ports",)),
        ("[server]\npublic_ip = 'secret-words'", ("public_ip is an address",)),
        ("server = 3", ("table",)),
        ("[server", ("TOML",)),
    ],
)
def test_a_mistake_in_the_file_is_named_and_no_secret_shown(tmp_path: Path, toml: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(toml)
    with pytest.raises(UserError) as wrong:
        load_server_settings(path)
    for word in words:
        assert word in wrong.value.message + wrong.value.hint
    assert "secret-words" not in wrong.value.message + wrong.value.hint


def test_flags_in_their_short_forms() -> None:
    assert set(tokens_of(["one"])) == {"tokens.publish", "tokens.view", "tokens.control"}
    assert tokens_of(["one", "view=two"])["tokens.view"] == "two"
    assert tokens_of(["a=b"])["tokens.view"] == "a=b"  # no scope: all of it is the token
    assert ports_of("50000-50100") == (50000, 50100)
    assert ice_server_of("stun:stun.lan:3478") == {"urls": ["stun:stun.lan:3478"]}
    turn = ice_server_of("turn:ada:pass@word@turn.lan:3478")
    assert turn == {"urls": ["turn:turn.lan:3478"], "username": "ada", "credential": "pass@word"}
    for wrong in (lambda: ports_of("5"), lambda: ice_server_of("http://x"), lambda: tokens_of([""])):
        with pytest.raises(UserError):
            wrong()


def test_addresses_begin_with_the_name_others_use() -> None:
    assert addresses(ServerSettings(port=80)) == ("http://127.0.0.1:80",)
    assert addresses(ServerSettings(host="::1", port=80)) == ("http://[::1]:80",)
    named = addresses(ServerSettings(host="0.0.0.0", port=80, hosts=("video.example",)))
    assert (named[0], named[-1]) == ("http://video.example:80", "http://127.0.0.1:80")
