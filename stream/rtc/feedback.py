"""What the receiver at the other end tells of what arrives: RTCP, taken off an aiortc sender.

aiortc 1.16 answers RTCP itself and keeps what it learns; the three seams used here are checked when one is attached.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from aiortc.rtcrtpsender import RTCRtpSender
from aiortc.rtp import RTCP_PSFB_APP, AnyRtcpPacket, RtcpPsfbPacket, RtcpRrPacket, RtcpSrPacket, unpack_remb_fci

_TIMESTAMP = "_RTCRtpSender__rtp_timestamp"
_RTT = "_RTCRtpSender__rtt"


class Feedback:
    """The newest receiver report and bandwidth estimate of one sender; `keyframe` is called on PLI and FIR.

    Raises RuntimeError when this aiortc is built otherwise.
    """

    def __init__(
        self, sender: RTCRtpSender, keyframe: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        for seam in ("_send_keyframe", "_handle_rtcp_packet", "_ssrc", _TIMESTAMP, _RTT):
            if not hasattr(sender, seam):
                raise RuntimeError(f"this aiortc has no RTCRtpSender.{seam}; 1.16 has")
        self.estimate: int | None = None  # bits per second (REMB)
        self.loss = 0.0  # share of packets lost between the last two reports
        self.heard: float | None = None  # when RTCP last came, s
        self.keyframes = 0  # asked for
        self._sender: Any = sender
        self._clock, self._ask = clock, keyframe
        self._aiortc = self._sender._handle_rtcp_packet
        self._sender._handle_rtcp_packet = self._take  # type: ignore[method-assign]
        self._sender._send_keyframe = self._keyframe  # type: ignore[method-assign]

    @property
    def rtt_ms(self) -> float | None:
        """Round trip, ms; None before the first report that tells it."""
        rtt = getattr(self._sender, _RTT)
        return None if rtt is None else float(rtt) * 1000

    @property
    def rtp_timestamp(self) -> int:
        """That of the newest packet sent: aiortc adds a random origin, which it keeps to itself."""
        return int(getattr(self._sender, _TIMESTAMP))

    async def _take(self, packet: AnyRtcpPacket) -> None:
        self.heard = self._clock()
        if isinstance(packet, (RtcpRrPacket, RtcpSrPacket)):
            for report in packet.reports:
                if report.ssrc == self._sender._ssrc:
                    self.loss = report.fraction_lost / 256
        elif isinstance(packet, RtcpPsfbPacket) and packet.fmt == RTCP_PSFB_APP:
            self._estimated(packet.fci)
        await self._aiortc(packet)

    def _estimated(self, fci: bytes) -> None:
        try:
            bitrate, ssrcs = unpack_remb_fci(fci)
        except ValueError:
            return
        if self._sender._ssrc in ssrcs:
            self.estimate = bitrate

    def _keyframe(self) -> None:
        self.keyframes += 1
        self._ask()
