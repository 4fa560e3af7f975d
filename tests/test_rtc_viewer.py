"""WHEP viewers: real aiortc peers on this machine, and the rules for a slow one."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import av
import pytest
from aiortc import RTCBundlePolicy, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from stream import coder
from stream.encoder import Encoders
from stream.rtc import ladder, sdp, timing, viewer
from stream.rtc.feedback import Feedback
from stream.rtc.viewer import Viewer
from tests.fakes import PATIENCE, FakeClock, in_a_quiet_moment
from tests.scenes import psnr
from tests.showing import SIZE, FakeStream

ROOT = Path(__file__).parents[1]
CONFIGURATION = RTCConfiguration(iceServers=[], bundlePolicy=RTCBundlePolicy.MAX_BUNDLE)


class Player:
    """Somebody who watches: a WHEP client on aiortc."""

    def __init__(self, *, codec: str | None = None, sound: bool = False, reads: bool = True) -> None:
        self.pc = RTCPeerConnection(CONFIGURATION)
        self.pictures: list[av.VideoFrame] = []
        self.pieces = 0  # of sound
        self.connected_at = self.first_at = 0.0
        self.told: list[dict[str, float]] = []
        self._news = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        video = self.pc.addTransceiver("video", "recvonly")
        if codec:
            video.setCodecPreferences(sdp.preferences("video", sdp.CODECS[codec]))
        if sound:
            self.pc.addTransceiver("audio", "recvonly")
        self.timing = self.pc.createDataChannel("timing")
        self.timing.on("message", lambda words: self.told.append(json.loads(words)))
        self.pc.on("connectionstatechange", self._changed)
        if reads:
            self.pc.on("track", lambda track: self._tasks.append(asyncio.ensure_future(self._take(track))))

    async def watch(self, by: Viewer) -> str:
        await self.pc.setLocalDescription()
        answer = await by.answer(self.pc.localDescription.sdp)
        await self.pc.setRemoteDescription(RTCSessionDescription(answer, "answer"))
        return answer

    async def until(self, true: Callable[[], Any]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not true():
                async with self._news:
                    await self._news.wait()

    async def see(self, count: int) -> av.VideoFrame:
        """Wait for so many more pictures; the newest."""
        wanted = len(self.pictures) + count
        await self.until(lambda: len(self.pictures) >= wanted)
        return self.pictures[-1]

    async def close(self) -> None:
        await self.pc.close()
        for task in self._tasks:  # aiortc ends no track of a peer that never connected
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _changed(self) -> None:
        if self.pc.connectionState == "connected":
            self.connected_at = time.monotonic()

    async def _take(self, track: Any) -> None:
        try:
            while True:
                frame = await track.recv()
                if track.kind == "audio":
                    self.pieces += 1
                else:
                    self.first_at = self.first_at or time.monotonic()
                    self.pictures.append(frame)
                async with self._news:
                    self._news.notify_all()
        except MediaStreamError:
            pass


class Show:
    """A stream, its encoders, its viewers and those who watch."""

    def __init__(self, stream: FakeStream) -> None:
        self.stream, self.encoders = stream, Encoders(stream)
        self.viewers: list[Viewer] = []
        self.players: list[Player] = []

    async def seat(self, **wishes: Any) -> tuple[Player, Viewer]:
        """One more watches, and has seen the first picture unless it does not read."""
        player, seen_by = Player(**wishes), Viewer(self.stream, self.encoders, CONFIGURATION)
        self.players.append(player)
        self.viewers.append(seen_by)
        await player.watch(seen_by)
        if wishes.get("reads", True):
            await player.see(1)
        return player, seen_by


@asynccontextmanager
async def show(size: tuple[int, int] = SIZE, *, sounding: bool = False) -> AsyncIterator[Show]:
    """A stream that plays; everything of it is gone afterwards."""
    with FakeStream(size).playing(sounding) as stream:
        made = Show(stream)
        try:
            yield made
        finally:
            await asyncio.gather(*(player.close() for player in made.players))
            await asyncio.gather(*(each.close() for each in made.viewers))
    assert stream.viewers == 0
    for thread in threading.enumerate():
        if thread.name.startswith("encoder-"):
            await asyncio.to_thread(thread.join, PATIENCE)
            assert not thread.is_alive()


def likeness(picture: av.VideoFrame, stream: FakeStream) -> float:
    """PSNR against the picture of the stream that it resembles most, dB."""
    image = picture.to_ndarray(format="rgb24")
    return max(psnr(image, original) for original in stream.images)


@pytest.mark.parametrize("codec", ["h264", "vp8"])
@in_a_quiet_moment
def test_the_first_picture_comes_within_half_a_second_and_is_the_streams(codec: str) -> None:
    async def scenario() -> None:
        async with show() as on:
            player, seen_by = await on.seat(codec=codec)
            assert player.first_at - player.connected_at < 0.5
            assert (seen_by.state, seen_by.codec, on.stream.viewers) == ("connected", codec, 1)
            assert likeness(await player.see(10), on.stream) > 28
            assert on.encoders.get(codec, 0).encode_ms > 0

    asyncio.run(scenario())


def test_h264_is_preferred_with_retransmission() -> None:
    async def scenario() -> None:
        async with show() as on:
            player, _ = await on.seat()
            answer = str(player.pc.remoteDescription.sdp)
            assert "H264/90000" in answer
            assert "profile-level-id=42e01f" in answer
            assert "rtx/90000" in answer
            assert "VP8" not in answer
            assert "a=sendonly" in answer

    asyncio.run(scenario())


def test_who_joins_later_sees_at_once_and_everyone_shares_one_encoder() -> None:
    async def scenario() -> None:
        async with show() as on:
            await on.seat()
            late, _ = await on.seat()
            assert late.first_at - late.connected_at < 0.5
            assert on.stream.viewers == 2
            assert [row["readers"] for row in on.encoders.stats()] == [2]

    asyncio.run(scenario())


def test_a_request_for_a_keyframe_is_honoured_and_many_are_one() -> None:
    async def scenario() -> None:
        async with show() as on:
            player, seen_by = await on.seat()
            encoder = on.encoders.get("h264", 0)
            receiver: Any = player.pc.getReceivers()[0]
            await player.see(20)
            before, started = encoder.keyframes, time.monotonic()
            for _ in range(20):
                await receiver._send_rtcp_pli(next(iter(receiver._RTCRtpReceiver__remote_streams)))
                await player.see(1)
            await player.see(2)
            elapsed = time.monotonic() - started
            assert seen_by.stats()["keyframes"] == 20
            assert 1 <= encoder.keyframes - before <= elapsed / 0.5 + 2

    asyncio.run(scenario())


def test_a_stream_that_changes_size_goes_on() -> None:
    async def scenario() -> None:
        async with show() as on:
            player, _ = await on.seat()
            on.stream.size, on.stream.images = (192, 256), FakeStream((192, 256), seed=3).images
            await player.until(lambda: player.pictures[-1].width == 192)
            assert likeness(await player.see(10), on.stream) > 28

    asyncio.run(scenario())


def test_a_viewer_that_never_reads_costs_nobody_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sender is stuck in the network: the queue in front of it runs over, and nobody else's."""

    async def scenario() -> None:
        async with show() as on:
            player, good = await on.seat()
            _, stuck = await on.seat()
            released = asyncio.Event()

            async def send_never(data: bytes) -> None:
                await released.wait()

            transport: Any = stuck.pc.getSenders()[0].transport
            monkeypatch.setattr(transport, "_send_rtp", send_never)
            encoder = on.encoders.get("h264", 0)
            produced, sent = encoder.frames, good.stats()["sent"]
            await player.see(45)
            assert good.stats()["dropped"] == 0
            assert abs((good.stats()["sent"] - sent) - (encoder.frames - produced)) <= 2
            assert stuck.stats()["dropped"] > 0
            released.set()

    asyncio.run(scenario())


