"""Tracks that give aiortc packets which are already encoded: it packs and sends them, and encodes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import av
from aiortc import MediaStreamTrack
from aiortc.mediastreams import MediaStreamError

from accel.errors import UserError
from stream.coder import Encoded
from stream.encoded import EncodedReader
from stream.encoder import Encoder
from stream.mailbox import MailboxClosed


class EncodedTrack(MediaStreamTrack):
    """Sends what one encoder makes, and from `move` on, from its first keyframe, what another one makes.

    It subscribes when the sender first asks, that is once the peer is connected, so a viewer begins with a picture of
    now. `on_sent` is told of each packet when the sender comes for the next one: by then it is on its way.
    """

    def __init__(self, kind: str, encoder: Encoder[Any], on_sent: Callable[[Encoded, int], None] | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.sent = 0  # packets
        self.bytes = 0
        self.reason = ""  # why it ended, where that was the encoder's doing
        self._encoder = encoder
        self._on_sent = on_sent
        self._reader: EncodedReader | None = None
        self._coming: EncodedReader | None = None
        self._last: tuple[Encoded, int] | None = None
        self._gone = (0, 0)  # packets dropped and overflows of readers that were left

    @property
    def dropped(self) -> int:
        """Packets that this viewer missed because its queue ran over."""
        return self._gone[0] + (self._reader.dropped if self._reader else 0)

    @property
    def overflows(self) -> int:
        """How often its queue ran over."""
        return self._gone[1] + (self._reader.overflows if self._reader else 0)

    def keyframe(self) -> None:
        """The viewer asks for a keyframe."""
        self._encoder.keyframe()

    def move(self, encoder: Encoder[Any]) -> None:
        """Go over to another encoder without a gap."""
        self._encoder = encoder
        if self._coming:
            self._coming.close()
            self._coming = None
        if self._reader:
            self._coming = encoder.subscribe(asyncio.get_running_loop())

    async def recv(self) -> av.Packet[Any]:
        """The next packet; its pts always grow."""
        if self._last:
            self.sent += 1
            self.bytes += self._last[0].packet.size
            if self._on_sent:
                self._on_sent(*self._last)
        encoded = await self._next()
        packet, pts = encoded.packet, encoded.packet.pts or 0
        if self._last and pts <= self._last[1]:  # the rung that was left had newer pictures already
            time_base, pts = packet.time_base, self._last[1] + 1
            packet = av.Packet(bytes(packet))
            packet.pts, packet.time_base = pts, time_base
        self._last = (encoded, pts)
        return packet

    def stop(self) -> None:
        """Leave the encoder."""
        super().stop()
        for reader in (self._reader, self._coming):
            if reader:
                reader.close()

    async def _next(self) -> Encoded:
        if self.readyState != "live":
            raise MediaStreamError
        try:
            if not self._reader:
                self._reader = self._encoder.subscribe(asyncio.get_running_loop())
            encoded = None if self._coming and self._coming.peek() else await self._reader.get()
            if self._coming and self._coming.peek():
                self._take_over(self._reader, self._coming)
                encoded = await self._reader.get()
            assert encoded
            return encoded
        except UserError as error:
            self.reason = str(error)
        except MailboxClosed:
            if self.readyState == "live":
                self.reason = "the stream has ended"
        self.stop()  # tells the viewer
        raise MediaStreamError

    def _take_over(self, old: EncodedReader, new: EncodedReader) -> None:
        self._gone = (self.dropped, self.overflows)
        old.close()
        self._reader, self._coming = new, None
