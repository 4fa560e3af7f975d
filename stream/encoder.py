"""One encoder per stream, codec and rung, however many watch: its packets are handed to everyone."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, Literal, Protocol, TypeVar

from accel.errors import UserError
from stream.coder import Encoded, PictureCoder, Size, SoundCoder, nominal_bitrate, open_codec, scaled
from stream.encoded import CAPACITY, EncodedReader
from stream.frame import Frame
from stream.mailbox import Fanout, Mailbox
from stream.sound import Sound

log = logging.getLogger(__name__)

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

RUNGS = ((1, 1.0), (1, 0.5), (2, 0.25), (4, 0.125))  # what the sides are divided by; share of the whole one's bits
KEYFRAME_S = 0.5  # keyframes on request come no closer than this
SMOOTH = 0.05  # share of the newest picture in the mean time of one


class Streaming(Protocol):
    """What of a stream an encoder needs."""

    @property
    def outlets(self) -> Fanout[Frame]: ...
    @property
    def sound(self) -> Fanout[Sound]: ...
    @property
    def size(self) -> Size: ...
    @property
    def fps(self) -> float: ...
    def say(self, kind: Literal["error", "note"], text: str) -> None: ...


class Coder(Protocol[T_contra]):
    """Turns items into packets; raises UserError when it cannot."""

    def encode(self, item: T_contra, keyframe: bool, /) -> list[Encoded]: ...


class Encoder(Generic[T]):
    """Encodes the newest of what a fan-out gives, in a thread that lives while somebody reads.

    When the codec fails, its readers are told, `tell` is called, and the next one who comes starts it again.
    """

    def __init__(
        self,
        source: Fanout[T],
        coder: Callable[[], Coder[T]],
        name: str,
        *,
        capacity: int = 1,
        tell: Callable[[str], None] = lambda words: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.frames = self.keyframes = self.bytes = 0
        self.skipped = 0  # pictures that came while one was being encoded
        self.size: Size = (0, 0)
        self.encode_ms = 0.0  # mean of late
        self.error: UserError | None = None  # why it last stopped by itself
        self._source, self._coder, self._tell, self._clock, self._capacity = source, coder, tell, clock, capacity
        self._asked = False
        self._last_key = float("-inf")
        self._fresh: list[Encoded] = []  # since the last keyframe, while that is fresh
        self._readers: tuple[EncodedReader, ...] = ()
        self._box: Mailbox[T] | None = None
        self._lock = threading.Lock()

    @property
    def readers(self) -> int:
        """How many read; the encoder runs while there are any."""
        return len(self._readers)

    def subscribe(self, loop: asyncio.AbstractEventLoop) -> EncodedReader:
        """A reader of everything from a keyframe on: from the last one if that is fresh, else from the next one."""
        reader = EncodedReader(loop, self.keyframe, self.leave)
        with self._lock:
            if self._clock() - self._last_key < KEYFRAME_S:
                for encoded in self._fresh:
                    reader.put(encoded)
            if reader.peek() is None:
                self.keyframe()
            self._readers = (*self._readers, reader)
            if self._box is None:
                self.error = None
                self._box = self._source.subscribe(self._capacity, on_drop=self._skip)
                threading.Thread(target=self._run, args=(self._box,), name=f"encoder-{self.name}", daemon=True).start()
        return reader

    def leave(self, reader: EncodedReader) -> None:
        """Take a reader off; stops the thread after the last."""
        with self._lock:
            self._readers = tuple(other for other in self._readers if other is not reader)
            if not self._readers:
                self._stop()

    def keyframe(self) -> None:
        """Ask for a keyframe; requests within half a second are answered by one."""
        self._asked = True

    def _run(self, box: Mailbox[T]) -> None:
        error: UserError | None = None
        try:
            coder = self._coder()
            for item in box:
                self._encode(coder, item, box)
        except UserError as failure:
            error = failure
        except Exception:  # the isolation point: a codec that breaks ends its own viewers only
            log.exception("the encoder %s broke", self.name)
            error = UserError("the video encoder broke", hint="the server's log says how")
        with self._lock:
            if self._box is not box:
                return  # everybody left, and perhaps others came: theirs is another thread
            readers, self._readers, self.error = self._readers, (), error
            self._stop()
        for reader in readers:
            reader.end(error)
        if error:
            self._tell(str(error))

    def _encode(self, coder: Coder[T], item: T, box: Mailbox[T]) -> None:
        now = time.perf_counter()
        keyframe = self._asked and self._clock() - self._last_key >= KEYFRAME_S
        packets = coder.encode(item, keyframe)
        self.encode_ms += ((time.perf_counter() - now) * 1000 - self.encode_ms) * (SMOOTH if self.frames else 1.0)
        self.frames += 1
        with self._lock:
            if self._box is box:  # else these readers are not of this thread any more
                for encoded in packets:
                    self._hand(encoded)

    def _hand(self, encoded: Encoded) -> None:
        self.size = encoded.size
        self.bytes += encoded.packet.size
        if encoded.keyframe:
            self.keyframes += 1
            self._asked, self._last_key = False, self._clock()
            self._fresh = [encoded]
        elif self._fresh:
            # no more than half of a reader's queue: one who joins must not overflow at once
            self._fresh = [*self._fresh, encoded] if len(self._fresh) < CAPACITY // 2 else []
        for reader in self._readers:
            reader.put(encoded)

    def _stop(self) -> None:
        if self._box is not None:
            self._box.close(discard=True)
        self._box, self._fresh, self._asked, self._last_key = None, [], False, float("-inf")

    def _skip(self, count: int) -> None:
        self.skipped += count


class Encoders:
    """The encoders of one stream; each is made when first asked for, and runs while it has readers."""

    def __init__(self, stream: Streaming) -> None:
        self._stream = stream
        self._pictures: dict[tuple[str, int], Encoder[Frame]] = {}
        self.sound = Encoder[Sound](stream.sound, SoundCoder, "opus", capacity=8, tell=self._tell)

    def get(self, codec: str, rung: int) -> Encoder[Frame]:
        """The encoder of `codec` ("h264" or "vp8") at a rung: 0 is the best, each further one has half the bits."""
        stream, (scale, share) = self._stream, RUNGS[rung]
        if (codec, rung) not in self._pictures:
            self._pictures[codec, rung] = Encoder(
                stream.outlets,
                lambda: PictureCoder(codec, stream.fps, scale, share, self._note),
                f"{codec}-{rung}",
                tell=self._tell,
            )
        return self._pictures[codec, rung]

    def check(self, codec: str) -> None:
        """Open and drop an encoder of the stream's size, unless one has been running; raises UserError, and tells.

        Blocks for some milliseconds: not on an event loop.
        """
        encoder = self.get(codec, 0)
        if not encoder.frames or encoder.error:
            size, fps = scaled(self._stream.size, 1), max(1.0, self._stream.fps)
            try:
                open_codec(codec, size, fps, nominal_bitrate(size, fps))
            except UserError as error:
                self._tell(str(error))
                raise

    def stats(self) -> list[dict[str, Any]]:
        """What runs now, for metrics."""
        every: list[Encoder[Any]] = [*self._pictures.values(), self.sound]
        return [
            {
                "name": encoder.name,
                "size": list(encoder.size),
                "readers": encoder.readers,
                "frames": encoder.frames,
                "keyframes": encoder.keyframes,
                "skipped": encoder.skipped,
                "bytes": encoder.bytes,
                "encode_ms": round(encoder.encode_ms, 2),
            }
            for encoder in every
            if encoder.readers
        ]

    def _note(self, words: str) -> None:
        self._stream.say("note", words)  # it is on the terminal already

    def _tell(self, words: str) -> None:
        log.warning("%s", words)
        self._stream.say("error", words)
