"""The sound that belongs to the pictures: copied packet by packet from a recording, or encoded as it is heard."""

from __future__ import annotations

from collections import deque
from typing import cast

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet

from stream.sound import PIECE_S, RATE, SAMPLES, TICK, TOLERANCE_S, Sound, sound_of
from stream.sources.container import reason

LATE_S = 0.2  # s; sound may come this much after its picture before silence takes its place
QUIET_S = 2.0  # s without any sound after which none is waited for
HELD = 500  # pieces, 10 s: sound waits here for its pictures
PRIMING = 1024  # samples an AAC encoder puts before the first: so much later, no time is negative, which FLV refuses
RESET_S = 0.5  # pictures whose time of capture strays further from their pts begin a new reckoning


class AudioCopy:
    """Copies the first audio stream of a file or URL into an open output, as far as the pictures have come.

    A codec that the output cannot hold, or sound that cannot be read, is one line in `warnings` and no sound.
    """

    def __init__(self, url: str, output: OutputContainer, warnings: list[str]) -> None:
        self._warnings = warnings
        self._next: Packet[AudioStream] | None = None
        self._stream: AudioStream | None = None
        self._input: InputContainer | None = None
        self._last_dts: int | None = None
        try:
            self._input = av.open(url if "://" in url else f"file:{url}")
        except av.FFmpegError as error:
            warnings.append(f"no sound: {reason(error)}")
            return
        if not self._input.streams.audio:
            return
        template = self._input.streams.audio[0]
        try:
            self._stream = output.add_stream_from_template(template)
        except ValueError:  # PyAV asks the container
            name = template.codec_context.name if template.codec_context else "its codec"
            warnings.append(f"no sound: {output.format.name} cannot hold {name}; .mkv can hold most")
            return
        self._packets = self._input.demux(template)
        self._advance()

    def copy(self, output: OutputContainer, until: float | None, shift: float = 0.0) -> None:
        """Mux what starts before `until` s (None: all of it), `shift` s later than in the input."""
        while self._next is not None and (until is None or _time(self._next) + shift < until):
            packet = self._next
            self._advance()
            if shift and packet.time_base:
                ticks = round(shift / packet.time_base)
                packet.pts = None if packet.pts is None else packet.pts + ticks
                packet.dts = None if packet.dts is None else packet.dts + ticks
            packet.stream = cast("AudioStream", self._stream)
            output.mux(packet)

    def close(self) -> None:
        """Close the input."""
        self._next = None
        if self._input is not None:
            self._input.close()

    def _advance(self) -> None:
        """The next packet whose dts grows: a muxer refuses others, and the pictures must go on."""
        try:
            self._next = next((packet for packet in self._packets if self._grows(packet)), None)
        except av.FFmpegError as error:
            self._warnings.append(f"the sound ends early: {reason(error)}")
            self._next = None

    def _grows(self, packet: Packet[AudioStream]) -> bool:
        if packet.dts is None or (self._last_dts is not None and packet.dts <= self._last_dts):
            return False
        self._last_dts = packet.dts
        return True


def _time(packet: Packet[AudioStream]) -> float:
    return float((packet.dts or 0) * packet.time_base)


class SoundTrack:
    """A stereo AAC track of live sound in step with the pictures, without a gap: what was not heard is silence.

    `hear` may be called by another thread than the one that muxes; the rest is that one's.
    """

    def __init__(self, output: OutputContainer, bit_rate: int = 128_000) -> None:
        self.dropped = 0  # pieces that came too late or too many
        self._heard: deque[Sound] = deque(maxlen=HELD)
        self._stream = output.add_stream("aac", rate=RATE)
        self._stream.codec_context.layout = "stereo"
        self._stream.codec_context.bit_rate = bit_rate
        self._zero: float | None = None  # time of capture of what shows at 0 of the output
        self._at = PRIMING  # where in the output the next sample goes
        self._newest = -QUIET_S  # s in the output where sound was last heard

    def hear(self, sound: Sound) -> None:
        """Take 20 ms of sound; it waits for the pictures of its time."""
        if len(self._heard) == HELD:
            self.dropped += 1
        self._heard.append(sound)

    def mux(self, output: OutputContainer, now: float, captured: float) -> None:
        """Mux the sound up to `now`, where the output shows a picture captured at `captured` (both s)."""
        zero = captured - now
        if self._zero is None or abs(zero - self._zero) > RESET_S:
            self._zero = zero
        self._zero += 0.02 * (zero - self._zero)  # times of capture waver with the network, pts do not
        while self._heard and self._heard[0].captured - self._zero < now:
            sound = self._heard.popleft()
            self._place(output, sound, sound.captured - self._zero)
        late = LATE_S if now - self._newest < QUIET_S else 0.0
        self._silence(output, now - late)

    def finish(self, output: OutputContainer) -> None:
        """Mux what the encoder still holds."""
        if self._at > PRIMING:
            output.mux(self._stream.encode(None))

    def _place(self, output: OutputContainer, sound: Sound, at: float) -> None:
        self._newest = max(self._newest, at)
        away = at - self._at / RATE
        if away < -TOLERANCE_S:
            self.dropped += 1
            return
        if away > TOLERANCE_S:
            self._silence(output, at)
        self._encode(output, sound)

    def _silence(self, output: OutputContainer, until: float) -> None:
        while self._at / RATE + PIECE_S <= until:
            self._encode(output, sound_of(np.zeros((SAMPLES, 2), np.int16), 0.0))

    def _encode(self, output: OutputContainer, sound: Sound) -> None:
        frame = av.AudioFrame.from_ndarray(sound.frame.to_ndarray(), format="s16", layout="stereo")
        frame.sample_rate, frame.time_base, frame.pts = RATE, TICK, self._at  # a copy: others hear the same piece
        self._at += SAMPLES
        output.mux(self._stream.encode(frame))
