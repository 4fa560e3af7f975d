"""Glass to glass over real WebRTC: a picture that tells the time is published, stylized, watched, and read.

A server (`livestyle serve`) runs in a child process, so that measuring takes no interpreter time from it. The age of a
picture is taken when the viewer's decoder hands it out, by the clock that both processes share. A screen adds its own
delay, a camera too.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import av
import numpy as np
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError
from numpy.typing import NDArray

from accel.errors import UserError
from bench import clockcode, record
from stream.coder import PictureCoder
from stream.frame import Frame
from stream.meter import percentiles
from stream.rtc import sdp, tuning
from stream.source import open_source

NAME = "bench"
CLIP_FRAMES = 60  # of the clip, shown over and over
KEYFRAME_S = 1.0  # as OBS is told to
WARM_UP = 60  # pictures whose time could be read, before measuring
START_S = 120.0  # for the server to listen, the model to be compiled and the first picture to come
CODE_LOST = 0.5  # share of pictures whose time cannot be read, above which the figures say nothing


@dataclass(slots=True)
class Seen:
    """What a viewer measured."""

    ages_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)  # between two pictures
    unread: int = 0


class CodedTrack(MediaStreamTrack):
    """Pictures of a clip with the time in them, encoded here as a camera's own encoder would: H.264, no delay."""

    kind = "video"

    def __init__(self, pictures: list[NDArray[np.uint8]], fps: float) -> None:
        super().__init__()
        self._pictures, self._fps = cycle(pictures), fps
        self._coder = PictureCoder("h264", fps)
        self._count = 0
        self._started = time.monotonic()

    async def recv(self) -> av.Packet[Any]:
        """The next picture when it is due; the time in it is that of being taken."""
        await asyncio.sleep(max(0.0, self._started + self._count / self._fps - time.monotonic()))
        keyframe = self._count % round(self._fps * KEYFRAME_S) == 0
        self._count += 1
        return await asyncio.to_thread(self._encode, next(self._pictures), keyframe)

    def _encode(self, picture: NDArray[np.uint8], keyframe: bool) -> av.Packet[Any]:
        now = time.monotonic()
        frame = Frame(clockcode.draw(picture, clockcode.now_ms()), round(now * 1e6), self._count, now)
        return self._coder.encode(frame, keyframe)[0].packet


def measure(
    source: str = "demo",
    model: str = "mini",
    engine: str = "auto",
    size: tuple[int, int] = (640, 360),
    fps: float = 30.0,
    seconds: float = 20.0,
    settings: tuple[str, ...] = (),
    log: Any = lambda line: None,
) -> dict[str, Any]:
    """The report: age of pictures at a viewer, and the server's own share of it. Raises UserError."""
    if size[0] % clockcode.COLUMNS:
        raise UserError(
            f"a width of {size[0]}", hint=f"the code in the picture wants a multiple of {clockcode.COLUMNS}"
        )
    started = record.start()
    opened = open_source(source, size=size, fit="stretch")
    try:
        pictures = [frame.image for frame in islice(opened.frames(), CLIP_FRAMES)]
    finally:
        opened.close()
    tuning.install()
    with serving(model, engine, size, settings) as url:
        log(f"{url}: {model}, {size[0]}x{size[1]}, {fps:g} fps, {seconds:g} s")
        seen, status = asyncio.run(_watch(url, pictures, fps, seconds))
    if seen.unread > CODE_LOST * (seen.unread + len(seen.ages_ms)):
        raise UserError(
            f"the time in {seen.unread} of {seen.unread + len(seen.ages_ms)} pictures could not be read",
            hint="the style hides it: --set style.prompt=photo",
        )
    work: dict[str, Any] = {**record.model_of(model), **record.source_of(source), "size": f"{size[0]}x{size[1]}"}
    work |= {"camera_fps": fps, "seconds": seconds, "settings": dict(s.partition("=")[::2] for s in settings)}
    lanes = {str(status["engine"]): _metrics(seen, status, seconds)}
    return record.record("transport", started, work, lanes, _report(seen, status, size, fps, seconds))


