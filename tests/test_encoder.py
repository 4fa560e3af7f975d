"""One encoder for many viewers: what it makes, when it makes keyframes, and who loses what."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import av
import numpy as np
import pytest

from accel.errors import UserError
from stream import coder
from stream.coder import Encoded, PictureCoder, SoundCoder, nominal_bitrate, scaled, yuv420
from stream.encoded import CAPACITY, EncodedReader
from stream.encoder import KEYFRAME_S, RUNGS, Encoder, Encoders
from stream.frame import Frame
from stream.mailbox import MailboxClosed
from tests.fakes import PATIENCE, FakeClock
from tests.media import bars, bars_error
from tests.scenes import psnr
from tests.showing import FakeStream, decode, moving

CODECS = ("h264", "vp8")


def frames(count: int, size: tuple[int, int] = (320, 176), fps: float = 30.0, start: float = 50.0) -> list[Frame]:
    images = moving(size)
    return [Frame(images[i % len(images)], 0, i, start + i / fps) for i in range(count)]


def encode(pictures: list[Frame], codec: str = "h264", scale: int = 1) -> list[Encoded]:
    maker = PictureCoder(codec, 30.0, scale)
    return [encoded for picture in pictures for encoded in maker.encode(picture, False)]


@pytest.mark.parametrize("codec", CODECS)
def test_pictures_come_back_as_they_were(codec: str) -> None:
    pictures = frames(12)
    packets = encode(pictures, codec)
    assert [encoded.keyframe for encoded in packets] == [True] + [False] * 11
    shown = decode(packets, codec)
    assert len(shown) == 12
    for picture, seen in zip(pictures, shown, strict=True):
        assert psnr(seen.to_ndarray(format="rgb24"), picture.image) > 30


@pytest.mark.parametrize("codec", CODECS)
def test_colours_survive_where_bt601_is_assumed(codec: str) -> None:
    packets = encode([Frame(bars(320, 176), 0, i, i / 30) for i in range(3)], codec)
    last = decode(packets, codec)[-1]
    assert bars_error(last.to_ndarray(format="rgb24")) < 12
    if codec == "h264":  # VP8 has no way to say so
        assert (last.colorspace, last.color_range) == (6, 1)  # SMPTE 170M, limited


def test_conversion_is_no_worse_than_swscale() -> None:
    image = moving((320, 176))[0]
    ours = av.VideoFrame.from_ndarray(yuv420(image, (320, 176)), "yuv420p").to_ndarray(format="rgb24")
    swscale = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuv420p").to_ndarray(format="rgb24")
    assert psnr(ours, image) > psnr(swscale, image) - 0.1


@pytest.mark.parametrize("codec", CODECS)
def test_pts_are_times_of_capture_and_always_grow(codec: str) -> None:
    times = [10.0, 10.04, 10.04, 9.0, 10.2]
    pictures = [Frame(picture.image, 0, 0, at) for picture, at in zip(frames(5), times, strict=True)]
    packets = encode(pictures, codec)
    assert [encoded.packet.pts for encoded in packets] == [900_000, 903_600, 903_690, 903_780, 918_000]
    assert [encoded.captured for encoded in packets] == times


@pytest.mark.parametrize("codec", CODECS)
def test_another_size_opens_anew_with_a_keyframe(codec: str) -> None:
    packets = encode(frames(3) + frames(3, (192, 256), start=60.0), codec)
    assert [encoded.keyframe for encoded in packets] == [True, False, False, True, False, False]
    assert packets[-1].size == (192, 256)
    assert [(seen.width, seen.height) for seen in decode(packets, codec)] == [(320, 176)] * 3 + [(192, 256)] * 3


@pytest.mark.parametrize(("scale", "size"), [(2, (160, 88)), (4, (80, 44))])
def test_a_lower_rung_is_a_smaller_picture(scale: int, size: tuple[int, int]) -> None:
    packets = encode(frames(2), scale=scale)
    assert packets[0].size == size
    assert (decode(packets)[0].width, decode(packets)[0].height) == size


def test_sizes_and_bitrates() -> None:
    assert scaled((321, 181), 1) == (320, 180)
    assert scaled((36, 20), 4) == (16, 16)
    rates = [nominal_bitrate(size, 30) for size in ((64, 48), (512, 288), (640, 360), (1280, 720), (7680, 4320))]
    assert rates == sorted(rates)
    assert (rates[0], rates[2], rates[-1]) == (150_000, 2_000_000, 10_000_000)


def test_each_rung_has_half_the_bits_of_the_one_above() -> None:
    pictures = frames(60)
    sizes = []
    for scale, share in RUNGS:
        maker = PictureCoder("h264", 30.0, scale, share)
        packets = [encoded for picture in pictures for encoded in maker.encode(picture, False)]
        sizes.append(sum(encoded.packet.size for encoded in packets[30:]))
    assert all(0.35 < low / high < 0.7 for high, low in pairwise(sizes))


def test_odd_pictures_lose_a_row_not_the_stream() -> None:
    image = moving((323, 181))[0]
    (encoded,) = PictureCoder("h264", 30.0).encode(Frame(image, 0, 0, 1.0), False)
    assert encoded.size == (322, 180)


def test_sound_comes_back_in_unbroken_time() -> None:
    clock, stream = FakeClock(20.0), FakeStream()
    maker = SoundCoder(clock)
    packets = []
    for late in (0.0, 0.015, 0.0, 0.01, 0.0, 5.0, 5.0):  # s that the piece comes late
        clock.now = 20.0 + len(packets) * 0.02 + late
        packets += maker.encode(stream.hum(clock.now), False)
    pts = [encoded.packet.pts or 0 for encoded in packets]
    assert np.diff(pts).tolist() == [960] * 4 + [240_960, 960]
    decoder = av.CodecContext.create("libopus", "r")
    heard = np.concatenate(
        [f.to_ndarray().ravel() for e in packets for f in decoder.decode(av.Packet(bytes(e.packet)))]
    )
    assert 3000 < np.abs(heard.astype(float)).max() < 12_000


# the encoder: a thread and its readers


class Bench:
    """An encoder under test, fed frame by frame."""

    def __init__(self, codec: str = "h264") -> None:
        self.stream, self.clock = FakeStream(), FakeClock()
        self.said: list[str] = []
        self.encoder = Encoder[Frame](
            self.stream.outlets, lambda: PictureCoder(codec, 30.0), "bench", tell=self.said.append, clock=self.clock
        )

    def join(self) -> EncodedReader:
        return self.encoder.subscribe(asyncio.get_running_loop())

    async def turn(self, *readers: EncodedReader, dt: float = 1 / 30) -> list[Encoded]:
        """One more picture, and what each reader gets of it."""
        self.clock.advance(dt)
        self.stream.put(self.clock())
        return [await asyncio.wait_for(reader.get(), PATIENCE) for reader in readers]


@asynccontextmanager
async def bench(codec: str = "h264") -> AsyncIterator[Bench]:
    """A bench that leaves no thread behind."""
    made = Bench(codec)
    try:
        yield made
    finally:
        made.stream.outlets.close()
        await asyncio.to_thread(gone)


def gone() -> None:
    """Wait for every encoder's thread to end."""
    for thread in threading.enumerate():
        if thread.name.startswith("encoder-"):
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_a_picture_is_encoded_once_for_all() -> None:
    async def scenario() -> None:
        async with bench() as on:
            readers = [on.join() for _ in range(3)]
            for _ in range(4):
                first, second, third = await on.turn(*readers)
                assert first is second is third
            assert on.encoder.frames == 4

    asyncio.run(scenario())


