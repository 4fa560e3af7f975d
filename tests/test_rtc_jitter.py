"""The jitter buffer, in simulated time: what it releases, when, and what it asks for."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.rtc.jitter import CAPACITY, DEADLINE_S, PLI_EVERY_S, CodedFrame, JitterBuffer, is_keyframe
from stream.rtc.losses import ROUND_S, TRIES

INTERVAL = 1 / 30  # s between two frames
TICKS = 3000  # the same in 90 kHz
START = b"\0\0\0\1"
KEY, DELTA = START + b"\x67\x42" + START + b"\x68\xce" + START + b"\x65\x88", START + b"\x41\x9a"


@dataclass
class FakePacket:
    sequence_number: int
    timestamp: int
    marker: int
    _data: bytes
    payload_type: int = 96


def coded(
    sizes: Iterable[int],
    *,
    seq: int = 1000,
    timestamp: int = 5000,
    keys: Iterable[int] = (0,),
    markers: bool = True,
) -> list[list[FakePacket]]:
    """Frames of so many packets each; every packet's data tells its frame and place."""
    frames, keyframes = [], set(keys)
    for index, size in enumerate(sizes):
        frame = []
        for place in range(size):
            head = (KEY if index in keyframes else DELTA) if place == 0 else b""
            data = head + f"<{index}.{place}>".encode()
            last = int(markers and place == size - 1)
            frame.append(FakePacket(seq & 0xFFFF, (timestamp + index * TICKS) & 0xFFFFFFFF, last, data))
            seq += 1
        frames.append(frame)
    return frames


def content(frame: list[FakePacket]) -> bytes:
    return b"".join(packet._data for packet in frame)


class Playback:
    """A buffer fed in simulated time; between packets it is looked after when it says so."""

    def __init__(self, buffer: JitterBuffer | None = None) -> None:
        self.buffer = buffer or JitterBuffer()
        self.now = 50.0
        self.released: list[tuple[float, CodedFrame]] = []
        self.nacks: list[tuple[float, list[int]]] = []
        self.plis: list[float] = []

    def give(self, *packets: FakePacket) -> Playback:
        for packet in packets:
            self.buffer.add(packet, self.now)
            self._look()
        return self

    def wait(self, seconds: float) -> Playback:
        until = self.now + seconds
        while (due := self.buffer.due(self.now)) is not None and self.now + due < until:
            assert due > 0
            self.now += due + 1e-9
            self._look()
        self.now = until
        return self

    def _look(self) -> None:
        assert self.buffer.depth <= CAPACITY
        self.released += [(self.now, frame) for frame in self.buffer.release(self.now)]
        if nacks := self.buffer.nacks(self.now):
            self.nacks.append((self.now, nacks))
        if self.buffer.pli(self.now):
            self.plis.append(self.now)

    @property
    def data(self) -> list[bytes]:
        return [frame.data for _, frame in self.released]


def test_a_frame_comes_out_with_its_last_packet() -> None:
    playback = Playback()
    for frame in coded([3, 1, 2]):
        playback.give(*frame[:-1])
        count = len(playback.released)
        playback.give(frame[-1])
        assert len(playback.released) == count + 1
        playback.wait(INTERVAL)
    assert [frame.timestamp for _, frame in playback.released] == [0, TICKS, 2 * TICKS]
    assert [frame.keyframe for _, frame in playback.released] == [True, False, False]
    assert not playback.nacks
    assert not playback.plis


def test_without_markers_a_frame_comes_out_with_the_next_ones_first_packet() -> None:
    frames = coded([3, 1, 2, 1], markers=False)
    playback = Playback().give(*frames[0])
    assert playback.data == []
    playback.give(frames[1][0])
    assert playback.data == [content(frames[0])]
    playback.give(*frames[2], *frames[3])
    assert playback.data == [content(frame) for frame in frames[:3]]


def test_a_marker_within_a_frame_is_believed_only_once() -> None:
    frames = coded([2] * 6)
    for frame in frames:
        frame[0].marker = 1
    playback = Playback().give(*[packet for frame in frames for packet in frame])
    assert playback.data[2:] == [content(frame) for frame in frames[1:-1]]
    assert b"".join(playback.data[:2]) == content(frames[0])


