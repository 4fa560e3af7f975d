"""WHIP and WHEP over HTTP: every row of the table of statuses, and what becomes of a publisher's pictures."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from typing import Any

import av
import httpx
import pytest
from aiortc import RTCPeerConnection, RTCSessionDescription
from hypothesis import given
from hypothesis import strategies as st

from accel.errors import UserError
from stream.frame import Frame
from stream.hub import LiveSettings
from stream.live import Stream
from stream.mailbox import Fanout, Mailbox
from stream.rtc import publisher as publishing
from stream.rtc.arrivals import Arrivals, known
from stream.rtc.publisher import LABEL, Patience
from stream.rtc.received import Arrived, Timeline, open_track
from stream.source import SourceChanged
from tests.fakes import PATIENCE, FakeSource
from tests.whip_client import (
    NETWORK,
    SDP,
    TRICKLE,
    Client,
    HummingTrack,
    NumberedTrack,
    Server,
    eventually,
    number_in,
    numbered,
    serving,
    until,
)

pytestmark = NETWORK


async def offered(*tracks: Any) -> str:
    """The offer of a client that is closed again; its ports are nobody's."""
    client = Client(httpx.AsyncClient())
    sdp = await client.offer(*tracks)
    await client.close()
    await client.http.aclose()
    return sdp


@pytest.fixture(scope="module")
def sending() -> str:
    async def make() -> str:
        return await offered(NumberedTrack(), HummingTrack())

    return asyncio.run(make())


@pytest.fixture(scope="module")
def watching() -> str:
    return asyncio.run(offered("video", "audio"))


def run(test: Callable[[httpx.AsyncClient, Server], Coroutine[Any, Any, None]], **settings: Any) -> None:
    """Run a test inside a server's event loop."""

    async def main() -> None:
        async with serving(**settings) as (http, server):
            await test(http, server)

    asyncio.run(main())


def bare(sdp: str) -> str:
    """An offer before any candidate was gathered."""
    return "".join(line for line in sdp.splitlines(True) if not line.startswith(("a=candidate:", "a=end-of-cand")))


# what is answered to which offer


def test_an_offer_is_answered_with_everything_a_client_needs(sending: str) -> None:
    servers = [{"urls": ["stun:s.example"]}, {"urls": ["turn:t.example"], "username": "u", "credential": "c"}]

    async def test(http: httpx.AsyncClient, server: Server) -> None:
        answer = await http.post("/whip/cam", content=sending, headers=SDP)
        assert answer.status_code == 201
        assert answer.headers["Content-Type"] == "application/sdp"
        assert re.fullmatch(r"/whip/cam/[\w-]{22,}", answer.headers["Location"])
        assert re.fullmatch(r'"[^"]+"', answer.headers["ETag"])
        assert answer.headers["ID"] not in answer.headers["Location"]
        assert answer.headers.get_list("Link") == [
            '<stun:s.example>; rel="ice-server"',
            '<turn:t.example>; rel="ice-server"; username="u"; credential="c"; credential-type="password"',
        ]
        lines = answer.text.splitlines()
        assert lines.count("a=recvonly") == 2
        assert lines.count("a=rtcp-mux") == 2
        assert lines.count("a=setup:active") == 2
        assert "a=group:BUNDLE 0 1" in lines
        assert sum(line.startswith("a=candidate:") for line in lines) >= 2
        assert "a=end-of-candidates" in lines

    run(test, ice_servers=servers)


@pytest.mark.parametrize(("offered", "answered"), [("actpass", "active"), ("active", "passive"), ("passive", "active")])
@pytest.mark.parametrize("kind", ["whip", "whep"])
def test_every_dtls_role_is_accepted(kind: str, offered: str, answered: str, sending: str, watching: str) -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        server.hub.open("cam")
        sdp = (sending if kind == "whip" else watching).replace("a=setup:actpass", f"a=setup:{offered}")
        answer = await http.post(f"/{kind}/cam", content=sdp, headers=SDP)
        assert answer.status_code == 201
        assert answer.text.count(f"a=setup:{answered}") == 2

    run(test)