def test_it_runs_while_somebody_reads() -> None:
    async def scenario() -> None:
        async with bench() as on:
            assert len(on.stream.outlets) == 0
            one, two = on.join(), on.join()
            await on.turn(one, two)
            assert len(on.stream.outlets) == 1
            one.close()
            await on.turn(two)
            two.close()
            await asyncio.to_thread(gone)
            assert len(on.stream.outlets) == 0
            with pytest.raises(MailboxClosed):
                await one.get()
            again = on.join()
            (encoded,) = await on.turn(again)
            assert encoded.keyframe

    asyncio.run(scenario())


def test_requests_within_half_a_second_give_one_keyframe() -> None:
    async def scenario() -> None:
        async with bench() as on:
            reader = on.join()
            keys = []
            for i in range(60):  # 2 s
                on.encoder.keyframe()
                (encoded,) = await on.turn(reader)
                keys += [i] if encoded.keyframe else []
            assert len(keys) == 4
            assert np.diff(keys).min() >= KEYFRAME_S * 30

    asyncio.run(scenario())


def test_a_keyframe_comes_with_the_next_picture() -> None:
    async def scenario() -> None:
        async with bench("vp8") as on:
            reader = on.join()
            await on.turn(reader)
            assert not (await on.turn(reader, dt=1.0))[0].keyframe
            on.encoder.keyframe()
            assert (await on.turn(reader))[0].keyframe
            assert not (await on.turn(reader))[0].keyframe

    asyncio.run(scenario())