def test_sequence_numbers_and_timestamps_wrap() -> None:
    frames = coded([3] * 8, seq=65530, timestamp=2**32 - 2 * TICKS)
    order = [packet for frame in frames for packet in frame]
    order[5], order[7] = order[7], order[5]  # across the wrap of the sequence numbers
    playback = Playback().give(*order)
    assert playback.data == [content(frame) for frame in frames]
    assert [frame.timestamp for _, frame in playback.released] == [index * TICKS for index in range(8)]
    stamps = [playback.buffer.rtp_timestamp(index * TICKS) for index in range(8)]
    assert stamps == [frame[0].timestamp for frame in frames]


def test_pictures_in_coding_order_may_go_back_in_time() -> None:
    frames = coded([1, 1, 1])
    frames[1][0].timestamp, frames[2][0].timestamp = frames[2][0].timestamp, frames[1][0].timestamp
    playback = Playback().give(*[frame[0] for frame in frames])
    assert [frame.timestamp for _, frame in playback.released] == [0, 2 * TICKS, TICKS]


def test_duplicates_are_counted_and_dropped() -> None:
    frames = coded([2, 2])
    playback = Playback().give(frames[0][0], frames[0][0], frames[0][1], frames[0][1], *frames[1], frames[0][0])
    assert playback.data == [content(frame) for frame in frames]
    assert playback.buffer.late == 3


def test_the_very_first_packets_may_come_out_of_order() -> None:
    (frame,) = coded([4])
    playback = Playback().give(frame[2], frame[0], frame[3], frame[1])
    assert playback.data == [content(frame)]


def test_padding_is_no_picture_and_holds_nothing_up() -> None:
    frames = coded([1, 2, 1])
    padding = FakePacket(frames[1][0].sequence_number, frames[0][0].timestamp, 0, b"")
    for frame in frames[1:]:
        for packet in frame:
            packet.sequence_number += 1
    playback = Playback().give(*frames[0], padding, *frames[1], *frames[2])
    assert playback.data == [content(frame) for frame in frames]
    assert playback.buffer.released == 3


def test_a_missing_packet_is_asked_for_again_until_it_comes() -> None:
    frames = coded([1, 3, 1])
    lost = frames[1][1]
    playback = Playback().give(*frames[0], frames[1][0], frames[1][2]).wait(2.5 * ROUND_S)
    assert [round(at - 50.0, 3) for at, _ in playback.nacks] == [0.0, ROUND_S, 2 * ROUND_S]
    assert all(nack == [lost.sequence_number] for _, nack in playback.nacks)
    playback.give(lost, *frames[2])
    assert playback.data == [content(frame) for frame in frames]
    assert playback.buffer.skipped == 0


def test_requests_come_no_faster_than_retransmissions_take() -> None:
    buffer = JitterBuffer()
    playback = Playback(buffer)
    frames = coded([1, 3, 3])
    playback.give(*frames[0], frames[1][0], frames[1][2]).wait(0.050).give(frames[1][1])
    assert buffer.round_s == pytest.approx(0.075)
    count = len(playback.nacks)
    playback.give(frames[2][0], frames[2][2]).wait(0.074)
    assert len(playback.nacks) == count + 1
    assert not playback.plis  # that would be after the deadline: two rounds are longer
    playback.wait(0.047)
    assert len(playback.plis) == 1


def test_after_the_deadline_it_goes_on_with_the_next_complete_frame_and_wants_a_keyframe() -> None:
    frames = coded([1, 3, 2, 2], keys=[0])
    playback = Playback().give(*frames[0], frames[1][0], frames[1][2])
    noticed = playback.now
    playback.wait(INTERVAL).give(*frames[2]).wait(INTERVAL).give(*frames[3])
    assert len(playback.released) == 1
    playback.wait(1.0)
    assert playback.data[1:] == [content(frames[2]), content(frames[3])]
    assert playback.released[1][0] - noticed == pytest.approx(DEADLINE_S)
    assert playback.plis[0] - noticed == pytest.approx(2 * ROUND_S)
    assert playback.buffer.skipped == 1
    playback.give(frames[1][1])
    assert playback.buffer.late == 1


def test_a_frame_that_may_lack_its_first_packet_is_not_shown() -> None:
    frames = coded([1, 2, 2, 2])
    frames[1].pop()  # or was it the first packet of the next frame that was lost?
    playback = Playback().give(*frames[0], *frames[1], *frames[2], *frames[3]).wait(1.0)
    assert playback.data == [content(frames[0]), content(frames[3])]