def second_video(sdp: str) -> str:
    video = sdp[sdp.index("m=video") : sdp.index("m=audio")].replace("a=mid:0", "a=mid:2")
    return sdp.replace("BUNDLE 0 1", "BUNDLE 0 1 2") + video


REFUSED: dict[str, tuple[int, Callable[[str], str]]] = {
    "nothing": (400, lambda sdp: ""),
    "no SDP": (400, lambda sdp: "hello"),
    "JSON": (400, lambda sdp: json.dumps({"sdp": sdp, "type": "offer"})),
    "no media": (400, lambda sdp: sdp[: sdp.index("m=")]),
    "a broken media line": (400, lambda sdp: sdp.replace("UDP/TLS/RTP/SAVPF", "?", 1)),
    "no ICE password": (400, lambda sdp: re.sub("a=ice-pwd:.*\r\n", "", sdp)),
    "no fingerprint": (400, lambda sdp: re.sub("a=fingerprint:.*\r\n", "", sdp)),
    "no rtcp-mux": (400, lambda sdp: sdp.replace("a=rtcp-mux\r\n", "")),
    "no mid": (400, lambda sdp: sdp.replace("a=mid:1\r\n", "")),
    "the same mid twice": (400, lambda sdp: sdp.replace("a=mid:1\r\n", "a=mid:0\r\n")),
    "too many lines": (400, lambda sdp: sdp + "a=x\r\n" * 2000),
    "the wrong direction": (422, lambda sdp: re.sub("a=(sendonly|recvonly)", "a=WRONG", sdp, count=1)),
    "an inactive section": (422, lambda sdp: re.sub("a=(sendonly|recvonly)", "a=inactive", sdp, count=1)),
    "no usable video codec": (422, lambda sdp: re.sub("(VP8|H264)/90000", "AV1/90000", sdp)),
    "no usable audio codec": (422, lambda sdp: re.sub("(opus|PCM.|G722)/", "iLBC/", sdp)),
    "a rejected section": (422, lambda sdp: re.sub(r"m=audio \d+", "m=audio 0", sdp)),
    "two videos": (422, second_video),
    "sound alone": (422, lambda sdp: sdp[: sdp.index("m=video")].replace("0 1", "1") + sdp[sdp.index("m=audio") :]),
    "no bundle": (422, lambda sdp: sdp.replace("a=group:BUNDLE 0 1\r\n", "")),
    "half a bundle": (422, lambda sdp: sdp.replace("BUNDLE 0 1", "BUNDLE 0")),
    "another kind of media": (422, lambda sdp: sdp.replace("m=audio", "m=text")),
}


@pytest.mark.parametrize("kind", ["whip", "whep"])
def test_an_offer_that_cannot_be_served_whole_is_refused_and_leaves_nothing(
    kind: str, sending: str, watching: str
) -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        server.hub.open("there")
        wrong = "recvonly" if kind == "whip" else "sendonly"
        for what, (status, spoil) in REFUSED.items():
            sdp = spoil(sending if kind == "whip" else watching).replace("a=WRONG", f"a={wrong}")
            answer = await http.post(f"/{kind}/{'new' if kind == 'whip' else 'there'}", content=sdp, headers=SDP)
            assert answer.status_code == status, what
            assert set(answer.json()) == {"error", "hint"}, what
        assert not server.peers.sessions
        assert [stream.name for stream in server.hub.streams()] == ["there"]

    run(test)


@pytest.mark.parametrize("kind", ["whip", "whep"])
def test_the_form_of_a_request_is_checked_before_its_offer(kind: str, sending: str, watching: str) -> None:
    sdp = sending if kind == "whip" else watching

    async def test(http: httpx.AsyncClient, server: Server) -> None:
        server.hub.open("cam")
        path = f"/{kind}/cam"
        for headers in ({"Content-Type": "application/json"}, {"Content-Type": "text/plain"}, {}):
            answer = await http.post(path, content=sdp, headers=headers)
            assert answer.status_code == 415
            assert answer.headers["Accept-Post"] == "application/sdp"
        assert (await http.post(path, content="x" * 200_000, headers=SDP)).status_code == 413
        assert (await http.post(path, content=b"v=0\r\n\xff", headers=SDP)).status_code == 400
        upper = {"Content-Type": "Application/SDP; charset=utf-8"}
        assert (await http.post(path, content=sdp, headers=upper)).status_code == 201

    run(test)


