"""Sound in 20 ms pieces, cut to measure, and held back until the pictures of the same moment leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

RATE = 48_000  # samples per second and channel
SAMPLES = 960  # per piece
PIECE_S = SAMPLES / RATE
TICK = Fraction(1, RATE)

TOLERANCE_S = 0.06  # a time of capture this near to where the sound before ended is jitter, not a gap
RESTART_S = 1.0  # sound that goes back further than this is a new beginning
DRIFT = 0.02  # how much one piece's time of capture moves the estimate of when sound was captured
SLEW = 0.01  # s per s: how fast the delay changes; a change of tempo by 1 % is not heard
DEAD_S = 0.004  # a delay this near to the wanted one is left alone, and the samples untouched
SPARE_S = 0.01  # added where sound has come too late
FORGIVING = 0.001  # s per s by which that is taken back
JUMP_S = 0.5  # a delay further off than this is corrected at once


@dataclass(frozen=True, slots=True)
class Sound:
    """20 ms of sound: 960 samples, 48 kHz, stereo, s16 interleaved. The frame has no pts of its own; never mutated."""

    frame: av.AudioFrame
    captured: float  # time.monotonic() when its first sample reached us, s


def samples_of(sound: Sound) -> NDArray[np.int16]:
    """(960, 2) samples."""
    return sound.frame.to_ndarray().reshape(-1, 2).astype(np.int16, copy=False)


def sound_of(samples: NDArray[np.int16], captured: float) -> Sound:
    """A piece from (960, 2) samples."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples).reshape(1, -1), format="s16", layout="stereo")
    frame.sample_rate, frame.time_base = RATE, TICK
    return Sound(frame, captured)


class Cutter:
    """Resamples decoded audio of any kind and cuts it into `Sound`s.

    >>> cutter = Cutter()
    >>> [piece.captured for piece in cutter.put(decoded, captured=12.0)]
    [12.0]
    """

    def __init__(self) -> None:
        self._resampler = av.AudioResampler(format="s16", layout="stereo", rate=RATE)
        self._rest = np.zeros((0, 2), np.int16)
        self._ends = 0.0  # time of capture of what comes next

    def put(self, frame: av.AudioFrame, captured: float) -> list[Sound]:
        """The whole pieces there are now; `captured` is the time of the frame's first sample. A change of rate or
        layout in mid-stream is taken as it comes."""
        frame.pts = None
        try:
            resampled = self._resampler.resample(frame)
        except ValueError:  # PyAV's resampler refuses another format than the first
            self._resampler = av.AudioResampler(format="s16", layout="stereo", rate=RATE)
            resampled = self._resampler.resample(frame)
        new = [piece.to_ndarray().reshape(-1, 2) for piece in resampled]
        if abs(captured - self._ends) > TOLERANCE_S:
            self._rest = self._rest[:0]  # too short to be missed
        started = captured - len(self._rest) / RATE
        samples = np.concatenate([self._rest, *new])
        whole = len(samples) // SAMPLES
        self._rest = samples[whole * SAMPLES :]
        self._ends = started + len(samples) / RATE
        return [sound_of(samples[i * SAMPLES : (i + 1) * SAMPLES], started + i * PIECE_S) for i in range(whole)]