@contextmanager
def serving(model: str, engine: str, size: tuple[int, int], settings: tuple[str, ...]) -> Iterator[str]:
    """A server in a child process on a free port of this machine; yields its address, ends it in order."""
    command = [sys.executable, "-c", "import sys; from stream.cli import main; sys.exit(main())"]
    command += ["serve", "--port", "0", "--model", model, "--engine", engine, "--size", f"{size[0]}x{size[1]}"]
    command += [word for setting in settings for word in ("--set", setting)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        said = ""
        for line in server.stdout:
            said += line
            if found := re.search(r"page\s+(https?://\S+?)/(\s|$)", line):
                yield found[1]
                return
        raise UserError("the server did not start", hint=said.strip().splitlines()[-1] if said else "see above")
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


async def _watch(
    url: str, pictures: list[NDArray[np.uint8]], fps: float, seconds: float
) -> tuple[Seen, dict[str, Any]]:
    publisher, viewer = (RTCPeerConnection(RTCConfiguration(iceServers=[])) for _ in range(2))
    try:
        camera = publisher.addTransceiver(CodedTrack(pictures, fps), direction="sendonly")
        camera.setCodecPreferences(sdp.preferences("video", sdp.CODECS["h264"]))
        await _connect(publisher, f"{url}/whip/{NAME}")
        transceiver = viewer.addTransceiver("video", direction="recvonly")
        await _connect(viewer, f"{url}/whep/{NAME}")
        track = transceiver.receiver.track
        await _until_live(url, track)
        seen = await _read(track, seconds)
        return seen, await asyncio.to_thread(_get, f"{url}/api/v1/streams/{NAME}")
    finally:
        await publisher.close()
        await viewer.close()


async def _connect(pc: RTCPeerConnection, url: str) -> None:
    await pc.setLocalDescription()
    request = urllib.request.Request(url, pc.localDescription.sdp.encode(), {"Content-Type": "application/sdp"})
    answer = await asyncio.to_thread(lambda: urllib.request.urlopen(request, timeout=10).read().decode())
    await pc.setRemoteDescription(RTCSessionDescription(answer, "answer"))


async def _until_live(url: str, track: MediaStreamTrack) -> None:
    """Let the slate and the model's first, slow pictures go by."""
    read = 0
    try:
        async with asyncio.timeout(START_S):
            while read < WARM_UP:
                frame: Any = await track.recv()
                read += clockcode.read(frame.to_ndarray(format="rgb24")) is not None
    except TimeoutError:
        status = await asyncio.to_thread(_get, f"{url}/api/v1/streams/{NAME}")
        raise UserError(
            f"no picture within {START_S:.0f} s: {status['words']}", hint="see `livestyle doctor`"
        ) from None


async def _read(track: MediaStreamTrack, seconds: float) -> Seen:
    seen, before = Seen(), time.monotonic()
    end = before + seconds
    while before < end:
        try:
            frame: Any = await track.recv()
        except MediaStreamError:
            raise UserError("the server ended the picture", hint="its own words are above") from None
        now, now_ms = time.monotonic(), clockcode.now_ms()
        seen.gaps_ms.append((now - before) * 1000)
        before = now
        shown = clockcode.read(frame.to_ndarray(format="rgb24"))
        if shown is None:
            seen.unread += 1
        else:
            seen.ages_ms.append(float(now_ms - shown))
    return seen


def _get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def _metrics(seen: Seen, status: dict[str, Any], seconds: float) -> dict[str, Any]:
    ages, n = seen.ages_ms, len(seen.ages_ms)
    quarters = [ages[i * n // 4 : (i + 1) * n // 4] for i in range(4)]
    added = percentiles(ages, (50,))[0] - status["latency_ms"]["p50"]
    return {
        "glass to glass": record.metric("ms", "lower", quarters),
        "rate": record.metric("fps", "higher", [[(n + seen.unread) / seconds]]),
        "transport p50": record.metric("ms", "lower", [[added]]),
    }


def _report(seen: Seen, status: dict[str, Any], size: tuple[int, int], fps: float, seconds: float) -> dict[str, Any]:
    glass = percentiles(seen.ages_ms, (50, 95, 99))
    pipeline = [status["latency_ms"][name] for name in ("p50", "p95", "p99")]
    transport = [round(a - b, 1) for a, b in zip(glass, pipeline, strict=True)]
    gaps = percentiles(seen.gaps_ms[1:], (50, 95, 99))
    shown = len(seen.ages_ms) + seen.unread
    rows = [["glass to glass", *glass], ["pipeline (capture → output)", *pipeline], ["transport", *transport]]
    rows.append(["between two pictures", *gaps])
    return {
        "title": "Glass to glass over WebRTC",
        "summary": f"{status['model']} on {status['engine']}, {size[0]}×{size[1]}, camera at {fps:g} fps, "
        f"shown at {shown / seconds:.1f} fps for {seconds:g} s; transport adds {transport[0]:.0f} ms (p50)",
        "results": {
            "glass_ms": dict(zip(("p50", "p95", "p99"), glass, strict=True)),
            "pipeline_ms": status["latency_ms"],
            "transport_p50_ms": transport[0],
            "gaps_ms": dict(zip(("p50", "p95", "p99"), gaps, strict=True)),
            "fps": round(shown / seconds, 2),
            "style_fps": status["style_fps"],
            "unread": seen.unread,
            "dropped": status["dropped"],
            "stages_ms": status["stages_ms"],
        },
        "sections": [
            {
                "kind": "table",
                "title": "Age of pictures",
                "note": "From taking the picture to the viewer's decoder; both ends and the server on this machine.",
                "columns": ["", "p50, ms", "p95, ms", "p99, ms"],
                "rows": rows,
            },
            {
                "kind": "histogram",
                "title": "Glass to glass",
                "unit": "ms",
                "series": [{"label": "age", "values": seen.ages_ms}],
            },
        ],
    }
