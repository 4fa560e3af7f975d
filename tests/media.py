"""Small clips for tests, made with PyAV, and what is in a file once it is decoded back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

av.logging.set_level(None)

TB = Fraction(1, 90_000)
COLOURS = np.array(
    [[255, 255, 255], [255, 255, 0], [0, 255, 255], [0, 255, 0], [255, 0, 255], [255, 0, 0], [0, 0, 255], [0, 0, 0]],
    np.uint8,
)
SHARED = Path(os.environ.get("LIVESTYLE_SHARED") or Path(__file__).parents[2] / "shared")
CLIPS = sorted(path for path in (SHARED / "data" / "clips").glob("*") if path.suffix in (".mp4", ".mkv"))


def bars(width: int, height: int) -> NDArray[np.uint8]:
    """Eight vertical colour bars, (H, W, 3)."""
    row = COLOURS[np.arange(width) * len(COLOURS) // width]
    return np.ascontiguousarray(np.broadcast_to(row, (height, width, 3)))


def bars_error(image: NDArray[np.uint8]) -> int:
    """The largest difference, in levels, between the middles of the bars and what they should be."""
    height, width = image.shape[:2]
    columns = ((np.arange(len(COLOURS)) + 0.5) * width / len(COLOURS)).astype(int)
    return int(np.abs(image[height // 2, columns].astype(int) - COLOURS).max())


def moving(width: int, height: int, count: int) -> list[NDArray[np.uint8]]:
    """Smooth pictures that shift by four pixels each."""
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack(
        [128 + 100 * np.sin(x / 17.0), 128 + 100 * np.sin(y / 13.0), 128 + 100 * np.sin((x + y) / 29.0)], -1
    )
    return [np.roll(base.astype(np.uint8), 4 * i, axis=1) for i in range(count)]


def write_clip(
    path: Path,
    images: Sequence[NDArray[np.uint8]],
    *,
    pts: Sequence[int] | None = None,
    fps: int = 30,
    time_base: Fraction = TB,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    matrix: int = 1,  # AVCOL_SPC: 1 BT.709, 6 BT.601, 2 unspecified
    full_range: bool = False,
    rotation: int = 0,  # degrees counterclockwise
    sar: Fraction | None = None,
    audio: str | None = None,  # codec
    audio_s: float | None = None,
    audio_start: float = 0.0,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode `images` at `pts` ticks, with a tone where an audio codec is named."""
    height, width = images[0].shape[:2]
    pts = list(pts) if pts is not None else [round(i / fps / time_base) for i in range(len(images))]
    with av.open(str(path), "w", container_options=container_options or {}) as output:
        stream: Any = output.add_stream(codec, rate=fps)
        context = stream.codec_context
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        context.time_base, context.gop_size = time_base, 12
        context.colorspace, context.color_range = matrix, 2 if full_range else 1
        context.options = options if options is not None else {"preset": "ultrafast", "crf": "12"}
        if sar:
            context.sample_aspect_ratio = sar
        if rotation:
            stream.set_display_rotation(rotation)
        sound = _tone(output, audio, audio_s or len(images) / fps, audio_start) if audio else iter(())
        pending = next(sound, None)
        for image, tick in zip(images, pts, strict=True):
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(
                format=pix_fmt, dst_colorspace=5 if matrix != 1 else 1, dst_color_range=2 if full_range else 1
            )
            frame.pts, frame.time_base = tick, time_base
            output.mux(stream.encode(frame))
            while pending is not None and pending.time <= tick * time_base:
                output.mux(pending.packets)
                pending = next(sound, None)
        output.mux(stream.encode(None))
        while pending is not None:
            output.mux(pending.packets)
            pending = next(sound, None)
    return path


@dataclass
class _Sound:
    time: float
    packets: list[Any]


def _tone(output: Any, codec: str, seconds: float, start: float) -> Any:
    rate = 48_000
    stream = output.add_stream(codec, rate=rate)
    stream.layout = "mono"
    fmt = stream.codec_context.format.name
    block = 960
    for index in range(int(seconds * rate) // block):
        t = (np.arange(block) + index * block) / rate
        wave = 0.3 * np.sin(2 * np.pi * 440 * t)
        data = wave.astype(np.float32) if fmt.startswith("flt") else (wave * 32767).astype(np.int16)
        if fmt.startswith("u8"):
            data = (wave * 127 + 128).astype(np.uint8)
        if fmt.startswith("s32"):
            data = (wave * 2**31).astype(np.int32)
        frame = av.AudioFrame.from_ndarray(data[None], format=fmt, layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, index * block + round(start * rate), Fraction(1, rate)
        yield _Sound(index * block / rate + start, stream.encode(frame))
    yield _Sound(seconds + start, stream.encode(None))


@dataclass(frozen=True)
class Contents:
    """What a decoded file holds."""

    pts: list[int]  # µs
    images: list[NDArray[np.uint8]]
    audio: list[tuple[float, int]]  # s, bytes of each packet
    tags: tuple[int, int]  # matrix, range of the first picture
    format: str


def read_back(path: Path, *, pictures: bool = True) -> Contents:
    """Decode a file without any code of ours."""
    pts: list[int] = []
    images: list[NDArray[np.uint8]] = []
    audio: list[tuple[float, int]] = []
    tags = (0, 0)
    with av.open(str(path)) as container:
        name = container.format.name
        for packet in container.demux(container.streams.video[0], *container.streams.audio[:1]):
            if packet.stream.type == "audio":
                if packet.pts is not None:
                    audio.append((round(float(packet.pts * packet.time_base), 3), packet.size))
                continue
            for frame in packet.decode():
                assert isinstance(frame, av.VideoFrame)
                assert frame.pts is not None
                pts.append(round(frame.pts * frame.time_base * 1_000_000))
                tags = int(frame.colorspace), int(frame.color_range)
                if pictures:
                    images.append(frame.to_ndarray(format="rgb24"))
    return Contents(pts, images, audio, tags, name)


def audio_sizes(path: Path) -> list[int]:
    """Bytes of each packet of sound, without decoding."""
    with av.open(str(path)) as container:
        sound = container.streams.audio[:1]
        return [packet.size for packet in container.demux(*sound) if packet.size] if sound else []


def boxes(path: Path) -> list[str]:
    """The top-level boxes of an MP4."""
    data, at, names = path.read_bytes(), 0, []
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        names.append(data[at + 4 : at + 8].decode("latin-1"))
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        at += max(size, 8)
    return names