class Delay:
    """Holds sound back by the latency of the pictures, and gives it out as an unbroken row of pieces.

    `due` gives the pieces whose time to leave has come; what was never captured is silence. The delay follows the
    latency by 10 ms per second at most, by playing up to 1 % faster or slower; so it also takes up the drift between
    the sender's clock and ours. Holds `most_s` at most; what is older is dropped and counted. Pure: times in s are
    arguments; not thread-safe.

    >>> delay = Delay()
    >>> delay.put(piece); delay.due(now=10.12, latency=0.12)
    """

    def __init__(self, most_s: float = 2.0) -> None:
        self.dropped = 0  # pieces that came twice, or waited too long
        self.silences = 0  # pieces that went out with nothing in them
        self.delay: float | None = None  # s that sound is being held back now
        self._most = most_s
        self._least = 0.0  # s; the sound itself takes so long to come
        self._pieces: deque[NDArray[np.int16]] = deque()
        self._held = 0  # samples in `_pieces`
        self._read = 0.0  # sample of the first piece where the next one to leave begins
        self._origin = 0.0  # time of capture of the first piece's first sample
        self._next: float | None = None  # when the next piece leaves

    def put(self, sound: Sound) -> None:
        """Take a piece in, at the place its time of capture says."""
        away = sound.captured - self._ends if self._pieces else 0.0
        if not self._pieces or away < -RESTART_S or away > self._most:
            self._restart(sound.captured)
        elif away < -TOLERANCE_S:
            self.dropped += 1
            return
        elif away > TOLERANCE_S:
            self._append(np.zeros((round(away * RATE), 2), np.int16))
        else:
            self._origin += away * DRIFT
        self._append(samples_of(sound))
        self._wait_for_late()
        while self._held > self._most * RATE and len(self._pieces) > 1:
            self.dropped += 1
            self._drop_first()

    def due(self, now: float, latency: float) -> list[Sound]:
        """The pieces that leave up to `now`, where pictures leave `latency` seconds after their capture."""
        return list(self._leave(now, latency))

    def _leave(self, now: float, latency: float) -> Iterator[Sound]:
        if self._next is None or now - self._next > self._most:
            if not self._pieces or now < self._origin + latency:
                return
            self._next = now
            self._read = (now - latency - self._origin) * RATE
        while self._next <= now:
            self._least -= FORGIVING * PIECE_S
            wanted = (self._next - max(latency, self._least) - self._origin) * RATE
            off = (wanted - self._read) / RATE  # positive: we are behind
            if abs(off) > JUMP_S:
                self._read, off = wanted, 0.0
            step = 1.0 if abs(off) < DEAD_S else 1.0 + SLEW * (1 if off > 0 else -1)
            captured = self._origin + self._read / RATE
            self.delay = self._next - captured
            yield sound_of(self._samples(step), captured)
            self._read += SAMPLES * step
            self._next += PIECE_S
            while self._pieces and self._read >= len(self._pieces[0]) + SAMPLES:
                self._drop_first()

    def _wait_for_late(self) -> None:
        """Sound that comes after its pictures have left is not silenced for ever: from now on it is waited for."""
        late = (self._read - (self._held - SAMPLES)) / RATE
        if self._next is None or self.delay is None or not 0 < late < JUMP_S:
            return
        self._least = min(self.delay + late + SPARE_S, JUMP_S)
        self._read -= (late + SPARE_S) * RATE

    @property
    def _ends(self) -> float:
        return self._origin + self._held / RATE

    def _restart(self, captured: float) -> None:
        self._read += (self._origin - captured) * RATE  # the same moment, counted from the new origin
        self._pieces.clear()
        self._held, self._origin = 0, captured

    def _append(self, samples: NDArray[np.int16]) -> None:
        self._pieces.append(samples)
        self._held += len(samples)

    def _drop_first(self) -> None:
        gone = len(self._pieces.popleft())
        self._held -= gone
        self._read -= gone
        self._origin += gone / RATE

    def _samples(self, step: float) -> NDArray[np.int16]:
        """960 samples from `_read` on, `step` apart; silence where there are none."""
        if not -SAMPLES < self._read < self._held:
            self.silences += 1
            return np.zeros((SAMPLES, 2), np.int16)
        first = int(np.floor(self._read))
        there = self._slice(first, SAMPLES + SAMPLES // 50)
        if step == 1.0:
            return there[:SAMPLES]
        at = self._read - first + np.arange(SAMPLES) * step
        below = at.astype(int)
        part = (at - below)[:, None]
        mixed = there[below] * (1 - part) + there[below + 1] * part
        return np.asarray(np.round(mixed), np.int16)

    def _slice(self, first: int, count: int) -> NDArray[np.int16]:
        found = np.zeros((count, 2), np.int16)
        at = 0
        for piece in self._pieces:
            low, high = max(first, at), min(first + count, at + len(piece))
            if low < high:
                found[low - first : high - first] = piece[low - at : high - at]
            at += len(piece)
            if at >= first + count:
                break
        return found
