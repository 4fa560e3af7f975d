"""Open Sound Control in: an artist's fader or sequencer changes settings. OSC 1.0 over UDP.

`/livestyle/cam/style/prompt "neon"` sets `style.prompt` of the stream `cam`; `*` in place of its name is every stream.
The protocol knows no passwords: it listens on loopback unless told otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from pythonosc.osc_message import OscMessage
from pythonosc.osc_packet import OscPacket, ParseError

from accel.errors import UserError
from models.assets import check_bare
from stream.hub import Hub

log = logging.getLogger(__name__)

ROOT = "livestyle"
LOG_EVERY_S = 1.0


class Osc(asyncio.DatagramProtocol):
    """One UDP port. What is wrong with a message is one line in the log, at most one a second.

    Bundles are taken at once: python-osc's own server sleeps until their time, which would stop the event loop.
    """

    def __init__(self, hub: Hub, clock: Callable[[], float] = time.monotonic) -> None:
        self._hub, self._clock = hub, clock
        self._said = -LOG_EVERY_S  # s, when the last line was logged
        self._unsaid = 0
        self.taken = 0  # messages

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Take every message of a packet."""
        try:
            messages = [timed.message for timed in OscPacket(data).messages]
        except (ParseError, ValueError, IndexError, RecursionError):
            self._complain("a packet that is not OSC")
            return
        for message in messages:
            try:
                self._take(message)
                self.taken += 1
            except UserError as error:
                self._complain(f"{message.address[:100]!r}: {error.message}")

    def error_received(self, exc: Exception) -> None:
        """An answer to nothing we sent: not of interest."""

    def _take(self, message: OscMessage) -> None:
        parts = message.address.split("/")
        if len(parts) < 4 or parts[:2] != ["", ROOT]:
            raise UserError(f"addresses are /{ROOT}/STREAM/style/prompt and so on")
        name, key = parts[2], ".".join(parts[3:])
        values = list(message.params)
        if len(values) != 1:
            raise UserError("one value is expected")
        streams = self._hub.streams() if name == "*" else [stream for stream in (self._hub.get(name),) if stream]
        if not streams:
            raise UserError("no such stream")
        check_bare(key, values[0])
        for stream in streams:
            stream.patch({key: values[0]})

    def _complain(self, text: str) -> None:
        now = self._clock()
        if now - self._said < LOG_EVERY_S:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} more before)" if self._unsaid else ""
        log.warning("OSC: %s%s", text, more)
        self._said, self._unsaid = now, 0


async def listen(hub: Hub, host: str, port: int) -> tuple[asyncio.DatagramTransport, Osc]:
    """Listen until the transport is closed; raises UserError where the port cannot be had."""
    loop = asyncio.get_running_loop()
    try:
        return await loop.create_datagram_endpoint(lambda: Osc(hub), local_addr=(host, port))
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise UserError(f"cannot listen for OSC on {host}:{port}: {why}", hint="choose another --osc PORT") from None