def test_a_viewer_moves_to_a_smaller_rung_without_a_gap_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with show() as on:
            monkeypatch.setattr(viewer, "EVERY_S", 0.02)
            monkeypatch.setattr(ladder, "DOWN_S", 0.1)
            player, slow = await on.seat()
            other, good = await on.seat()
            transport: Any = slow.pc.getSenders()[0].transport
            transport._handle_rtcp_data = unheard  # no report comes after this one
            assert slow._feedback
            slow._feedback.loss = 0.5
            await player.until(lambda: player.pictures[-1].width == SIZE[0] // 4)
            assert (slow.rung, good.rung) == (3, 0)
            assert {picture.width for picture in player.pictures} == {SIZE[0], SIZE[0] // 2, SIZE[0] // 4}
            pts = [picture.pts for picture in player.pictures]
            assert pts == sorted(set(pts))
            await other.see(3)
            assert {picture.width for picture in other.pictures} == {SIZE[0]}

    asyncio.run(scenario())


def test_sound_is_sent_when_there_is_some_and_may_be_asked_for_when_there_is_none() -> None:
    async def scenario() -> None:
        async with show(sounding=True) as on:
            player, _ = await on.seat(sound=True)
            await player.until(lambda: player.pieces >= 20)
            assert likeness(await player.see(5), on.stream) > 28
        async with show() as on:
            player, _ = await on.seat(sound=True)
            await player.see(5)
            assert player.pieces == 0

    asyncio.run(scenario())


def test_the_page_is_told_when_each_picture_was_captured() -> None:
    async def scenario() -> None:
        async with show() as on:
            player, _ = await on.seat()
            asked = time.monotonic() * 1000
            player.timing.send('{"ping": 17.5}')
            player.timing.send("nonsense")
            await player.until(lambda: sum("rtp" in words for words in player.told) >= 3 and "now" in str(player.told))
            pong = next(words for words in player.told if "ping" in words)
            assert pong["ping"] == 17.5
            assert asked <= pong["now"] <= time.monotonic() * 1000
            told = [words for words in player.told if "rtp" in words]
            assert all(0 <= words["sent"] - words["captured"] < 500 for words in told)
            # what is on the wire runs with the times of capture, from an origin that stays
            origins = {round(words["rtp"] - words["captured"] * 90) % 2**32 for words in told}
            assert max(origins) - min(origins) <= 2

    asyncio.run(scenario())


def test_a_peer_that_leaves_is_closed_once() -> None:
    async def scenario() -> None:
        async with show() as on:
            player, seen_by = await on.seat()
            gone: list[str] = []
            left = asyncio.Event()
            seen_by.on_closed = lambda: (gone.append(seen_by.reason), left.set())  # type: ignore[func-returns-value]
            await player.close()
            await asyncio.wait_for(left.wait(), PATIENCE)
            await seen_by.close()
            assert gone == ["the viewer has gone"]
            assert (seen_by.state, on.stream.viewers) == ("closed", 0)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("limit", "reason"), [("SILENT_S", "nothing was heard of it"), ("STALL_S", "nothing was sent to it")]
)
def test_a_viewer_that_vanishes_or_gets_nothing_is_closed(
    limit: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(viewer, "EVERY_S", 0.05)
        async with show() as on:
            player, seen_by = await on.seat()
            left = asyncio.Event()
            seen_by.on_closed = left.set
            if limit == "STALL_S":
                on.stream.paused = True
            else:  # as when its network is gone: no word, no goodbye
                player.pc.getReceivers()[0].transport._send_rtp = unheard  # type: ignore[method-assign]
            monkeypatch.setattr(viewer, limit, 0.3)
            await asyncio.wait_for(left.wait(), PATIENCE)
            assert seen_by.reason == reason

    asyncio.run(scenario())


async def unheard(data: bytes) -> None:
    """Goes nowhere."""


def test_a_peer_that_will_not_close_loses_its_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(viewer, "CLOSE_S", 0.1)
        async with show() as on:
            _, seen_by = await on.seat()
            never = asyncio.Event()

            async def stuck(data: bytes) -> None:
                await never.wait()

            transport: Any = seen_by.pc.getSenders()[0].transport
            monkeypatch.setattr(transport, "_send_rtp", stuck)
            await asyncio.wait_for(seen_by.close(), PATIENCE)
            assert transport.transport.state == "closed"
            never.set()

    asyncio.run(scenario())


def test_who_never_connects_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(viewer, "EVERY_S", 0.02)
        monkeypatch.setattr(viewer, "CONNECT_S", 0.1)
        async with show() as on:
            seen_by, left = Viewer(on.stream, on.encoders, CONFIGURATION), asyncio.Event()
            seen_by.on_closed = left.set
            player = Player()
            on.players.append(player)
            await player.pc.setLocalDescription()
            await seen_by.answer(player.pc.localDescription.sdp)
            await asyncio.wait_for(left.wait(), PATIENCE)
            assert (seen_by.reason, on.encoders.stats()) == ("did not connect", [])
            await seen_by.close()

    asyncio.run(scenario())


def test_the_end_of_the_stream_closes_its_viewers() -> None:
    async def scenario() -> None:
        async with show() as on:
            _, seen_by = await on.seat()
            left = asyncio.Event()
            seen_by.on_closed = left.set
            on.stream.outlets.close()
            await asyncio.wait_for(left.wait(), PATIENCE)
            assert seen_by.reason == "the stream has ended"

    asyncio.run(scenario())


def test_a_codec_that_does_not_open_is_passed_over_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setitem(coder.ENCODERS, "h264", "no-such-encoder")
        async with show() as on:
            _, seen_by = await on.seat()
            assert seen_by.codec == "vp8"
            refused = Viewer(on.stream, on.encoders, CONFIGURATION)
            player = Player(codec="h264")
            on.players.append(player)
            with pytest.raises(sdp.Unusable, match="cannot encode h264"):
                await player.watch(refused)
            assert refused.state == "closed"
            await refused.close()

    asyncio.run(scenario())


async def offer_of(player: Player) -> str:
    await player.pc.setLocalDescription()
    text = str(player.pc.localDescription.sdp)
    await player.close()
    return text


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda text: "", sdp.Malformed),
        (lambda text: "hello", sdp.Malformed),
        (lambda text: text.replace("a=ice-ufrag", "a=x"), sdp.Malformed),
        (lambda text: text.replace("a=fingerprint", "a=x"), sdp.Malformed),
        (lambda text: text.replace("a=mid:1", "a=mid:0"), sdp.Malformed),
        (lambda text: text.replace("a=rtcp-mux", "a=x"), sdp.Malformed),
        (lambda text: text.replace("recvonly", "sendonly"), sdp.Unusable),
        (lambda text: text.replace("H264", "H265").replace("VP8", "VP9"), sdp.Unusable),
        (lambda text: text.replace("opus/48000", "speex/16000"), sdp.Unusable),
        (lambda text: text.replace("m=video", "m=text"), sdp.Unusable),
        (lambda text: text.replace("a=group:BUNDLE", "a=group:X"), sdp.Unusable),
    ],
)
def test_an_offer_that_cannot_be_served_is_refused_and_leaves_nothing(
    change: Callable[[str], str], error: type[Exception]
) -> None:
    async def scenario() -> None:
        stream = FakeStream()
        text = await offer_of(Player(sound=True))
        refused = Viewer(stream, Encoders(stream), CONFIGURATION)
        with pytest.raises(error):
            await refused.answer(change(text))
        await refused.close()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())