def test_who_joins_soon_after_a_keyframe_starts_from_it() -> None:
    async def scenario() -> None:
        async with bench() as on:
            first = on.join()
            sent = [(await on.turn(first))[0] for _ in range(5)]
            late = on.join()
            assert [await late.get() for _ in range(5)] == sent
            assert not (await on.turn(first, late))[0].keyframe

    asyncio.run(scenario())


def test_who_joins_later_gets_a_keyframe_of_their_own() -> None:
    async def scenario() -> None:
        async with bench() as on:
            first = on.join()
            await on.turn(first)
            on.clock.advance(2.0)
            late = on.join()
            assert late.peek() is None
            one, other = await on.turn(first, late)
            assert one is other
            assert one.keyframe

    asyncio.run(scenario())


def test_who_never_reads_loses_alone_and_starts_again_at_a_keyframe() -> None:
    async def scenario() -> None:
        async with bench() as on:
            reader, stuck = on.join(), on.join()
            seen = [(await on.turn(reader))[0] for _ in range(CAPACITY + 25)]
            assert len(seen) == CAPACITY + 25
            assert (reader.dropped, stuck.overflows) == (0, 1)
            resumed = stuck.peek()
            assert resumed
            assert resumed.keyframe
            assert stuck.dropped >= CAPACITY
            rest = [await stuck.get() for _ in range(len(seen) - stuck.dropped)]
            assert rest == seen[stuck.dropped :]
            assert len(decode(rest)) == len(rest)

    asyncio.run(scenario())


def test_an_encoder_that_cannot_open_tells_its_readers_and_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with bench() as on:
            with monkeypatch.context() as broken:
                broken.setitem(coder.ENCODERS, "h264", "no-such-encoder")
                reader = on.join()
                with pytest.raises(UserError, match="cannot encode h264"):
                    await on.turn(reader)
                await asyncio.to_thread(gone)
                assert (on.encoder.readers, len(on.stream.outlets)) == (0, 0)
                assert "cannot encode h264" in on.said[0]
            assert (await on.turn(on.join()))[0].keyframe

    asyncio.run(scenario())


def test_a_codec_that_breaks_in_the_middle_ends_its_readers_only() -> None:
    class Broken:
        def encode(self, item: Frame, keyframe: bool) -> list[Encoded]:
            raise ArithmeticError("boom")

    async def scenario() -> None:
        async with bench() as on:
            broken = Encoder[Frame](on.stream.outlets, Broken, "broken")
            bad, good = broken.subscribe(asyncio.get_running_loop()), on.join()
            await on.turn(good)
            with pytest.raises(UserError, match="broke"):
                await asyncio.wait_for(bad.get(), PATIENCE)
            await on.turn(good)

    asyncio.run(scenario())


def test_the_end_of_the_stream_ends_its_readers() -> None:
    async def scenario() -> None:
        async with bench() as on:
            reader = on.join()
            await on.turn(reader)
            on.stream.outlets.close()
            with pytest.raises(MailboxClosed):
                await asyncio.wait_for(reader.get(), PATIENCE)

    asyncio.run(scenario())


def test_encoders_are_shared_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = FakeStream()
    encoders = Encoders(stream)
    assert encoders.get("h264", 1) is encoders.get("h264", 1)
    assert encoders.get("h264", 1) is not encoders.get("vp8", 1)
    assert encoders.stats() == []
    encoders.check("h264")
    monkeypatch.setitem(coder.ENCODERS, "vp8", "no-such-encoder")
    with pytest.raises(UserError, match="vp8"):
        encoders.check("vp8")
    assert "cannot encode vp8" in stream.said[0]


def test_the_sound_of_a_stream_is_encoded_once() -> None:
    async def scenario() -> None:
        stream = FakeStream()
        encoders = Encoders(stream)
        one, two = (encoders.sound.subscribe(asyncio.get_running_loop()) for _ in range(2))
        for i in range(5):
            stream.hum(i * 0.02)
            assert await asyncio.wait_for(one.get(), PATIENCE) is await asyncio.wait_for(two.get(), PATIENCE)
        stream.sound.close()
        await asyncio.to_thread(gone)

    asyncio.run(scenario())