def test_names_of_streams_are_checked(sending: str, watching: str) -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        assert (await http.post("/whip/no%20name", content=sending, headers=SDP)).status_code == 400
        assert (await http.post("/whep/nobody", content=watching, headers=SDP)).status_code == 404
        assert (await http.head("/whep/nobody")).status_code == 404
        assert (await http.post("/whip/", content=sending, headers=SDP)).status_code == 404

    run(test)


def test_tokens_open_their_scope_and_no_other(sending: str, watching: str) -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        server.hub.open("cam")

        async def post(kind: str, token: str | None, query: str = "") -> httpx.Response:
            headers = SDP | ({"Authorization": f"Bearer {token}"} if token else {})
            sdp = sending if kind == "whip" else watching
            return await http.post(f"/{kind}/cam{query}", content=sdp, headers=headers)

        for answer in (await post("whip", None), await post("whip", "guess"), await post("whep", None)):
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert (await post("whip", "eye")).status_code == 403
        assert (await post("whep", "mouth")).status_code == 403
        published = await post("whip", "mouth")
        assert published.status_code == 201
        assert (await post("whep", None, "?token=eye")).status_code == 201
        session = published.headers["Location"]
        assert (await http.delete(session)).status_code == 401
        assert (await http.patch(session, content="", headers=TRICKLE)).status_code == 401
        assert (await http.get(session)).status_code == 401
        assert (await http.delete(session, headers={"Authorization": "Bearer mouth"})).status_code == 200

    run(test, tokens={"publish": "mouth", "view": "eye"})


# how many


def test_a_second_publisher_is_told_to_wait_and_the_first_goes_on(sending: str) -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        client = Client(http)
        await client.publish("/whip/cam", NumberedTrack())
        answer = await http.post("/whip/cam", content=sending, headers=SDP)
        assert answer.status_code == 409
        assert int(answer.headers["Retry-After"]) > 0
        assert client.pc.connectionState == "connected"
        await client.delete()
        assert (await http.post("/whip/cam", content=sending, headers=SDP)).status_code == 201
        await client.close()

    run(test)


def test_capacity_is_refused_with_a_time_to_come_back(sending: str, watching: str) -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        async def statuses(path: str, sdp: str) -> list[tuple[int, bool]]:
            answers = [await http.post(path.format(i), content=sdp, headers=SDP) for i in range(4)]
            return [(answer.status_code, "Retry-After" in answer.headers) for answer in answers]

        assert await statuses("/whip/s{}", sending) == [(201, False)] * 2 + [(503, True)] * 2  # streams
        assert await statuses("/whep/s0", watching) == [(201, False)] * 2 + [(503, True)] * 2  # viewers

    run(test, live=LiveSettings(max_streams=2, box=(320, 240)), max_viewers=2)


def test_sessions_that_never_connect_cannot_use_the_server_up(sending: str) -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        live = Client(http)
        await live.publish("/whip/live", NumberedTrack())
        stream = server.hub.get("live")
        assert stream
        pictures = stream.originals.subscribe(1)
        fds = open_files()
        statuses = [(await http.post(f"/whip/s{i}", content=sending, headers=SDP)).status_code for i in range(100)]
        assert statuses[:4] == [201] * 4
        assert set(statuses[4:]) == {429}
        assert len(server.peers.half_open) == 4
        before = stream.meter.frames_in
        for _ in range(5):  # the running stream goes on
            await asyncio.wait_for(pictures.aget(), PATIENCE)
        assert stream.meter.frames_in > before
        await eventually(lambda: not server.peers.half_open)  # they expire,
        await eventually(lambda: len(server.hub.streams()) == 1)  # the streams made for them too,
        await eventually(lambda: open_files() <= fds)  # and their sockets
        assert (await http.post("/whip/s1", content=sending, headers=SDP)).status_code == 201
        await live.close()

    run(test, live=LiveSettings(max_streams=16, box=(320, 240)), max_half_open=8, connect_s=4.0)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_answers_keep_to_the_ports_and_the_address_they_are_given(sending: str) -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        first = await http.post("/whip/a", content=sending, headers=SDP)
        rows = [line.split() for line in first.text.splitlines() if line.startswith("a=candidate:")]
        assert {row[5] for row in rows} == {"42350"}
        assert {row[4] for row in rows if ":" not in row[4]} <= {"203.0.113.9"}
        second = await http.post("/whip/b", content=sending, headers=SDP)  # there is no port left for this one
        assert second.status_code == 503
        assert "Retry-After" in second.headers
        assert [session.name for session in server.peers.sessions] == ["a"]
        assert server.hub.get("b") is None
        await http.delete(first.headers["Location"])
        await eventually(lambda: not server.peers._tasks)
        assert (await http.post("/whip/b", content=sending, headers=SDP)).status_code == 201

    run(test, udp_ports=(42_350, 42_350), public_ip="203.0.113.9")


