"""aiortc's receive side, stock and ours, between two real peers; and what `install` checks and bounds."""

from __future__ import annotations

import asyncio
import logging
import queue
from collections.abc import Iterator
from statistics import median
from types import SimpleNamespace
from typing import Any

import aiortc
import pytest
from aiortc import rtcpeerconnection, rtcrtpreceiver, rtcrtpsender

from stream.rtc import tuning
from tests.fakes import in_a_quiet_moment
from tests.netns import an_address
from tests.rtc_loss import Loopback, at_random, every, gaps, lose, these
from tests.test_rtc_jitter import FakePacket, coded, content


@pytest.fixture(autouse=True)
def stock_again() -> Iterator[None]:
    yield
    tuning.uninstall()
    tuning._warned = False


@pytest.fixture
def network() -> Iterator[None]:
    with an_address() as there_is:
        if not there_is:
            pytest.skip("needs a network address")
        yield


@in_a_quiet_moment
def test_one_packet_lost_with_its_retransmissions_freezes_ours_shortly_and_the_stock_receiver_for_seconds(
    network: None,
) -> None:
    freezes = asyncio.run(_freezes())
    print({name: [round(freeze, 3) for freeze in values] for name, values in freezes.items()})
    assert median(freezes["ours"]) <= 0.25
    assert max(freezes["ours"]) <= 0.5  # with a busy machine's hiccup
    assert max(freezes["stock"]) > 1.5


async def _freezes() -> dict[str, list[float]]:
    """The longest time without a picture after each loss, at 1 Mb/s and 30 fps, both receivers at the same time."""
    assert tuning.install()
    async with Loopback() as ours:
        tuning.uninstall()
        async with Loopback() as stock:
            assert tuning.buffer_of(stock.receiver) is None
            await asyncio.gather(ours.frames(30), stock.frames(30))

            async def three_times() -> list[float]:
                longest = []
                for _ in range(3):
                    (moment,) = await ours.after_losing(these(5))
                    await ours.frames(30)
                    longest.append(max(gaps(ours.moments, moment)))
                return longest

            async def once() -> list[float]:
                (moment,) = await stock.after_losing(these(5))
                await stock.frames(60)
                return [max(gaps(stock.moments, moment))]

            return dict(zip(("ours", "stock"), await asyncio.gather(three_times(), once()), strict=True))


@pytest.mark.parametrize("codec", ["H264", "VP8"])
@in_a_quiet_moment
def test_lost_packets_that_are_sent_again_cost_no_picture(network: None, codec: str) -> None:
    async def run() -> None:
        assert tuning.install()
        async with Loopback(codec) as rig:
            await rig.frames(10)
            lost = lose(rig.sender, every(20, burst=2), retransmissions=False)
            await rig.frames(45)
            buffer = tuning.buffer_of(rig.receiver)
            assert buffer
            assert len(lost) >= 6
            assert buffer.nacked >= len(lost) - 2
            assert buffer.skipped <= 2  # none, but for a busy machine
            assert tuning.sending(rig.sender)
        assert not tuning.sending(rig.sender)

    asyncio.run(run())


def test_a_picture_keeps_coming_when_a_tenth_is_lost_for_good(network: None) -> None:
    async def run() -> None:
        assert tuning.install()
        async with Loopback() as rig:
            await rig.frames(10)
            lose(rig.sender, at_random(0.1, seed=1), retransmissions=True)
            await rig.frames(30)
            assert rig.asked

    asyncio.run(run())


def test_installing_twice_is_installing_once() -> None:
    assert tuning.install()
    assert tuning.install()
    assert rtcpeerconnection.RTCRtpReceiver is tuning.Receiver
    assert rtcrtpsender.RTP_HISTORY_SIZE == tuning.HISTORY
    tuning.uninstall()
    assert rtcpeerconnection.RTCRtpReceiver is rtcrtpreceiver.RTCRtpReceiver
    assert rtcrtpsender.RTP_HISTORY_SIZE == 128


@pytest.mark.parametrize("version", ["1.15.0", "1.17.0", "2.0.0"])
def test_another_aiortc_stays_as_it_is_with_one_warning(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(aiortc, "__version__", version)
    with caplog.at_level(logging.WARNING):
        assert not tuning.install()
        assert not tuning.install()
    assert len(caplog.records) == 1
    assert version in caplog.text
    assert rtcpeerconnection.RTCRtpReceiver is rtcrtpreceiver.RTCRtpReceiver


def test_changed_insides_are_noticed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(rtcrtpreceiver, "JitterBuffer", lambda **_: object())
    assert not tuning.install()
    assert "jitter_buffer" in caplog.text


def test_a_slow_reader_of_a_track_gets_the_newest_pictures_and_its_end() -> None:
    async def run() -> list[Any]:
        track = tuning.Track("video")
        for number in range(100):
            await track._queue.put(number)
        await track._queue.put(None)
        assert track._queue.dropped == 100 - tuning.DECODED["video"]  # type: ignore[attr-defined]
        return [track._queue.get_nowait() for _ in range(track._queue.qsize())]

    assert asyncio.run(run()) == [96, 97, 98, 99, None]


def test_a_decoder_that_falls_behind_goes_on_at_a_keyframe() -> None:
    async def run() -> None:
        receiver = tuning.Receiver("video", SimpleNamespace(state="new"))
        buffer = receiver.buffer
        assert buffer
        receiver._RTCRtpReceiver__codecs = {96: "codec"}  # type: ignore[attr-defined]
        receiver._RTCRtpReceiver__decoder_thread = object()  # type: ignore[attr-defined]
        waiting: queue.Queue[Any] = receiver._RTCRtpReceiver__decoder_queue  # type: ignore[attr-defined]

        def arrive(packets: list[FakePacket]) -> None:
            for packet in packets:
                buffer.add(packet, 50.0)
            for frame in buffer.release(50.0):
                receiver._decode(buffer, frame)

        *before, keyframe, after = coded([1] * 42, keys=[0, 40])
        for frame in before:
            arrive(frame)
        assert waiting.qsize() == tuning.UNDECODED
        assert receiver.undecoded == 40 - tuning.UNDECODED
        assert buffer.pli(50.0)
        arrive(keyframe)
        arrive(after)
        assert [waiting.get()[1].data for _ in range(waiting.qsize())] == [content(keyframe), content(after)]

    asyncio.run(run())


def test_a_timer_that_fires_when_the_peer_is_gone_does_nothing(network: None) -> None:
    async def run() -> None:
        assert tuning.install()
        async with Loopback() as rig:
            await rig.frames(5)
            await rig.after_losing(lambda n: n > 5)
            receiver = rig.receiver
        assert receiver._timer is None  # type: ignore[attr-defined]

    asyncio.run(run())
