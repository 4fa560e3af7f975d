"""WHIP out, to a small WHIP server of the test's own on aiortc."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from aiortc import RTCConfiguration, RTCPeerConnection, RTCRtpReceiver, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from accel.errors import UserError
from stream.frame import Frame, VideoSpec
from stream.rtc.network import Network
from stream.sink import check_sink, open_sink
from stream.sinks import whip, whip_http
from stream.sinks.whip import WhipSink
from stream.sound import SAMPLES, sound_of
from tests.fakes import PATIENCE

RED, GREEN = (200, 40, 40), (40, 170, 40)


class WhipServer:
    """Takes one publisher at a time; keeps what it was asked and what it sees."""

    def __init__(self, codec: str = "", token: str = "", link: str = "", status: int = 201) -> None:
        self.codec, self.token, self.link, self.status = codec, token, link, status
        self.asked: list[tuple[str, str, str]] = []  # method, path, authorization
        self.colour = (0, 0, 0)
        self.size = (0, 0)
        self.sounds = 0
        self.seen = threading.Condition()
        self.peers: list[RTCPeerConnection] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.loop = asyncio.new_event_loop()
        self._looper = threading.Thread(target=self.loop.run_forever)
        self._looper.start()
        outer = self

        class Requests(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, status: int, body: str = "", **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                outer.note(self.command, self.path, self.headers.get("Authorization", ""))
                if outer.token and self.headers.get("Authorization") != f"Bearer {outer.token}":
                    self.answer(401)
                elif self.command == "OPTIONS":
                    self.answer(204, **({"Link": outer.link} if outer.link else {}))
                elif self.command == "DELETE":
                    self.answer(200)
                elif self.path == "/moved":
                    self.answer(307, Location="/whip")
                elif outer.status != 201:
                    self.answer(outer.status, Retry_After="7")
                else:
                    answer = asyncio.run_coroutine_threadsafe(outer.accept(body), outer.loop).result(PATIENCE)
                    self.answer(201, answer, Location="session/1", Content_Type="application/sdp")

            do_POST = do_DELETE = do_OPTIONS = handle_any

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
        self.http.daemon_threads = True
        self._server = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05})
        self._server.start()
        self.url = f"whip+http://127.0.0.1:{self.http.server_port}/whip"

    def note(self, *asked: str) -> None:
        with self.seen:
            self.asked.append(asked)  # type: ignore[arg-type]
            self.seen.notify_all()

    async def accept(self, offer: str) -> str:
        peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.peers.append(peer)
        peer.on("track", self.watch)
        await peer.setRemoteDescription(RTCSessionDescription(offer, "offer"))
        if self.codec:
            capabilities = [c for c in RTCRtpReceiver.getCapabilities("video").codecs if c.mimeType == self.codec]
            next(t for t in peer.getTransceivers() if t.kind == "video").setCodecPreferences(capabilities)
            await peer.setRemoteDescription(RTCSessionDescription(offer, "offer"))
        with Network().applied():
            await peer.setLocalDescription(await peer.createAnswer())
        return str(peer.localDescription.sdp)

    def watch(self, track: Any) -> None:
        task = self.loop.create_task(self.take(track))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def take(self, track: Any) -> None:
        with suppress(MediaStreamError):
            while True:
                frame = await track.recv()
                with self.seen:
                    if track.kind == "audio":
                        self.sounds += bool(np.abs(frame.to_ndarray()).max() > 1000)
                    else:
                        mean = frame.to_ndarray(format="rgb24").reshape(-1, 3).mean(axis=0)
                        self.colour = tuple(round(float(c)) for c in mean)
                        self.size = (frame.width, frame.height)
                    self.seen.notify_all()

    def until(self, true: Callable[[WhipServer], bool]) -> None:
        with self.seen:
            assert self.seen.wait_for(lambda: true(self), 2 * PATIENCE), (self.colour, self.size, self.asked)

    def hang_up(self) -> None:
        async def close() -> None:
            await asyncio.gather(*(peer.close() for peer in self.peers))
            self.peers.clear()

        asyncio.run_coroutine_threadsafe(close(), self.loop).result(PATIENCE)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self._server.join(PATIENCE)
        self.hang_up()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._looper.join(PATIENCE)
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


class Camera(threading.Thread):
    """Writes pictures and a tone at 30 fps until it is stopped."""

    def __init__(self, sink: WhipSink) -> None:
        super().__init__(daemon=True)
        self.sink, self.colour, self.size = sink, RED, (160, 96)
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        seq = piece = 0
        wave = (np.sin(np.arange(SAMPLES) * 0.06) * 9000).astype(np.int16)
        began = time.monotonic()
        while not self._done.wait(1 / 30):
            now = time.monotonic()
            while began + piece / 50 < now:
                self.sink.hear(sound_of(np.stack([wave, wave], axis=1), began + piece / 50))
                piece += 1
            image = np.empty((self.size[1], self.size[0], 3), np.uint8)
            image[:] = self.colour
            self.sink.write(Frame(image, round((now - began) * 1e6), seq, now))
            seq += 1

    def stop(self) -> None:
        self._done.set()
        self.join(PATIENCE)


def near(colour: tuple[int, int, int]) -> Callable[[WhipServer], bool]:
    return lambda server: max(abs(a - b) for a, b in zip(server.colour, colour, strict=True)) < 20


def spec() -> VideoSpec:
    return VideoSpec(160, 96, fps=30.0, live=True)


def soon() -> Iterator[float]:
    while True:
        yield 0.1


def test_pictures_and_sound_arrive_and_the_session_is_deleted() -> None:
    with closing(WhipServer(token="s3cret")) as server:
        sink = WhipSink(f"{server.url}?token=s3cret&x=1", spec())
        camera = Camera(sink)
        try:
            server.until(near(RED))
            assert server.size == (160, 96)
            assert sink.state == "live"
            camera.colour = GREEN
            server.until(near(GREEN))
            camera.size = (96, 160)  # a phone that was turned
            server.until(lambda s: s.size == (96, 160))
            server.until(lambda s: s.sounds > 3)
        finally:
            camera.stop()
            began = time.monotonic()
            sink.close()
        assert time.monotonic() - began < 2 * whip.LEAVE_S
        assert server.asked[-1] == ("DELETE", "/session/1", "Bearer s3cret")
        assert ("POST", "/whip?x=1", "Bearer s3cret") in server.asked
        assert "s3cret" not in sink.name


def test_a_server_that_hangs_up_is_met_again() -> None:
    with closing(WhipServer()) as server:
        sink = WhipSink(server.url, spec(), delays=soon)
        camera = Camera(sink)
        try:
            server.until(near(RED))
            server.hang_up()
            camera.colour = GREEN
            server.until(near(GREEN))
            assert len([asked for asked in server.asked if asked[0] == "POST"]) == 2
        finally:
            camera.stop()
            sink.close()


def test_a_server_that_wants_vp8_gets_it_and_a_redirect_is_followed() -> None:
    with closing(WhipServer(codec="video/VP8")) as server:
        sink = WhipSink(server.url.replace("/whip", "/moved"), spec())
        camera = Camera(sink)
        try:
            server.until(near(RED))
        finally:
            camera.stop()
            sink.close()
        assert [asked[1] for asked in server.asked if asked[0] == "POST"] == ["/moved", "/whip"]


def test_a_first_refusal_is_two_lines_without_the_token() -> None:
    with closing(WhipServer(token="right")) as server, pytest.raises(UserError, match="token") as caught:
        open_sink(f"{server.url}?token=wr0ng", spec())
    assert "wr0ng" not in caught.value.message + caught.value.hint
    with pytest.raises(UserError, match="refused"):
        open_sink("whip+http://127.0.0.1:9/whip", spec())


def test_a_busy_server_is_left_alone_for_as_long_as_it_says() -> None:
    with closing(WhipServer(status=503)) as server:
        sink = WhipSink(server.url, spec(), delays=soon)
        try:
            deadline = time.monotonic() + PATIENCE
            while not sink.state.startswith("retrying") and time.monotonic() < deadline:
                time.sleep(0.01)
            assert sink.state == "retrying in 7 s: HTTP status 503"
        finally:
            sink.close()


def test_the_servers_ice_servers_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, ...]] = []
    original = whip.ice.configuration

    def configuration(servers: Any, now: float) -> Any:
        used.append(tuple(url for server in servers for url in server.urls))
        return original((), now)

    monkeypatch.setattr(whip.ice, "configuration", configuration)
    with closing(WhipServer(link='<turn:t.example?transport=udp>; rel="ice-server"; username="u"')) as server:
        sink = WhipSink(server.url, spec())
        sink.opened()
        sink.close()
    assert used == [("turn:t.example?transport=udp",)]


@pytest.mark.parametrize(
    ("links", "servers"),
    [
        (['<stun:a:3478>; rel="ice-server"'], [(("stun:a:3478",), None, None)]),
        (['<https://x/y>; rel="next"'], []),
        (
            ['<turn:b?transport=udp>; rel="ice-server"; username="u,\\"v"; credential="c;d"'],
            [(("turn:b?transport=udp",), 'u,"v', "c;d")],
        ),
        (
            ['<stun:a>; rel=ice-server, <turns:b>; rel="ice-server"; username="u"; credential="c"'],
            [(("stun:a",), None, None), (("turns:b",), "u", "c")],
        ),
        (["nonsense", "<", '<turn:x>; rel="ice-server'], []),
    ],
)
def test_link_headers_are_read(links: list[str], servers: list[Any]) -> None:
    found = whip_http.ice_servers(links)
    assert [(server.urls, server.username, server.credential) for server in found] == servers


@pytest.mark.parametrize(
    ("url", "endpoint", "token"),
    [
        ("whip+https://h/live", "https://h/live", None),
        ("whip+https://tok%2Fen@h:8/live?a=b", "https://h:8/live?a=b", "tok/en"),
        ("whip+http://h/live?token=t&a=b", "http://h/live?a=b", "t"),
        ("WHIP+HTTPS://user:tok@h/live", "https://h/live", "tok"),
    ],
)
def test_the_token_is_taken_out_of_the_url(url: str, endpoint: str, token: str | None) -> None:
    assert whip_http.endpoint_of(url) == whip_http.Endpoint(endpoint, token)


def test_an_address_without_a_host_is_refused() -> None:
    with pytest.raises(UserError, match="host"):
        check_sink("whip+https:///live")