# sessions


def test_candidates_may_come_later(sending: str) -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        client = Client(http)
        full = await client.offer(NumberedTrack())
        answer = await client.post("/whip/cam", bare(full))
        assert answer.status_code == 201
        session, tag = answer.headers["Location"], answer.headers["ETag"]
        lines = [line for line in full.splitlines() if line.startswith(("a=ice-", "m=", "a=mid", "a=cand", "a=end"))]
        body = "\r\n".join(lines) + "\r\n"
        for match in ({"If-Match": tag}, {}, {"If-Match": "*"}, {"If-Match": f'"other", {tag}'}):
            trickled = await http.patch(session, content=body, headers=TRICKLE | match)
            assert (trickled.status_code, trickled.content) == (204, b"")
            assert "ETag" not in trickled.headers
        await until(client.connected)
        await client.close()

    run(test)


@pytest.mark.parametrize("kind", ["whip", "whep"])
@pytest.mark.parametrize("first", ["m=video", "m=audio", "m=application"])
def test_sections_and_their_bundle_may_come_in_any_order(kind: str, first: str) -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        server.hub.open("cam")
        client = Client(http)
        tracks = (NumberedTrack(), HummingTrack()) if kind == "whip" else ("video", "audio")
        full = await client.offer(*tracks, timing=True)
        start = [full.index(section) for section in ("m=video", "m=audio", "m=application")] + [len(full)]
        sections = [full[a:b] for a, b in pairwise(start)]
        sections.sort(key=lambda section: not section.startswith(first))
        mixed = full[: start[0]].replace("BUNDLE 0 1 2", "BUNDLE 1 2 0") + "".join(sections)
        answer = await http.post(f"/{kind}/cam", content=mixed, headers=SDP)
        assert answer.status_code == 201
        assert re.findall("m=[a-z]+", answer.text)[0] == first
        # our client offered another order, so it takes the answer in that
        begin = answer.text.index("m=")
        parts = re.split("(?=^m=)", answer.text[begin:], flags=re.M)[1:]
        parts.sort(
            key=lambda part: [section[:7] for section in ("m=video", "m=audio", "m=application")].index(part[:7])
        )
        head = re.sub("BUNDLE .*", "BUNDLE 0 1 2", answer.text[:begin])
        await client.pc.setRemoteDescription(RTCSessionDescription(head + "".join(parts), "answer"))
        await until(client.connected)
        await client.close()

    run(test)


def test_a_patch_that_cannot_be_done_leaves_the_session_as_it_was(sending: str) -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        client = Client(http)
        answer = await client.publish("/whip/cam", NumberedTrack())
        session, tag = answer.headers["Location"], answer.headers["ETag"]

        async def patch(body: str, path: str = session, **headers: str) -> int:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            return (await http.patch(path, content=body, headers=TRICKLE | sent)).status_code

        restart = "a=ice-ufrag:new1\r\na=ice-pwd:ysXw1vbZ0Dqu8Hv4xtLqGm\r\n"
        assert await patch(restart, If_Match="*") == 422
        assert await patch(restart, If_Match=tag) == 422
        assert await patch("a=end-of-candidates\r\n", If_Match='"other"') == 412
        assert await patch("a=end-of-candidates\r\n", If_Match=f"W/{tag}") == 412
        assert await patch("hello") == 400
        assert await patch("a=x\r\n" * 100_000) == 413
        assert await patch("a=end-of-candidates\r\n", session + "x") == 404
        assert await patch("a=end-of-candidates\r\n", session.replace("whip", "whep")) == 404
        assert await patch("a=end-of-candidates\r\n", Content_Type="application/sdp") == 415
        assert await patch("a=candidate:1 1 udp 1 nonsense.local 9 typ host\r\n") == 204
        assert client.pc.connectionState == "connected"
        await client.close()

    run(test)


