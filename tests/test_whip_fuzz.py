"""Offers and trickle bodies that nobody would write: never a 500, and the server goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes import PATIENCE
from tests.whip_client import NETWORK, SDP, TRICKLE, Client, HummingTrack, NumberedTrack, Server, serving

pytestmark = NETWORK

NASTY = (
    "", "a=", "a", "=", "m=", "m=video", "m=audio 9 UDP/TLS/RTP/SAVPF", "m=video 9 UDP/TLS/RTP/SAVPF 97 98", "v=0",
    "v=x", "m=video 99999999999999999999 UDP/TLS/RTP/SAVPF 999", "m=application 9 UDP/DTLS/SCTP webrtc-datachannel",
    "m=application 9 DTLS/SCTP x", "a=group:BUNDLE", "a=group:BUNDLE 0", "a=group:BUNDLE 0 1 2 3", "a=mid:",
    "a=mid:9", "a=rtpmap:97 H264/90000", "a=rtpmap:97", "a=rtpmap:x y", "a=rtpmap:97 VP8/0", "a=rtpmap:97 VP8/x",
    "a=rtpmap:300 VP8/90000", "a=fmtp:97", "a=fmtp:97 apt=x", "a=fmtp:98 apt=98",
    "a=fmtp:97 profile-level-id=zzzzzz;packetization-mode=x", "a=fmtp:1 =", "a=rtcp-fb:97", "a=rtcp-fb:* nack",
    "a=ssrc:1", "a=ssrc:x cname:y", "a=ssrc:99999999999 cname:y", "a=ssrc-group:FID x", "a=ssrc-group:FID",
    "a=extmap:1", "a=extmap:99999 urn:x", "a=extmap:x/sendonly urn:ietf:params:rtp-hdrext:sdes:mid", "a=candidate:",
    "a=candidate:1 1 udp x x x typ x", "a=candidate:1 1 udp 1 ::1 9 typ host raddr", "a=end-of-candidates",
    "a=ice-ufrag:", "a=ice-ufrag:\u0000\uffff", "a=ice-pwd:x", "a=ice-lite", "a=ice-options:trickle",
    "a=fingerprint:", "a=fingerprint:sha-256", "a=fingerprint:md5 00", "a=fingerprint:sha-256 zz", "a=setup:",
    "a=setup:holdconn", "a=setup:active", "a=sendrecv", "a=inactive", "a=recvonly", "a=rtcp:", "a=rtcp:x IN IP9 y",
    "c=IN IP4", "c=IN IP4 999.1.1.1", "c=", "a=msid:", "a=msid:a b c", "a=msid-semantic:WMS", "a=sctp-port:x",
    "a=sctp-port:99999999", "a=max-message-size:-1", "a=sctpmap:5 x", "a=simulcast:send 1;2", "a=rid:1 send",
    "a=" + "9" * 5000, "m=" + " 9" * 900, "\U0001f600", "a=mid:0\u2028a=mid:1",
)  # fmt: skip
EXPECTED = {201, 400, 413, 415, 422, 429, 503}


class Loop(threading.Thread):
    """A server in an event loop of its own thread, for examples to come to."""

    def __init__(self) -> None:
        super().__init__()
        self.ready = threading.Event()
        self.http: httpx.AsyncClient
        self.server: Server

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        async with serving(max_half_open=64, connect_s=600.0) as (self.http, self.server):
            self.ready.set()
            await self.over.wait()

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE * 3)


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    thread = Loop()
    thread.start()
    assert thread.ready.wait(PATIENCE)
    yield thread
    thread.loop.call_soon_threadsafe(thread.over.set)
    thread.join(PATIENCE)


async def _offers(http: httpx.AsyncClient) -> dict[str, str]:
    offers = {}
    for kind, tracks in {"whip": (NumberedTrack(), HummingTrack()), "whep": ("video", "audio")}.items():
        client = Client(http)
        offers[kind] = await client.offer(*tracks, timing=True)
        await client.close()
    return offers


@pytest.fixture(scope="module")
def offers(loop: Loop) -> dict[str, str]:
    loop.server.hub.open("there")
    made: dict[str, str] = loop.do(_offers(loop.http))
    return made


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["drop", "twice", "swap", "nasty", "instead", "cut", "character"]),
        st.integers(0, 10_000),
        st.integers(0, 10_000),
        st.sampled_from(NASTY) | st.text(max_size=30),
    ),
    min_size=1,
    max_size=6,
)


def spoilt(text: str, steps: list[tuple[str, int, int, str]]) -> str:
    """A session description with some of its lines changed."""
    lines = text.split("\r\n")
    for what, a, b, new in steps:
        if not lines:
            break
        i, j = a % len(lines), b % len(lines)
        if what == "drop":
            del lines[i]
        elif what == "twice":
            lines.insert(j, lines[i])
        elif what == "swap":
            lines[i], lines[j] = lines[j], lines[i]
        elif what == "nasty":
            lines.insert(i, new)
        elif what == "instead":
            lines[i] = new
        elif what == "cut":
            lines[i] = lines[i][: b % (len(lines[i]) + 1)]
        else:
            at = b % (len(lines[i]) + 1)
            lines[i] = lines[i][:at] + new[:1] + lines[i][at + 1 :]
    return "\r\n".join(lines)


async def _post(loop: Loop, kind: str, body: bytes) -> int:
    name = "new" if kind == "whip" else "there"
    answer = await loop.http.post(f"/{kind}/{name}", content=body, headers=SDP)
    if answer.status_code == 201:
        assert (await loop.http.delete(answer.headers["Location"])).status_code == 200
    else:
        assert set(answer.json()) == {"error", "hint"}
    return answer.status_code


FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.sampled_from(["whip", "whep"]), STEPS)
def test_no_offer_breaks_the_server(
    loop: Loop, offers: dict[str, str], kind: str, steps: list[tuple[str, int, int, str]]
) -> None:
    body = spoilt(offers[kind], steps).encode("utf-8", "surrogatepass")
    assert loop.do(_post(loop, kind, body)) in EXPECTED


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["whip", "whep"]), st.binary(max_size=300))
def test_no_bytes_break_the_server(loop: Loop, offers: dict[str, str], kind: str, body: bytes) -> None:
    assert loop.do(_post(loop, kind, body)) == 400


@pytest.fixture(scope="module")
def session(loop: Loop, offers: dict[str, str]) -> httpx.Response:
    answer: httpx.Response = loop.do(loop.http.post("/whip/trickled", content=offers["whip"], headers=SDP))
    assert answer.status_code == 201
    return answer


@FUZZ
@given(STEPS, st.sampled_from([None, "*", '"x"', 'W/"x"', "", ",,", "x" * 300]))
def test_no_trickle_body_breaks_a_session(
    loop: Loop,
    offers: dict[str, str],
    session: httpx.Response,
    steps: list[tuple[str, int, int, str]],
    match: str | None,
) -> None:
    headers = TRICKLE | ({} if match is None else {"If-Match": match})
    body = spoilt(offers["whip"], steps).encode("utf-8", "surrogatepass")
    answer = loop.do(loop.http.patch(session.headers["Location"], content=body, headers=headers))
    assert answer.status_code in {400, 412 if match not in (None, "*") else 204, 422}


def test_after_all_that_a_publisher_is_still_served(loop: Loop, offers: dict[str, str]) -> None:
    async def publish() -> None:
        client = Client(loop.http)
        stream = loop.server.hub.open("after")
        box = stream.originals.subscribe(1)
        await client.publish("/whip/after", NumberedTrack())
        await asyncio.wait_for(box.aget(), PATIENCE)
        assert (await client.delete()).status_code == 200
        await client.close()

    loop.do(publish())
    assert {stream.name for stream in loop.server.hub.streams()} <= {"there", "trickled", "after"}
