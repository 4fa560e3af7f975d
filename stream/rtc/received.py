"""A received video track as a source: pictures come from the event loop and are converted in the reader's thread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av

from accel.errors import UserError
from stream.fit import fit_size
from stream.frame import Frame, VideoSpec, to_us
from stream.mailbox import Fanout, Mailbox, MailboxClosed
from stream.source import Size, SourceChanged
from stream.sources.picture import Picture

TICK = Fraction(1, 90_000)  # s, of video over RTP
ASPECT = 0.03  # a change of aspect by more is another shape; less is how senders round when they scale down
JUMP_US = 1_000_000  # timestamps that go this much further than the clock are repaired by it
FPS = 30.0  # nominal; WebRTC does not say
OPEN_S = 15.0  # a publisher without any picture is closed before this


@dataclass(frozen=True, slots=True)
class Arrived:
    """One decoded picture of a track, not yet converted."""

    picture: av.VideoFrame
    seq: int  # as decoded
    captured: float  # time.monotonic() of its first packet, s


class Timeline:
    """Timestamps of a track in µs: from 0, always rising, the sender's distances where they are credible.

    >>> timeline = Timeline()
    >>> timeline(0, 10.0), timeline(3000, 10.035), timeline(2**32, 10.07)
    (0, 33333, 68333)
    """

    def __init__(self) -> None:
        self._origin: tuple[int, int] | None = None  # ticks, µs: where the sender's timestamps began to be credible
        self._last: tuple[float, int] | None = None  # captured, µs

    def __call__(self, ticks: int | None, captured: float) -> int:
        """The time of a picture by its RTP timestamp in 90 kHz and when it was captured, in s."""
        before, us = self._last or (captured, -1)
        waited = us + round((captured - before) * 1e6)
        told = None if ticks is None or not self._origin else to_us(ticks - self._origin[0], TICK) + self._origin[1]
        if told is None or told <= us or abs(told - waited) > JUMP_US:
            told = max(us + 1, waited)
            self._origin = None if ticks is None else (ticks, told)
        self._last = (captured, told)
        return told


def open_track(pictures: Fanout[Arrived], latest: Arrived | None, size: Size | None, fit: str) -> TrackSource:
    """The track's pictures from now on, `latest` among them; waits for the first one. Raises UserError without any."""
    box = pictures.subscribe(1)
    if latest is not None and not len(box):
        box.put(latest)
    try:
        return TrackSource(box, box.get(OPEN_S), size, fit)
    except (TimeoutError, MailboxClosed):
        box.close()
        raise UserError("the publisher left before its first picture", hint="is its camera on?") from None


class TrackSource:
    """Frames of one constant size out of a track's mailbox; raises SourceChanged when the pictures take another shape.

    A sender that scales down (WebRTC does, to save bits) keeps its shape and is scaled up again here.
    """

    def __init__(self, box: Mailbox[Arrived], first: Arrived, size: Size | None, fit: str) -> None:
        self.warnings: list[str] = []
        self.skipped = 0
        self._box, self._first, self._limits = box, first, (size, fit)
        self._picture = Picture(first.picture, None, size, fit)
        self.spec = VideoSpec(*self._picture.size, fps=FPS, live=True, native=self._picture.native)

    def frames(self) -> Iterator[Frame]:
        """The newest picture whenever one is asked for, until the publisher leaves."""
        timeline = Timeline()
        arrived = self._first
        while True:
            native = (arrived.picture.width, arrived.picture.height)
            if self._another_shape(native):
                raise SourceChanged(f"the pictures are {native[0]}x{native[1]} now")
            pts = timeline(arrived.picture.pts, arrived.captured)
            yield Frame(self._picture(arrived.picture), pts, arrived.seq - self._first.seq, arrived.captured)
            try:
                arrived = self._box.get()
            except MailboxClosed:
                return

    def close(self) -> None:
        """Take no more pictures; a reader that waits for one ends."""
        self._box.close(discard=True)

    def _another_shape(self, native: Size) -> bool:
        before = self._picture.native
        ratio = native[0] * before[1] / (native[1] * before[0])
        if 1 - ASPECT < ratio < 1 + ASPECT:
            return False
        size, fit = self._limits
        return size is None or fit_size(native, size, fit).size != self._picture.size