@pytest.mark.parametrize("kind", ["whip", "whep"])
def test_a_session_is_deleted_once(kind: str) -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        stream = server.hub.open("cam")
        client = Client(http)
        await (client.publish("/whip/cam", NumberedTrack()) if kind == "whip" else client.view("/whep/cam"))
        assert client.answered
        session = client.answered.headers["Location"]
        assert (await http.get(session)).status_code == 204
        assert (await http.head(session)).status_code == 204
        deleted = await http.delete(session, headers={"If-Match": '"whatever"'})
        assert (deleted.status_code, deleted.content) == (200, b"")
        assert stream.feeding is None
        for method in ("DELETE", "GET", "HEAD", "PATCH"):
            again = await http.request(method, session, content="a=x\r\n", headers=TRICKLE)
            assert again.status_code == 404, method
        await until(client.ended)
        await client.close()

    run(test)


# what may be asked of an endpoint


def test_endpoints_tell_what_they_take() -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        server.hub.open("cam")
        for path in ("/whip/cam", "/whep/cam"):
            got = await http.get(path)
            assert (got.status_code, got.content) == (204, b"")
            options = await http.options(path)
            assert options.status_code == 200
            assert options.headers["Accept-Post"] == "application/sdp"
            assert options.headers["Link"] == '<stun:s.example>; rel="ice-server"'
            for method in ("PUT", "PATCH", "DELETE"):
                refused = await http.request(method, path)
                assert (refused.status_code, refused.headers["Allow"]) == (405, "POST, GET, HEAD, OPTIONS")
        head = await http.head("/whep/cam")
        assert (head.status_code, head.headers["Content-Type"], head.headers["Content-Length"]) == (
            200,
            "application/sdp",
            "0",
        )

    run(test, ice_servers=[{"urls": ["stun:s.example"]}])


PREFLIGHT = {"Origin": "https://player.example", "Access-Control-Request-Method": "POST"}


def test_pages_of_other_sites_may_come_with_a_token(sending: str) -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        for path in ("/whip/cam", "/whip/cam/secret", "/whep/cam"):
            preflight = await http.options(path, headers=PREFLIGHT)
            assert preflight.status_code == 200
            assert preflight.headers["Access-Control-Allow-Origin"] == "*"
            assert preflight.headers["Access-Control-Allow-Methods"] == "OPTIONS, GET, HEAD, POST, PATCH, DELETE"
            assert preflight.headers["Access-Control-Allow-Headers"] == "Authorization, Content-Type, If-Match"
            assert "Link" not in preflight.headers
        assert "Link" not in (await http.options("/whip/cam")).headers
        assert "Link" in (await http.options("/whip/cam?token=t")).headers
        headers = SDP | {"Origin": "https://player.example", "Authorization": "Bearer t"}
        answer = await http.post("/whip/cam", content=sending, headers=headers)
        assert answer.status_code == 201
        exposed = answer.headers["Access-Control-Expose-Headers"].split(", ")
        assert {"Location", "ETag", "Link", "Accept-Post", "Retry-After"} <= set(exposed)

    run(test, tokens={"control": "t"}, ice_servers=[{"urls": ["stun:s.example"]}])


