"""Times over the data channel "timing": so a page can tell how old the picture is that it shows.

About five times a second we send `{"rtp": T, "captured": ms, "sent": ms}` of the newest picture sent; a page finds T in
`requestVideoFrameCallback`'s `rtpTimestamp`. It asks `{"ping": t}` and gets `{"ping": t, "now": ms}`, from which it
knows our clock (half the round trip ago). Milliseconds are those of this machine's monotonic clock.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from aiortc import RTCDataChannel

LABEL = "timing"
EVERY_S = 0.2
QUESTION_MOST = 200  # characters of a message that we read
UNSENT_MOST = 4096  # bytes that may wait in the channel; more is not added


@dataclass(frozen=True, slots=True)
class Sent:
    """A picture that has left."""

    rtp: int  # its RTP timestamp, as on the wire
    captured: float  # s, monotonic
    sent: float  # s, monotonic


def message(sent: Sent) -> str:
    """What the page is told.

    >>> message(Sent(rtp=7, captured=1.0, sent=1.05))
    '{"rtp": 7, "captured": 1000.0, "sent": 1050.0}'
    """
    return json.dumps({"rtp": sent.rtp, "captured": round(sent.captured * 1e3, 2), "sent": round(sent.sent * 1e3, 2)})


def answer(question: object, now: float) -> str | None:
    """The answer to a message from the page; None to what is no question."""
    if not isinstance(question, str) or len(question) > QUESTION_MOST:
        return None
    try:
        asked = json.loads(question)
    except (ValueError, RecursionError):
        return None
    ping = asked.get("ping") if isinstance(asked, dict) else None
    if not isinstance(ping, (int, float)):
        return None
    return json.dumps({"ping": ping, "now": round(now * 1e3, 2)})


async def tell(channel: RTCDataChannel, newest: Callable[[], Sent | None]) -> None:
    """Answer and tell until the channel closes."""

    def asked(question: object) -> None:
        words = answer(question, time.monotonic())
        if words:
            _send(channel, words)

    channel.on("message", asked)
    told = None
    while channel.readyState in ("connecting", "open"):
        sent = newest()
        if sent and sent is not told:
            told = sent
            _send(channel, message(sent))
        await asyncio.sleep(EVERY_S)


def _send(channel: RTCDataChannel, words: str) -> None:
    if channel.readyState == "open" and channel.bufferedAmount < UNSENT_MOST:
        channel.send(words)