def test_a_keyframe_further_on_ends_the_wait_at_once() -> None:
    frames = coded([1, 3, 2, 4, 1], keys=[0, 3])
    playback = Playback().give(*frames[0], frames[1][0], frames[1][2], *frames[2], *frames[3])
    assert len(playback.released) == 1  # for one round it might only be out of order
    noticed = playback.now
    playback.wait(0.5)
    assert playback.data[1:] == [content(frames[3])]
    assert playback.released[1][0] - noticed == pytest.approx(ROUND_S)
    assert playback.plis == []
    playback.give(*frames[4])
    assert playback.data[-1] == content(frames[4])


def test_a_keyframe_is_asked_for_until_one_comes() -> None:
    frames = coded([2] * 60, keys=[0, 50])
    playback = Playback().give(*frames[0], frames[1][0])
    for frame in frames[2:]:
        playback.give(*frame).wait(INTERVAL)
    spent = [at - 50.0 for at in playback.plis]
    assert spent[0] == pytest.approx(2 * ROUND_S, abs=INTERVAL)
    assert all(PLI_EVERY_S <= b - a < PLI_EVERY_S + 2 * INTERVAL for a, b in pairwise(spent))
    assert spent[-1] < 49 * INTERVAL


def test_nothing_is_asked_for_while_a_keyframe_is_on_its_way() -> None:
    frames = coded([2, 2, 2, 2, 40], keys=[0, 4])
    playback = Playback().give(*frames[0], frames[1][0], *frames[2], *frames[3]).wait(0.3)
    count = len(playback.plis)
    for packet in frames[4]:
        playback.give(packet).wait(0.02)
    assert len(playback.plis) == count
    assert playback.data[-1] == content(frames[4])


def test_a_stream_that_is_joined_in_the_middle_begins_at_a_keyframe() -> None:
    frames = coded([2, 2, 3, 2], keys=[2])
    playback = Playback()
    playback.give(frames[0][1], *frames[1]).wait(INTERVAL)
    assert playback.data == []
    playback.give(*frames[2], *frames[3])
    assert playback.data == [content(frames[2]), content(frames[3])]


def test_a_large_first_keyframe_that_comes_slowly_is_not_asked_for_again() -> None:
    playback = Playback()
    (frame,) = coded([60])
    for packet in frame:
        playback.give(packet).wait(0.01)
    assert playback.data == [content(frame)]
    assert playback.plis == []


def test_without_any_keyframe_the_decoder_gets_what_there_is_after_the_deadline() -> None:
    playback = Playback()
    frames = coded([2] * 12, keys=[])
    for frame in frames:
        playback.give(*frame).wait(INTERVAL)
    assert playback.released[0][0] - 50.0 == pytest.approx(DEADLINE_S, abs=INTERVAL)
    assert playback.data[-1] == content(frames[-1])
    assert playback.plis


def test_a_stray_packet_changes_nothing_but_two_in_sequence_are_another_start() -> None:
    frames = coded([2, 2, 2])
    again = coded([2, 2], seq=40_000, timestamp=77)
    playback = Playback().give(*frames[0], again[0][0], *frames[1])
    assert playback.data == [content(frame) for frame in frames[:2]]
    playback.give(*again[0], *again[1], *frames[2])
    assert playback.data[2:] == [content(frame) for frame in again]
    stamps = [frame.timestamp for _, frame in playback.released]
    assert stamps == sorted(stamps)
    assert stamps[-1] == 3 * TICKS


def test_a_long_outage_asks_for_a_keyframe_instead_of_hundreds_of_packets() -> None:
    frames = coded([2] * 200, keys=[0, 190])
    playback = Playback().give(*frames[0], *frames[150])
    assert playback.nacks == []
    assert playback.plis == [playback.now]
    playback.wait(0.04).give(*frames[190])
    assert playback.data[-1] == content(frames[190])


def test_nobody_is_asked_for_ever() -> None:
    frames = coded([1, 3])
    playback = Playback().give(*frames[0], frames[1][0], frames[1][2]).wait(60.0)
    assert len(playback.nacks) == TRIES


def test_a_frame_kept_from_the_decoder_makes_it_ask_for_a_keyframe() -> None:
    frames = coded([1, 1, 1], keys=[0, 2])
    playback = Playback().give(*frames[0])
    playback.buffer.break_off()
    playback.give(*frames[1])
    assert len(playback.plis) == 1
    playback.wait(1.0).give(*frames[2]).wait(1.0)
    assert len(playback.plis) == 1


