"""Video engines beside the processor: NVENC, and FFmpeg's decoders on a device. Tried before they are trusted.

That FFmpeg lists one says nothing: without a driver, or on a card without the engine, it cannot be opened. Which ones
are wanted is said once for the whole process.
"""

from __future__ import annotations

import logging
from fractions import Fraction
from functools import lru_cache
from typing import cast

import av
from av.codec.hwaccel import HWAccel, hwdevices_available
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from accel.errors import UserError

log = logging.getLogger(__name__)

Size = tuple[int, int]  # W, H

ENCODERS = ("auto", "x264", "nvenc")
NVENC = "h264_nvenc"
NVENC_LEAST = (160, 64)  # smaller pictures are refused
ENCODED_ALONE = 1280 * 720  # pixels that x264 takes 1 to 2 ms for, and none of the card's memory: `auto` stays with it
DECODED_ALONE = 1920 * 1088  # pixels up to which decoding takes less of a processor than bringing pictures down would
DEVICES = ("cuda", "videotoolbox")  # what `auto` decodes on
PROBE = (256, 144)

_chosen = {"decode": "auto", "encoder": "auto"}
_failed: list[str] = []  # why NVENC stopped at its work: left alone from then on
_said: set[str] = set()


def choose(decode: str, encoder: str) -> None:
    """Say what this process decodes and encodes with; raises UserError for strange names, and for nvenc without one.

    A decoder that does not work is no error: software takes over.
    """
    if encoder not in ENCODERS:
        raise UserError(f"no such encoder: {encoder}", hint=f"choose one of {', '.join(ENCODERS)}")
    if decode not in (known := ("auto", "software", *hwdevices_available())):
        raise UserError(f"no such decoder: {decode}", hint=f"this FFmpeg has {', '.join(known)}")
    if encoder == "nvenc" and (lack := lack_of_nvenc()):
        raise UserError(f"nvenc does not work here: {lack}", hint="--encoder auto takes x264 where it does not")
    _chosen.update(decode=decode, encoder=encoder)


def chosen_encoder() -> str:
    """What was chosen, for a process that is started from here."""
    return _chosen["encoder"]


def uses_nvenc(size: Size) -> bool:
    """Whether H.264 pictures of a size are to be encoded on the card; else x264 does it.

    >>> uses_nvenc((512, 288))
    False
    """
    fits = size[0] >= NVENC_LEAST[0] and size[1] >= NVENC_LEAST[1]
    large = size[0] * size[1] > ENCODED_ALONE
    wanted = _chosen["encoder"] == "nvenc" or (_chosen["encoder"] == "auto" and large)
    return wanted and fits and not _failed and not lack_of_nvenc()


def live_options(bitrate: int, buffer: int) -> dict[str, str]:
    """NVENC's for the least delay: every picture comes out at once, at a constant rate with a buffer of so many bits.

    Parameter sets come with each keyframe, as no global header is asked for.
    """
    rates = {"rc": "cbr", "maxrate": str(bitrate), "bufsize": str(buffer)}
    return {"preset": "p3", "tune": "ull", "zerolatency": "1", "delay": "0", "forced-idr": "1", **rates}


def file_options(crf: int) -> dict[str, str]:
    """NVENC's for a file, by quality; `delay`: nothing waits inside that would be lost with the card."""
    return {"preset": "p5", "tune": "hq", "rc": "vbr", "cq": str(max(1, crf)), "delay": "0"}


def nvenc_failed(error: Exception) -> str:
    """Note that NVENC broke off, so that it is not tried again; what there is to say about it."""
    words = f"nvenc stopped working ({why(error)}): x264 goes on"
    _failed.append(words)
    say_once(words)
    return words


def say_once(words: str) -> None:
    """On the terminal, and not again."""
    if words not in _said:
        _said.add(words)
        log.warning("%s", words)


def devices() -> list[str]:
    """What this FFmpeg could decode H.264 on, were it there."""
    configs = av.Codec("h264", "r").hardware_configs
    return [config.device_type.name for config in configs if config.is_supported]


def device_for(stream: VideoStream) -> str:
    """The device that a stream's pictures are to be decoded on; "" for none. Says why one asked for by name is not."""
    choice, context = _chosen["decode"], stream.codec_context
    if choice == "software" or (choice == "auto" and context.width * context.height <= DECODED_ALONE):
        return ""
    name = context.codec.canonical_name
    able = [config.device_type.name for config in av.Codec(name, "r").hardware_configs if config.is_supported]
    if choice == "auto":
        return next((device for device in DEVICES if device in able and not lack_of_device(device)), "")
    if choice not in able:
        say_once(f"this FFmpeg decodes no {name} on {choice}: software does it")
        return ""
    return choice


def open_decoder(stream: VideoStream, device: str) -> VideoCodecContext:
    """A decoder of the stream's codec on a device, told what the container says; pictures come as NV12 in our memory.

    Raises av.FFmpegError where the device cannot be opened.
    """
    own = stream.codec_context
    accel = HWAccel(device, allow_software_fallback=False)
    context = cast("VideoCodecContext", av.CodecContext.create(own.codec.canonical_name, "r", hwaccel=accel))
    context.extradata, context.flags, context.thread_count = own.extradata, own.flags, 1
    context.color_range, context.colorspace = own.color_range, own.colorspace
    context.color_primaries, context.color_trc = own.color_primaries, own.color_trc
    return context


@lru_cache(maxsize=1)
def lack_of_nvenc() -> str:
    """Why NVENC does not work here; "" when it has just encoded a picture."""
    try:
        context = cast("VideoCodecContext", av.CodecContext.create(NVENC, "w"))
        context.width, context.height, context.pix_fmt = *PROBE, "yuv420p"
        context.time_base, context.framerate = Fraction(1, 30), Fraction(30)
        context.options = live_options(1_000_000, 200_000)
        context.open()
        packets = context.encode(av.VideoFrame(*PROBE, "yuv420p"))
    except (av.FFmpegError, ValueError, NotImplementedError) as error:
        return why(error)
    return "" if packets else "it keeps pictures back"


@lru_cache
def lack_of_device(device: str) -> str:
    """Why H.264 is not decoded on a device; "" when a picture has just been."""
    try:
        encoder = av.CodecContext.create("libx264", "w")
        encoder.width, encoder.height, encoder.pix_fmt = *PROBE, "yuv420p"
        encoder.time_base, encoder.framerate = Fraction(1, 30), Fraction(30)
        packets = [*encoder.encode(av.VideoFrame(*PROBE, "yuv420p")), *encoder.encode(None)]
        accel = HWAccel(device, allow_software_fallback=False)
        decoder = av.CodecContext.create("h264", "r", hwaccel=accel)
        pictures = [picture for packet in (*packets, None) for picture in decoder.decode(packet)]
    except (av.FFmpegError, ValueError, NotImplementedError) as error:
        return why(error)
    return "" if pictures else "no picture came back"


def why(error: Exception) -> str:
    """What a device's error means, as far as FFmpeg tells."""
    if isinstance(error, av.error.PermissionError):
        return "no NVIDIA driver"  # what FFmpeg calls a libcuda that cannot be loaded
    if isinstance(error, av.error.ExternalError):
        return "the card has no such engine, or no session is free"
    if isinstance(error, av.FFmpegError):
        return (error.strerror or type(error).__name__).lower()
    return str(error) or type(error).__name__
