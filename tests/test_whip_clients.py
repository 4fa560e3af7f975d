"""WHIP and WHEP clients that others wrote, against our server on a real port."""

from __future__ import annotations

import asyncio
import datetime
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from stream.hub import LiveSettings
from stream.rtc import tuning
from stream.server.settings import ServerSettings
from tests.fakes import PATIENCE
from tests.whip_client import NETWORK, Server, number_in

pytestmark = NETWORK
ROOT = Path(__file__).parents[1]


@contextmanager
def listening(**settings: Any) -> Iterator[tuple[str, Server]]:
    """Our server on a port of the loopback, in a thread; its address."""
    server = Server(ServerSettings(**settings), LiveSettings(box=(320, 240)), PATIENCE)
    tuning.install()
    running = uvicorn.Server(
        uvicorn.Config(server.app, host="127.0.0.1", port=0, log_config=None, loop="asyncio", ws="none")
    )
    started = threading.Event()
    ports: list[int] = []

    async def serve() -> None:
        task = asyncio.ensure_future(running.serve())
        while not running.started:
            await asyncio.sleep(0.01)
        ports.append(running.servers[0].sockets[0].getsockname()[1])
        started.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(PATIENCE)
    try:
        yield f"http://127.0.0.1:{ports[0]}", server
    finally:
        running.should_exit = True
        thread.join(PATIENCE)
        tuning.uninstall()
        server.hub.close()


def certificate(folder: Path) -> tuple[str, str]:
    """An ECDSA P-256 pair for DTLS: aiortc offers no other kind, and FFmpeg's own default fails."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "WebRTC")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    paths[1].write_bytes(pem)
    return str(paths[0]), str(paths[1])


def test_ffmpeg_publishes_and_hangs_up(tmp_path: Path) -> None:
    with listening() as (url, server):
        stream = server.hub.open("cam")
        box = stream.originals.subscribe(30)
        shown = stream.outlets.subscribe(1)
        command = [sys.executable, "-m", "tests.whip_ffmpeg", f"{url}/whip/cam", *certificate(tmp_path), "2"]
        sender = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            numbers = [number_in(box.get(PATIENCE).image) for _ in range(15)]
            assert numbers == sorted(set(numbers))
            assert numbers[-1] - numbers[0] < 20
            while stream.phase != "live":
                shown.get(PATIENCE)
            _, errors = sender.communicate(timeout=PATIENCE)
            assert sender.returncode == 0, errors
        finally:
            sender.kill()
            sender.communicate()
        assert stream.feeding is None  # its DELETE came before it ended


@pytest.fixture(scope="module")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts of tests/npm and what they need, as the lock file has it."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("needs node")
    folder = tmp_path_factory.mktemp("npm")
    for path in (ROOT / "tests" / "npm").iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    if installed.returncode:
        pytest.skip("needs the npm registry")
    return folder


def test_a_viewer_that_others_wrote_plays(npm: Path, tmp_path: Path) -> None:
    with listening(tokens={"control": "t"}) as (url, server):
        stream = server.hub.open("cam")
        ffmpeg = [sys.executable, "-m", "tests.whip_ffmpeg", f"{url}/whip/cam?token=t", *certificate(tmp_path), "20"]
        sender = subprocess.Popen(ffmpeg, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            shown = stream.outlets.subscribe(1)
            while stream.phase != "live":
                shown.get(PATIENCE)
            watch = ["node", "watch.mjs", f"{url}/whep/cam", "30", "t"]
            viewer = subprocess.run(watch, cwd=npm, capture_output=True, text=True, timeout=3 * PATIENCE)
        finally:
            sender.kill()
            sender.communicate()
        assert viewer.returncode == 0, viewer.stderr
        *pictures, last = [json.loads(line) for line in viewer.stdout.splitlines()]
        assert last == {"again": 401}  # it asked without its token
        numbers = [4095 - picture["number"] for picture in pictures if picture["width"] == 320]
        assert len(numbers) > 10
        assert numbers == sorted(numbers)
        assert 0 < numbers[-1] < 300


def test_a_publisher_that_others_wrote_is_seen(npm: Path) -> None:
    with listening(tokens={"control": "t"}) as (url, server):
        stream = server.hub.open("cam")
        box = stream.originals.subscribe(60)
        send = ["node", "send.mjs", f"{url}/whip/cam", "45", "t"]
        sender = subprocess.run(send, cwd=npm, capture_output=True, text=True, timeout=3 * PATIENCE)
        assert sender.returncode == 0, sender.stderr
        assert stream.feeding is None
        frames = [box.get(0) for _ in range(len(box))]
        assert {frame.image.shape for frame in frames} == {(240, 320, 3)}
        numbers = [number_in(frame.image) for frame in frames]
        assert numbers == sorted(numbers)
        assert len(set(numbers)) > 20