def test_without_tokens_only_our_own_pages_may_read_answers(sending: str) -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        def allowed(answer: httpx.Response) -> str | None:
            return answer.headers.get("Access-Control-Allow-Origin")

        assert allowed(await http.options("/whip/cam", headers=PREFLIGHT)) is None
        for origin in ("http://127.0.0.1:8787", "https://known.example"):
            assert allowed(await http.options("/whip/cam", headers=PREFLIGHT | {"Origin": origin})) == origin
        foreign = await http.post("/whip/cam", content=sending, headers=SDP | {"Origin": "https://player.example"})
        assert foreign.status_code == 403
        assert (await http.options("/whip/cam", headers=PREFLIGHT | {"Origin": "http://[::1"})).status_code == 200

    run(test, origins=("https://known.example",))


# pictures and sound


@asynccontextmanager
async def published(
    http: httpx.AsyncClient, server: Server, *tracks: Any
) -> AsyncIterator[tuple[Client, Stream, Mailbox[Frame]]]:
    """A connected publisher, its stream, and the pictures as they come in."""
    async with AsyncExitStack() as stack:
        client = Client(http)
        stack.push_async_callback(client.close)
        stream = server.hub.get("cam") or server.hub.open("cam")
        box = stream.originals.subscribe(1)
        await client.publish("/whip/cam", *tracks)
        yield client, stream, box


async def next_picture(box: Mailbox[Frame]) -> Frame:
    return await asyncio.wait_for(box.aget(), PATIENCE)


def test_pictures_and_sound_arrive_with_the_time_they_were_sent() -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        track = NumberedTrack()
        async with published(http, server, track, HummingTrack()) as (_, stream, box):
            sound = stream.sound.subscribe(1)
            frames = [await next_picture(box) for _ in range(12)]
            assert stream.feeding
            assert stream.feeding.label == LABEL
            piece = await asyncio.wait_for(sound.aget(), PATIENCE)
            assert piece.captured <= time.monotonic()
            for before, after in pairwise(frames):
                steps = number_in(after.image) - number_in(before.image)
                assert steps > 0
                assert abs(after.pts - before.pts - steps * 1e6 / track.fps) < 25  # ticks of 11 µs
            # numbers and times belong together: a picture is captured after it was made, and soon
            ages = [frame.captured - track.sent[number_in(frame.image)] for frame in frames]
            assert min(ages) > 0
            assert sorted(ages)[len(ages) // 2] < 0.25
            assert stream.size == (320, 240)

    run(test)


def test_the_stylized_picture_reaches_a_viewer() -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        track = NumberedTrack()
        async with published(http, server, track) as (_, stream, _):
            await eventually(lambda: stream.phase == "live")
            viewer = Client(http)
            shown = await viewer.view("/whep/cam")
            for _ in range(60):
                frame: Any = await asyncio.wait_for(shown.recv(), PATIENCE)
                number = number_in(frame.to_ndarray(format="rgb24"), inverted=True)
                if number in track.sent and frame.width == 320:
                    break
            else:
                raise AssertionError("no stylized picture came")
            assert stream.viewers == 1
            assert (await viewer.delete()).status_code == 200
            await eventually(lambda: stream.viewers == 0)
            await viewer.close()

    run(test)


def test_a_viewer_of_a_stream_without_source_sees_a_slate() -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        server.hub.open("cam")
        viewer = Client(http)
        shown = await viewer.view("/whep/cam")
        frame: Any = await asyncio.wait_for(shown.recv(), PATIENCE)
        assert (frame.width, frame.height) == (320, 240)
        await viewer.close()

    run(test)


def test_a_sender_that_scales_down_changes_nothing_but_sharpness() -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        track = NumberedTrack()
        async with published(http, server, track) as (_, stream, box):
            await next_picture(box)
            since = track.number
            track.size = (160, 120)
            frame = await next_picture(box)
            while number_in(frame.image) <= since + 1:
                frame = await next_picture(box)
            assert frame.image.shape == (240, 320, 3)
            assert stream.feeding

    run(test)


def test_a_phone_that_is_turned_turns_the_stream_at_once() -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        track = NumberedTrack()
        async with published(http, server, track) as (client, stream, box):
            await next_picture(box)
            track.size = (240, 320)
            turned = time.monotonic()
            frame = await next_picture(box)
            while frame.image.shape != (240, 184, 3):
                frame = await next_picture(box)
            assert time.monotonic() - turned < 2
            assert client.pc.connectionState == "connected"
            assert server.peers.publisher("cam")
            await eventually(lambda: stream.size == (184, 240))

    run(test)


def test_pages_can_measure_times_over_the_data_channel() -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        client, told, answered = Client(http), asyncio.Event(), asyncio.Event()
        messages: list[dict[str, float]] = []
        offer = await client.offer(NumberedTrack(), timing=True)
        channel = client.channel
        assert channel

        @channel.on("message")
        def on_message(message: str) -> None:
            messages.append(json.loads(message))
            (answered if "ping" in messages[-1] else told).set()

        @channel.on("open")
        def on_open() -> None:
            for question in ("[" * 150, "{}", '{"ping": "x"}', '{"ping": 17.5}'):
                channel.send(question)

        assert (await client.post("/whip/cam", offer)).status_code == 201
        await until(answered)
        await until(told)
        pings = [message for message in messages if "ping" in message]
        assert [ping["ping"] for ping in pings] == [17.5]
        assert 0 <= time.monotonic() * 1000 - pings[0]["now"] < 10_000
        sender: Any = client.pc.getSenders()[0]
        rtp = next(message["rtp"] for message in messages if "rtp" in message)
        assert (sender._RTCRtpSender__rtp_timestamp - rtp) % 2**32 < 90_000 * 10
        await client.close()

    run(test)


# how a publisher ends


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "Patience", lambda: Patience(track_s=0.4, picture_s=3.0, stall_s=0.6))


