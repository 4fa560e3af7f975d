"""A small RTSP server for tests: one H.264 stream, RTP interleaved in TCP, on the loopback only."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

SDP = (
    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=test\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\n"
    "a=rtpmap:96 H264/90000\r\na=fmtp:96 packetization-mode=1\r\na=control:video\r\n"
)


def access_units(images: Sequence[NDArray[np.uint8]]) -> list[list[bytes]]:
    """The NAL units of each picture, every picture a keyframe with its parameter sets."""
    context: Any = av.CodecContext.create("libx264", "w")
    context.height, context.width = images[0].shape[:2]
    context.pix_fmt, context.framerate, context.gop_size = "yuv420p", 30, 1
    context.options = {"preset": "ultrafast", "tune": "zerolatency", "x264-params": "slices=1"}
    units = []
    for image in images:
        frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuv420p")
        data = b"".join(bytes(packet) for packet in context.encode(frame))
        units.append([nal.rstrip(b"\0") for nal in data.split(b"\0\0\1") if nal.strip(b"\0")])
    return units


class RtspServer(threading.Thread):
    """Serves `rounds` pictures to each client in turn, `clients` times, then closes the connection under it."""

    def __init__(self, images: Sequence[NDArray[np.uint8]], rounds: int, clients: int = 1) -> None:
        super().__init__(daemon=True)
        self._units, self._rounds, self._clients = access_units(images), rounds, clients
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"rtsp://127.0.0.1:{self._listener.getsockname()[1]}/camera"
        self.transports: list[str] = []
        self.pause = threading.Event()  # never set: a clock that nobody can stop

    def run(self) -> None:
        with self._listener:
            for _ in range(self._clients):
                client, _address = self._listener.accept()
                with client:
                    self._answer(client)

    def _answer(self, client: socket.socket) -> None:
        requests = client.makefile("rb")
        while True:
            lines = []
            while line := requests.readline().strip():
                lines.append(line.decode())
            if not lines:
                return
            method = lines[0].split()[0]
            headers = dict(line.split(": ", 1) for line in lines[1:])
            extra, body = {"OPTIONS": ("Public: DESCRIBE, SETUP, PLAY\r\n", "")}.get(method, ("", ""))
            if method == "DESCRIBE":
                extra, body = f"Content-Type: application/sdp\r\nContent-Length: {len(SDP)}\r\n", SDP
            if method == "SETUP":
                self.transports.append(headers["Transport"])
                extra = "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n"
            client.sendall(f"RTSP/1.0 200 OK\r\nCSeq: {headers['CSeq']}\r\n{extra}\r\n{body}".encode())
            if method == "PLAY":
                self._play(client)
                return

    def _play(self, client: socket.socket) -> None:
        sequence = 0
        for number in range(self._rounds):
            nals = self._units[number % len(self._units)]
            for nal in nals:
                header = struct.pack("!BBHII", 0x80, 96 | (nal is nals[-1]) << 7, sequence & 0xFFFF, number * 3000, 7)
                client.sendall(struct.pack("!cBH", b"$", 0, len(header) + len(nal)) + header + nal)
                sequence += 1
            self.pause.wait(1 / 60)
