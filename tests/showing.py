"""A fake live stream for encoders and viewers: a moving picture at its own pace, or frame by frame."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

from stream.coder import Encoded
from stream.frame import Frame
from stream.mailbox import Fanout
from stream.sound import Sound, sound_of
from tests.scenes import texture

SIZE = (320, 176)


class FakeStream:
    """As much of `stream.live.Stream` as viewers use."""

    def __init__(self, size: tuple[int, int] = SIZE, fps: float = 30.0, *, seed: int = 0) -> None:
        self.name = "cam"
        self.outlets = Fanout[Frame]()
        self.sound = Fanout[Sound]()
        self.size, self.fps = size, fps
        self.viewers = 0
        self.put_count = 0
        self.paused = False
        self.said: list[str] = []
        self.images = moving(size, seed)

    def say(self, kind: str, text: str) -> None:
        """What a stream tells whoever listens."""
        self.said.append(f"{kind}: {text}")

    def put(self, captured: float | None = None) -> Frame:
        """Give out the next picture."""
        image = self.images[self.put_count % len(self.images)]
        now = time.monotonic() if captured is None else captured
        frame = Frame(image, int(now * 1e6), self.put_count, now)
        self.put_count += 1
        self.outlets.put(frame)
        return frame

    def hum(self, captured: float) -> Sound:
        """Give out 20 ms of a tone."""
        t = captured + np.arange(960) / 48_000
        tone = (8000 * np.sin(2 * np.pi * 440 * t)).astype(np.int16)
        sound = sound_of(np.stack([tone, tone], axis=1), captured)
        self.sound.put(sound)
        return sound

    @contextmanager
    def playing(self, sounding: bool = False) -> Iterator[FakeStream]:
        """Pictures, and where asked for sound, at their own pace while inside."""
        stop = threading.Event()

        def play() -> None:
            started, pictures, pieces = time.monotonic(), 0, 0
            while not stop.wait(max(0.0, started + pictures / self.fps - time.monotonic())):
                if not self.paused:
                    self.put()
                pictures += 1
                while sounding and pieces < pictures / self.fps * 50:
                    self.hum(time.monotonic())
                    pieces += 1

        thread = threading.Thread(target=play, name="fake-stream")
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()


def moving(size: tuple[int, int], seed: int = 0, count: int = 20) -> list[NDArray[np.uint8]]:
    """A painting-like texture that slides there and back, without end when repeated."""
    width, height = size
    wide = texture(seed, (width + 3 * count, height + 2 * count), blur=4.0)
    there = [wide[2 * i : 2 * i + height, 3 * i : 3 * i + width].copy() for i in range(count)]
    return [*there, *there[-2:0:-1]]


def decode(packets: Sequence[Encoded], codec: str = "h264") -> list[av.VideoFrame]:
    """What a viewer sees of these packets."""
    decoder = av.CodecContext.create({"h264": "h264", "vp8": "libvpx"}[codec], "r")
    shown: list[av.VideoFrame] = []
    for encoded in packets:
        packet = av.Packet(bytes(encoded.packet))
        packet.pts, packet.time_base = encoded.packet.pts, Fraction(1, 90_000)
        shown += decoder.decode(packet)  # type: ignore[arg-type]
    return [*shown, *decoder.decode(None)]  # type: ignore[list-item]
