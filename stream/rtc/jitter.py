"""A jitter buffer for coded video that gives a frame out with its last packet and waits only so long for a lost one.

A picture held up by a missing packet goes on by the first of these that applies (RFC 3550 §5.1 for sequence numbers
and markers, RFC 4585 §6.2.1 and §6.3.1 for NACK and PLI; "round" is the time a retransmission takes, as measured):

    at once     the packet is asked for again, and again every round while it is missing
    1 round     a complete keyframe further on is shown at once
    2 rounds    a keyframe is asked for
    deadline    the next complete frame is shown, whatever it looks like, and a keyframe asked for until one comes

The last line is on purpose: publishers that take no notice of PLI send a keyframe every 1 to 10 s, and a smeared
picture is better than a still one for so long. Where PLI is heeded the keyframe is there before the deadline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from stream.rtc.losses import LIMIT, Losses

CAPACITY = 1024  # packets; one that lies further from the head is no neighbour
DEADLINE_S = 0.120
PLI_EVERY_S = 0.250
MISORDER = 100  # packets, RFC 3550 §A.1
CLOCK_JUMP = 10 * 90_000  # ticks; timestamps further apart than this are of two clocks
FRAME_TICKS = 3000  # 1/30 s


class Packet(Protocol):
    """What is used of `aiortc.rtp.RtpPacket`; `_data` is the payload without its RTP payload descriptor."""

    sequence_number: int
    timestamp: int
    marker: int
    payload_type: int
    _data: bytes


@dataclass(frozen=True, slots=True)
class CodedFrame:
    """A complete coded picture."""

    data: bytes  # H.264 with start codes (Annex B), or a VP8 frame
    timestamp: int  # 90 kHz ticks since the first frame; does not wrap
    payload_type: int
    keyframe: bool


class JitterBuffer:
    """RTP packets of one video stream in, complete frames in order out. Time is an argument, in seconds.

    After every `add`, and again in `due` seconds, take what there is: `release`, `nacks`, `pli`. At most `CAPACITY`
    packets are kept. Sequence numbers are counted on beyond 16 bits inside.

    >>> buffer.add(packet, now); frames = buffer.release(now); lost = buffer.nacks(now); pli = buffer.pli(now)
    """

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self.deadline_s = deadline_s
        self.released = 0  # frames
        self.skipped = 0  # frames passed over of which at least one packet had come
        self.late = 0  # packets that came twice, or after their frame had been released or skipped
        self.plis = 0
        self._packets: dict[int, Packet] = {}
        self._losses = Losses(deadline_s)
        self._head = 0  # the next packet that is wanted
        self._edge = 0  # from the head to here are packets of one frame
        self._high = -1  # the newest that has come
        self._started = False
        self._fresh = True  # nothing was released since the start: a frame need not begin at the head
        self._intact = False  # the decoder has every picture that the next one refers to
        self._held = False  # fresh, and complete frames wait for a keyframe
        self._news = False  # another frame may be complete since the last search beyond the head
        self._stage = 0  # at that search: of one round and the deadline, how many had passed
        self._blocked: float | None = None  # s, since when the picture is held up
        self._pli_at = float("-inf")
        self._stray: Packet | None = None
        self._markers = True  # the marker bit tells the end of a frame
        self._last: tuple[int, int] | None = None  # RTP timestamp of the last frame, and its ticks
        self._marked = False  # the last frame ended by its marker

    @property
    def depth(self) -> int:
        """Packets that wait here."""
        return len(self._packets)

    @property
    def round_s(self) -> float:
        """How long a retransmission takes, as measured, with a margin; s."""
        return self._losses.round_s

    @property
    def nacked(self) -> int:
        """Packets asked for, each time counted."""
        return self._losses.asked

    def add(self, packet: Packet, now: float) -> None:
        """Take in a packet; one that is late, or there already, is counted and dropped."""
        if not self._started:
            self._restart(packet, now)
        seq = self._count_on(packet.sequence_number)
        if abs(seq - self._head) >= CAPACITY:
            # A stray, or another start: as in RFC 3550 §A.1 two packets in sequence decide.
            stray, self._stray = self._stray, packet
            if stray is None or (stray.sequence_number + 1) & 0xFFFF != packet.sequence_number:
                return
            self._restart(stray, now)
            self.add(stray, now)
            seq = self._count_on(packet.sequence_number)
        self._stray = None
        if self._fresh and self._head - MISORDER < seq < self._head:  # the very first ones came out of order
            self._miss(seq + 1, self._head, now)
            self._head = self._edge = seq
            self._losses.move(seq)
        found = self._losses.find(seq, now)
        if seq < self._head or seq in self._packets:
            self.late += 1
            return
        before = self._packets.get(seq - 1)
        self._news |= bool(packet.marker) or found or before is None or before.timestamp != packet.timestamp
        self._packets[seq] = packet
        self._miss(self._high + 1, seq, now)
        self._high = max(self._high, seq)

    def release(self, now: float) -> list[CodedFrame]:
        """The frames that may be decoded now, in order."""
        frames = []
        while (span := self._choose(now)) is not None:
            frame = self._take(*span)
            if frame.data:  # not mere padding
                frames.append(frame)
        return frames

    def nacks(self, now: float) -> list[int]:
        """The sequence numbers to ask for now, ascending as 16-bit numbers."""
        return self._losses.ask(now)

    def pli(self, now: float) -> bool:
        """Whether to ask for a keyframe now; then not again for `PLI_EVERY_S`."""
        missing = self._losses.wanted()
        waited = self._blocked is not None and now - self._blocked >= min(2 * self.round_s, self.deadline_s)
        if self._fresh:
            wanted = waited and (self._held or bool(missing))
        elif self._intact:
            wanted = bool(missing) and (waited or len(missing) > LIMIT)
        else:
            wanted = bool(missing) or not self._keyframe_coming()
        if not wanted or now < self._pli_at + PLI_EVERY_S:
            return False
        self._pli_at = now
        self.plis += 1
        return True

    def due(self, now: float) -> float | None:
        """Seconds until there is something to do without another packet; None: nothing is missing."""
        missing = self._losses.wanted()
        if self._blocked is None or not (missing or self._held):
            return None
        times = self._losses.times()
        times += [self._blocked + wait for wait in (self.round_s, 2 * self.round_s, self.deadline_s)]
        times.append(self._pli_at + PLI_EVERY_S)
        return min((time - now for time in times if time > now), default=None)

    def rtp_timestamp(self, ticks: int) -> int | None:
        """The RTP timestamp of a frame that was released with these ticks; None before the first."""
        return None if self._last is None else (self._last[0] + ticks - self._last[1]) & 0xFFFFFFFF

    def break_off(self) -> None:
        """A released frame did not reach the decoder: ask for a keyframe until one is released."""
        self._intact = False

    def _restart(self, packet: Packet, now: float) -> None:
        self.skipped += _pictures(self._packets.values())
        self._packets.clear()
        self._losses.clear()
        self._losses.move(packet.sequence_number)
        self._head = self._edge = packet.sequence_number
        self._high = self._head - 1
        self._started = self._fresh = True
        self._intact = self._marked = False
        self._blocked = now

    def _count_on(self, sequence_number: int) -> int:
        """The number beyond 16 bits that is nearest to the newest one."""
        return self._high + (sequence_number - self._high + 0x8000) % 0x10000 - 0x8000

    def _miss(self, first: int, end: int, now: float) -> None:
        self._losses.lose(first, end, now)
        if first < end and self._blocked is None:
            self._blocked = now

    def _ends(self, seq: int) -> bool:
        """Whether this packet, which is there, is known to be the last of its frame."""
        packet, after = self._packets[seq], self._packets.get(seq + 1)
        if packet.marker and self._markers:
            return True
        return after is not None and after.timestamp != packet.timestamp

    def _front(self) -> tuple[int, int] | None:
        """The frame at the head once it is complete, as [first, end)."""
        while self._edge in self._packets:
            if self._ends(self._edge):
                return self._head, self._edge + 1
            if self._edge + 1 not in self._packets:
                return None
            self._edge += 1
        return None

    def _complete(self) -> Iterator[tuple[int, int]]:
        """Every frame that is there from its first packet to its last, in order."""
        first: int | None = self._head
        for seq in range(self._head, self._high + 1):
            if seq not in self._packets:
                first = None
                continue
            if first is None and _opening(self._packets[seq]._data) == 7:  # nothing of a frame comes before that
                first = seq
            if self._ends(seq):
                if first is not None:
                    yield first, seq + 1
                first = seq + 1

    def _choose(self, now: float) -> tuple[int, int] | None:
        """The frame to release now; see the table on top."""
        front = self._front()
        if front and (not self._fresh or is_keyframe(data := self._data(*front)) or not data):
            return front
        waited = 0.0 if self._blocked is None else now - self._blocked
        stage = (waited >= self.round_s) + (waited >= self.deadline_s)
        if not self._news and stage == self._stage:
            return None
        self._news, self._stage = False, stage
        return self._beyond(stage) if front or self._losses.wanted() else None

    def _beyond(self, stage: int) -> tuple[int, int] | None:
        """The frame to jump to after so many of one round and the deadline have passed."""
        fallback = None
        self._held = False
        for first, end in self._complete():
            if is_keyframe(self._data(first, end)) and (stage >= 1 or not self._intact):
                return first, end
            self._held = self._fresh
            if first != self._head:
                fallback = fallback or (first, end)
        return fallback if stage == 2 else None

    def _take(self, first: int, end: int) -> CodedFrame:
        packet, data = self._packets[first], self._data(first, end)
        keyframe = is_keyframe(data)
        passed = [self._packets.pop(seq) for seq in range(self._head, first) if seq in self._packets]
        self.skipped += _pictures(passed)
        if keyframe:
            self._intact = True
        elif first > self._head:
            self._intact = False
        if data:
            # A frame in two parts that both ended by a marker: this sender's markers tell nothing (RFC 6184 §5.1).
            if self._marked and self._last and self._last[0] == packet.timestamp:
                self._markers = False
            self._marked = bool(self._packets[end - 1].marker)
            self._last = (packet.timestamp, self._ticks(packet.timestamp))
            self._fresh = False
            self.released += 1
        for seq in range(first, end):
            del self._packets[seq]
        self._head = self._edge = end
        self._news = True
        self._losses.move(end)
        if not self._fresh:
            self._blocked = self._losses.since()
        return CodedFrame(data, self._last[1] if self._last else 0, packet.payload_type, keyframe)

    def _data(self, first: int, end: int) -> bytes:
        return b"".join([self._packets[seq]._data for seq in range(first, end)])

    def _ticks(self, timestamp: int) -> int:
        if self._last is None:
            return 0
        step = (timestamp - self._last[0] + 0x80000000) % 0x100000000 - 0x80000000
        another = abs(step) >= CLOCK_JUMP or (self._fresh and step <= 0)
        return self._last[1] + (FRAME_TICKS if another else step)

    def _keyframe_coming(self) -> bool:
        return any(is_keyframe(packet._data) for packet in self._packets.values())


def is_keyframe(data: bytes) -> bool:
    """Whether a VP8 frame, or H.264 with start codes, can be decoded without the pictures before it.

    H.264: its first slice is an IDR, or an SPS comes before it (RFC 6184 §5.2). VP8: the start code that only keyframes
    have (RFC 6386 §9.1). A VP8 frame never begins with an H.264 start code: its first partition would be empty.
    """
    return _opening(data) in (5, 7)


def _opening(data: bytes) -> int:
    """The type of the first slice or SPS in it, 0 without one; 7 also for the start of a VP8 keyframe."""
    if not data.startswith(b"\0\0\0\1"):
        return 7 if len(data) > 5 and not data[0] & 1 and data[3:6] == b"\x9d\x01\x2a" else 0
    position = 0
    while (position := data.find(b"\0\0\1", position) + 3) > 2 and position < len(data):
        kind = data[position] & 0x1F
        if 1 <= kind <= 5 or kind == 7:
            return kind
    return 0


def _pictures(packets: Iterable[Packet]) -> int:
    return len({packet.timestamp for packet in packets})