def test_a_publisher_that_never_sends_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)

    async def test(http: httpx.AsyncClient, server: Server) -> None:
        client, track = Client(http), NumberedTrack()
        track.gate.clear()
        await client.publish("/whip/cam", track)
        session = server.peers.sessions[0]
        await until(client.ended)
        assert session.peer.reason == "no video within 0.4 s"  # type: ignore[attr-defined]
        assert not server.peers.sessions
        await client.close()

    run(test)


def test_a_publisher_that_falls_silent_frees_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)

    async def test(http: httpx.AsyncClient, server: Server) -> None:
        track = NumberedTrack()
        async with published(http, server, track) as (client, stream, box):
            await next_picture(box)
            track.gate.clear()
            await eventually(lambda: stream.feeding is None)
            await until(client.ended)
            assert not server.peers.sessions
        async with published(http, server, NumberedTrack()) as (client, stream, box):  # the next one is welcome
            await next_picture(box)

    run(test)


def test_a_client_that_leaves_without_a_word_to_http_frees_the_stream() -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        async with published(http, server, NumberedTrack()) as (client, stream, box):
            await next_picture(box)
            await client.close()  # DTLS says it
            await eventually(lambda: stream.feeding is None and not server.peers.sessions)

    run(test)


def test_another_source_takes_the_stream_from_a_publisher(monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)

    async def test(http: httpx.AsyncClient, server: Server) -> None:
        async with published(http, server, NumberedTrack()) as (client, stream, box):
            await next_picture(box)
            held = threading.Event()
            other = FakeSource(3, live=True, before=lambda seq: held.wait(PATIENCE) if seq == 2 else None)
            stream.feed(lambda size, fit: other, "a file", retry=False)
            await until(client.ended)
            assert stream.feeding
            assert stream.feeding.label == "a file"
            held.set()

    run(test)


def test_a_publisher_of_a_stream_that_was_removed_meanwhile_is_closed() -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        client = Client(http)
        answer = await client.http.post("/whip/cam", content=await client.offer(NumberedTrack()), headers=SDP)
        server.hub.remove("cam")
        await client.pc.setRemoteDescription(RTCSessionDescription(answer.text, "answer"))
        await until(client.ended)
        assert not server.peers.sessions
        await client.close()

    run(test)


def test_a_session_that_is_not_connected_in_time_is_forgotten(sending: str, watching: str) -> None:
    async def test(http: httpx.AsyncClient, server: Server) -> None:
        server.hub.open("mine")
        answer = await http.post("/whip/cam", content=sending, headers=SDP)
        viewer = await http.post("/whep/mine", content=watching, headers=SDP)
        await eventually(lambda: not server.peers.sessions)
        assert (await http.delete(answer.headers["Location"])).status_code == 404
        assert (await http.delete(viewer.headers["Location"])).status_code == 404
        await eventually(lambda: server.hub.get("cam") is None)  # it had been opened for this offer
        assert server.hub.get("mine")

    run(test, connect_s=0.3)


