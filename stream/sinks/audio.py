"""The sound that belongs to the pictures, copied packet by packet."""

from __future__ import annotations

from typing import cast

import av
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet

from stream.sources.container import reason


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