# what it costs


@asynccontextmanager
async def audience(on: Show, count: int) -> AsyncIterator[None]:
    """So many viewers in another process, who all see pictures."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.watching", str(count), cwd=ROOT, stdin=PIPE, stdout=PIPE, limit=2**20
    )
    assert child.stdin
    assert child.stdout
    try:
        for _ in range(count):
            offer = json.loads(await asyncio.wait_for(child.stdout.readline(), 3 * PATIENCE))
            on.viewers.append(Viewer(on.stream, on.encoders, CONFIGURATION))
            child.stdin.write(json.dumps(await on.viewers[-1].answer(offer)).encode() + b"\n")
        assert json.loads(await asyncio.wait_for(child.stdout.readline(), 3 * PATIENCE)) == "seen"
        yield
    finally:
        child.stdin.close()
        await asyncio.wait_for(child.wait(), PATIENCE)


async def cost_ms(on: Show, pictures: int) -> float:
    """CPU time of this process per encoded picture, all threads."""
    encoder = on.encoders.get("h264", 0)
    box = on.stream.outlets.subscribe(1)
    started, first = time.process_time(), encoder.frames
    while encoder.frames - first < pictures:
        await box.aget()
    box.close()
    return (time.process_time() - started) / (encoder.frames - first) * 1000


@in_a_quiet_moment
def test_three_viewers_cost_less_than_one_and_a_half(record_property: Callable[[str, object], None]) -> None:
    async def scenario() -> None:
        async with show((640, 360)) as on, audience(on, 1):
            one = await cost_ms(on, 75)
            async with audience(on, 2):
                three = await cost_ms(on, 75)
                assert on.stream.viewers == 3
        record_property("cpu_ms_per_picture", {"1 viewer": round(one, 2), "3 viewers": round(three, 2)})
        print(f"CPU per picture: {one:.2f} ms for one viewer, {three:.2f} ms for three")
        assert three < 1.5 * one

    asyncio.run(scenario())


# the rules


def test_another_aiortc_is_noticed() -> None:
    with pytest.raises(RuntimeError, match=r"no RTCRtpSender\._send_keyframe"):
        Feedback(object(), lambda: None)  # type: ignore[arg-type]


def reports(place: ladder.Place, count: int, start: float, **seen: Any) -> tuple[ladder.Place, float]:
    """`count` reports, one a second."""
    report = ladder.Report(**({"loss": 0.0, "estimate": None, "bitrate": 2_000_000, "overflowed": False} | seen))
    for i in range(count):
        place = ladder.step(place, report, start + i, 3)
    return place, start + count


def test_the_first_low_estimates_of_a_browser_are_ignored() -> None:
    assert reports(ladder.Place(), 60, 0.0, estimate=50_000)[0].rung == 0


def test_loss_with_a_low_estimate_or_much_loss_moves_down_after_some_seconds() -> None:
    low: dict[str, Any] = {"estimate": 400_000, "loss": 0.04}
    assert reports(ladder.Place(), 8, 0.0, **low)[0].rung == 0
    assert reports(ladder.Place(), 60, 0.0, **low)[0].rung == 3
    assert reports(ladder.Place(), 9, 0.0, **low)[0].rung == 1
    assert reports(ladder.Place(), 60, 0.0, loss=0.04)[0].rung == 0
    assert reports(ladder.Place(), 5, 0.0, loss=0.2)[0].rung == 1


def test_a_still_picture_with_some_loss_stays_whole() -> None:
    """A receiver cannot estimate more than it is sent."""
    assert reports(ladder.Place(), 60, 0.0, estimate=60_000, bitrate=50_000, loss=0.04)[0].rung == 0


def test_one_bad_second_does_nothing() -> None:
    place, now = reports(ladder.Place(), 10, 0.0)
    place, now = reports(place, 1, now, loss=0.5)
    assert reports(place, 30, now)[0].rung == 0


def test_a_queue_that_keeps_running_over_moves_down() -> None:
    assert reports(ladder.Place(), 4, 0.0, overflowed=True)[0].rung == 1


def test_a_clean_way_leads_up_again_and_each_failure_makes_that_slower() -> None:
    place, now = reports(ladder.Place(), 4, 0.0, loss=0.3)
    waits = []
    for _ in range(4):
        down = now
        while place.rung > 0:
            place, now = reports(place, 1, now)
        waits.append(now - down)
        while place.rung == 0:
            place, now = reports(place, 1, now, loss=0.3)
    assert waits == [11.0, 21.0, 41.0, 81.0]


def test_questions_of_the_page_are_answered_and_nonsense_is_not() -> None:
    clock = FakeClock(2.0)
    assert json.loads(timing.answer('{"ping": 1}', clock()) or "") == {"ping": 1, "now": 2000.0}
    for nonsense in (b"x", "x", "[]", "{}", '{"ping": "x"}', '{"ping": 1' + " " * 300 + "}", "[" * 150):
        assert timing.answer(nonsense, clock()) is None