@pytest.mark.parametrize(
    ("data", "keyframe"),
    [
        (KEY, True),
        (START + b"\x09\x10" + KEY, True),
        (START + b"\x06\x05" + START + b"\x65\x88", True),
        (DELTA, False),
        (START + b"\x06\x05" + DELTA, False),
        (START, False),
        (b"", False),
        (b"\x10\x02\x00\x9d\x01\x2a\x80\x02", True),
        (b"\x11\x02\x00\x9d\x01\x2a\x80\x02", False),
        (b"\x31\x0a\x00\x12", False),
    ],
)
def test_keyframes_are_told_by_their_first_bytes(data: bytes, keyframe: bool) -> None:
    assert is_keyframe(data) is keyframe


SIZES = st.lists(st.integers(1, 6), min_size=2, max_size=60)


@settings(max_examples=200, deadline=None)
@given(SIZES, st.data(), st.booleans(), st.sampled_from([1000, 65_500]))
def test_every_released_frame_is_complete_and_in_order(
    sizes: list[int], data: st.DataObject, markers: bool, seq: int
) -> None:
    keys = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    frames = coded(sizes, seq=seq, keys=keys | {0}, markers=markers)
    packets = [packet for frame in frames for packet in frame]
    dice = random.Random(data.draw(st.integers(0, 2**32)))
    loss, doubled, spread = data.draw(st.sampled_from([(0.0, 0.2, 5), (0.1, 0.0, 0), (0.3, 0.1, 20), (0.02, 0.02, 2)]))
    arrivals = [packet for packet in packets for _ in range(1 + (dice.random() < doubled)) if dice.random() >= loss]
    order = sorted(range(len(arrivals)), key=lambda index: index + dice.uniform(0, spread))
    playback = Playback()
    for index in order:
        playback.give(arrivals[index]).wait(dice.choice([0.0, 0.001, 0.03]))
    playback.wait(1.0)
    known = {content(frame): index for index, frame in enumerate(frames)}
    indices = [known[shown] for shown in playback.data]
    assert indices == sorted(set(indices))
    assert [frame.timestamp for _, frame in playback.released] == [(i - indices[0]) * TICKS for i in indices]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.sets(st.integers(0, 4), max_size=2)), min_size=3, max_size=60))
def test_no_complete_frame_waits_longer_than_the_deadline(plan: list[tuple[int, set[int]]]) -> None:
    frames = coded([size for size, _ in plan])
    playback = Playback()
    sound: list[tuple[float, bytes]] = []  # frames that came whole, with an end before them
    ended = False
    for frame, (size, lost) in zip(frames, plan, strict=True):
        playback.give(*[packet for place, packet in enumerate(frame) if place not in lost])
        if ended and not any(place < size for place in lost):
            sound.append((playback.now, content(frame)))
        ended = size - 1 not in lost
        playback.wait(INTERVAL)
    playback.wait(1.0)
    order = [content(frame) for frame in frames]
    shown = [(at, order.index(frame.data)) for at, frame in playback.released]
    for came, data in sound:
        index = order.index(data)
        assert any(at <= came + DEADLINE_S + 1e-6 for at, other in shown if other >= index)


@pytest.mark.parametrize("seed", range(5))
def test_with_one_packet_in_twenty_lost_and_one_retransmission_in_ten_nothing_stops_for_250_ms(seed: int) -> None:
    dice = random.Random(seed)
    buffer, now, asked = JitterBuffer(), 50.0, 0
    moments: list[float] = []
    sent: dict[int, FakePacket] = {}
    inbound: list[tuple[float, FakePacket]] = []
    keyframe, number = True, 0
    for tick in range(30 * 1000):  # 30 s in steps of 1 ms
        now = 50.0 + tick / 1000
        if tick % 33 == 0:
            size, keys = (8, [0]) if keyframe else (4, [])
            (frame,) = coded([size], seq=len(sent), timestamp=number * TICKS, keys=keys)
            arrives = now + 0.010 + dice.uniform(0, 0.004)
            keyframe, number = False, number + 1
            for packet in frame:
                sent[len(sent)] = packet
                if dice.random() >= 0.05:
                    inbound.append((arrives, packet))
        for arrival in [arrival for arrival in inbound if arrival[0] <= now]:
            inbound.remove(arrival)
            buffer.add(arrival[1], now)
        moments += [now for _ in buffer.release(now)]
        for seq in buffer.nacks(now):
            asked += 1
            if dice.random() >= 0.10:  # one of the request and the answer may be lost
                inbound.append((now + 0.020, sent[seq]))
        if buffer.pli(now) and dice.random() >= 0.05:
            keyframe = True
    pauses = [b - a for a, b in pairwise(moments)]
    assert max(pauses) < 0.25
    assert len(moments) >= 0.95 * number
    assert asked < 0.10 * len(sent)
