"""Packets into pictures: by the stream's own software decoder, or on a device for as long as that works."""

from __future__ import annotations

from collections.abc import Iterable

import av
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from stream import hardware

KEPT = 600  # packets since a keyframe; with rarer ones, pictures up to the next one are lost with the device
DEEP = 32  # packets since the last keyframe: with so many, what a decoder held back of those before is shown


class Decoding:
    """Decodes one stream, and loses no picture when it changes hands.

    The first picture always comes from software, which knows what the container says of it: how it lies, its colours.
    Then a device, where one is wanted, is given the same packets again from the keyframe on; what it shows that was not
    shown yet is used. When it fails, the same the other way round.
    """

    def __init__(self, stream: VideoStream) -> None:
        self._stream = stream
        self._wanted = hardware.device_for(stream)  # while it is at work, or about to be
        self._device: VideoCodecContext | None = None
        self._groups: list[list[Packet[VideoStream]]] = [[], []]  # from the last keyframe but one, and from the last
        self._last: int | None = None  # pts of the newest picture, while others may come that were shown already

    @property
    def device(self) -> str:
        """What decodes now."""
        return self._wanted if self._device else "software"

    def decode(self, packet: Packet[VideoStream] | None) -> list[av.VideoFrame]:
        """The pictures that are complete with this packet (None: all that are left); raises av.FFmpegError."""
        if not self._wanted:
            pictures = self._stream.decode(packet)
            if self._last is not None and (pictures := self._new(pictures)):
                self._last = None  # what the device had shown is past
            return pictures
        self._keep(packet)
        if self._device is None:
            pictures = self._stream.decode(packet)
            if pictures:
                pictures = self._taken_up(pictures)
        else:
            try:
                pictures = self._device.decode(packet)
            except av.EOFError:
                raise
            except av.FFmpegError as error:
                pictures = self._given_back(error, packet)
        if pictures and self._wanted:
            self._last = pictures[-1].pts
        return pictures

    def _keep(self, packet: Packet[VideoStream] | None) -> None:
        if packet is None or not packet.size:
            return
        if packet.is_keyframe:
            self._groups = [self._groups[1], []]
        if len(self._groups[1]) < KEPT:
            self._groups[1].append(packet)

    def _taken_up(self, pictures: list[av.VideoFrame]) -> list[av.VideoFrame]:
        """The first pictures of software, or the first of them and what a device makes of the rest."""
        self._last = pictures[0].pts
        try:
            if self._last is None:
                raise ValueError("its pictures have no times")
            device = hardware.open_decoder(self._stream, self._wanted)
            shown = [picture for kept in self._kept() for picture in device.decode(kept)]
            if not shown:
                raise ValueError("no picture came back")
        except (av.FFmpegError, ValueError, NotImplementedError) as error:
            self._say(error)
            self._wanted, self._groups, self._last = "", [[], []], None
            return pictures
        self._device = device
        self._stream.codec_context.flush_buffers()
        return [pictures[0], *self._new(shown)]

    def _given_back(self, error: av.FFmpegError, packet: Packet[VideoStream] | None) -> list[av.VideoFrame]:
        self._say(error)
        kept = [*self._kept()]
        self._device, self._wanted, self._groups = None, "", [[], []]
        shown = []
        for again in kept if packet is not None and packet.size else [*kept, packet]:
            try:
                shown += self._stream.decode(again)
            except av.FFmpegError:  # damaged, as it was before
                continue
        return self._new(shown)

    def _say(self, error: Exception) -> None:
        hardware.say_once(f"decoding on {self._wanted} does not work ({hardware.why(error)}): software does it")

    def _kept(self) -> Iterable[Packet[VideoStream]]:
        before, now = self._groups
        return now if len(now) > DEEP else [*before, *now]

    def _new(self, pictures: Iterable[av.VideoFrame]) -> list[av.VideoFrame]:
        """Those that were not shown yet."""
        last = self._last
        return [picture for picture in pictures if last is None or picture.pts is None or picture.pts > last]