def test_the_end_of_the_server_ends_every_session() -> None:
    async def main() -> None:
        async with serving() as (http, server):
            publisher, viewer = Client(http), Client(http)
            await publisher.publish("/whip/cam", NumberedTrack())
            await viewer.view("/whep/cam")
        await until(publisher.ended)
        await until(viewer.ended)
        assert not server.peers.sessions
        await publisher.close()
        await viewer.close()
        await eventually(lambda: not [t for t in threading.enumerate() if "decoder" in t.name])

    asyncio.run(main())


# the parts


@given(
    st.lists(st.tuples(st.none() | st.integers(-(2**33), 2**33), st.floats(-1.0, 5.0, allow_nan=False)), max_size=40)
)
def test_times_of_pictures_rise_whatever_timestamps_come(steps: list[tuple[int | None, float]]) -> None:
    timeline, now, times = Timeline(), 100.0, []
    for ticks, later in steps:
        now += later
        times.append(timeline(ticks, now))
    assert all(before < after for before, after in pairwise(times))
    assert times[:1] in ([], [0])


def arrived(width: int, height: int, seq: int = 0) -> Arrived:
    return Arrived(av.VideoFrame.from_ndarray(numbered(seq, (width, height)), "rgb24"), seq, 1.0 + seq / 30)


@pytest.mark.parametrize(
    ("size", "fit", "changed"),
    [((320, 320), "fit", True), ((320, 320), "crop", False), ((320, 320), "stretch", False), (None, "fit", True)],
)
def test_another_shape_opens_the_source_again_only_where_it_matters(
    size: tuple[int, int] | None, fit: str, changed: bool
) -> None:
    pictures = Fanout[Arrived]()
    source = open_track(pictures, arrived(320, 180), size, fit)
    frames = source.frames()
    shape = next(frames).image.shape
    pictures.put(arrived(214, 120, 1))  # scaled down, as senders round it
    assert next(frames).image.shape == shape
    pictures.put(arrived(180, 320, 2))
    if changed:
        with pytest.raises(SourceChanged):
            next(frames)
    else:
        assert next(frames).image.shape == shape
    source.close()


def test_a_track_ends_when_its_publisher_leaves_and_cannot_be_opened_after() -> None:
    pictures = Fanout[Arrived]()
    source = open_track(pictures, arrived(64, 48), None, "fit")
    frames = source.frames()
    assert next(frames).seq == 0
    pictures.close()
    assert list(frames) == []
    with pytest.raises(UserError):
        open_track(pictures, None, None, "fit")


def test_the_newest_picture_wins_and_those_it_replaced_are_a_gap() -> None:
    pictures = Fanout[Arrived]()
    source = open_track(pictures, arrived(64, 48, 7), None, "fit")
    frames = source.frames()
    assert next(frames).seq == 0
    for seq in (8, 9, 10):
        pictures.put(arrived(64, 48, seq))
    assert next(frames).seq == 3
    source.close()
    assert list(frames) == []


def test_a_decoder_at_work_does_not_hold_the_loop_up() -> None:
    async def main() -> None:
        pc = RTCPeerConnection()
        receiver: Any = pc.addTransceiver("video", "recvonly").receiver
        assert known(receiver)
        arrivals, busy = Arrivals(receiver), threading.Event()
        thread = threading.Thread(target=busy.wait, args=(PATIENCE,))
        receiver._RTCRtpReceiver__decoder_thread = thread
        thread.start()
        receiver._RTCRtpReceiver__decoder_queue.put("old picture")
        receiver._handle_disconnect()  # aiortc would join the thread here
        assert receiver._RTCRtpReceiver__decoder_queue.get_nowait() is None
        assert thread.is_alive()
        busy.set()
        await asyncio.to_thread(arrivals.join, PATIENCE)
        assert not thread.is_alive()
        await pc.close()

    asyncio.run(main())
