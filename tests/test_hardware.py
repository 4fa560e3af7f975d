"""Video engines beside the processor: trusted only when they work, and nothing is lost when they stop."""

from __future__ import annotations

import asyncio
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest

from stream import cli, coder, doctor, hardware
from stream.coder import Encoded, PictureCoder
from stream.encoder import Encoders
from stream.frame import Frame, VideoSpec
from stream.server.config import load_server_settings
from stream.sinks.file import FileSink
from stream.source import open_source
from tests.fakes import PATIENCE
from tests.media import moving, read_back, write_clip
from tests.scenes import psnr
from tests.showing import FakeStream, decode

SIZE = (320, 176)
DRIVER = "no NVIDIA driver"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test chooses and sees fail is nothing to the next one."""
    monkeypatch.setattr(hardware, "_chosen", {"decode": "auto", "encoder": "auto"})
    monkeypatch.setattr(hardware, "_failed", [])
    monkeypatch.setattr(hardware, "_said", set())


def without_nvenc(monkeypatch: pytest.MonkeyPatch, lack: str = DRIVER) -> None:
    monkeypatch.setattr(hardware, "lack_of_nvenc", lambda: lack)


# what is chosen


def test_a_listed_encoder_that_cannot_be_opened_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware.NVENC in av.codecs_available
    without_nvenc(monkeypatch)
    assert not hardware.uses_nvenc((3840, 2160))
    found = {finding.topic: finding for finding in doctor.examine()}
    assert (found["encode on nvenc"].ok, found["encode on nvenc"].found) == (False, DRIVER)
    assert "x264" in found["encode on nvenc"].hint


def test_a_probe_says_why_it_failed_and_raises_nothing() -> None:
    for lack in (hardware.lack_of_nvenc(), *map(hardware.lack_of_device, (*hardware.devices(), "no-such-device"))):
        assert "\n" not in lack
    assert hardware.lack_of_device("no-such-device")


def test_auto_takes_the_card_for_large_pictures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    without_nvenc(monkeypatch, "")
    assert [hardware.uses_nvenc(size) for size in ((512, 288), (1280, 720), (1920, 1080))] == [False, False, True]
    hardware.choose("auto", "nvenc")
    assert [hardware.uses_nvenc(size) for size in ((512, 288), (128, 72), (1920, 1080))] == [True, False, True]
    hardware.choose("auto", "x264")
    assert not hardware.uses_nvenc((1920, 1080))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--encoder", "nvenc"], f"nvenc does not work here: {DRIVER}"),
        (["--encoder", "x265"], "no such encoder: x265"),
        (["--decode", "magic"], "no such decoder: magic"),
    ],
)
def test_what_cannot_be_is_said_in_two_lines_before_anything_is_made(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without_nvenc(monkeypatch)
    out = tmp_path / "out.mp4"
    assert cli.main(["run", "demo", "--to", str(out), "--engine", "null", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert (len(lines), lines[0]) == (2, f"error: {says}")
    assert not out.exists()


def test_a_server_is_told_the_same_way(tmp_path: Path) -> None:
    toml = tmp_path / "server.toml"
    toml.write_text('[server.live]\ndecode = "cuda"\nencoder = "x264"\n')
    live = load_server_settings(toml, {"live.encoder": "nvenc"}).live
    assert (live.decode, live.encoder) == ("cuda", "nvenc")


# decoding


class FakeDevice:
    """A decoder that gives NV12 and knows nothing of the container, until a packet breaks it (-1: the end)."""

    def __init__(self, stream: Any, breaks_at: int | None) -> None:
        own = stream.codec_context
        self._context: Any = av.CodecContext.create(own.codec.name, "r")
        self._context.extradata = own.extradata
        self._context.colorspace, self._context.color_range = own.colorspace, own.color_range
        self._left = breaks_at

    def decode(self, packet: Any) -> list[av.VideoFrame]:
        ending = packet is None or not packet.size
        if self._left == (-1 if ending else 0):
            raise av.error.ExternalError(0x54584542, "Generic error in an external library")
        if self._left is not None and not ending:
            self._left = max(self._left - 1, -1) if self._left > 0 else self._left
        return [picture.reformat(format="nv12") for picture in self._context.decode(packet)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures with B-frames and a keyframe every 12, lying on their side, beginning at 0.4 s."""
    path = tmp_path_factory.mktemp("hardware") / "turned.mp4"
    pts = [36_000 + 3000 * number for number in range(60)]
    options = {"preset": "ultrafast", "crf": "12", "bf": "2", "b-pyramid": "none"}
    return write_clip(path, moving(*SIZE, 60), pts=pts, rotation=90, options=options)


def frames_of(clip: Path) -> list[Frame]:
    with closing(open_source(str(clip))) as source:
        return list(source.frames())


@pytest.mark.parametrize("breaks_at", [None, 0, 1, 20, 37, 49, -1])
def test_no_picture_is_lost_between_a_device_and_software(
    breaks_at: int | None, clip: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = frames_of(clip)
    opened: list[FakeDevice] = []

    def open_decoder(stream: Any, device: str) -> FakeDevice:
        opened.append(FakeDevice(stream, breaks_at))
        return opened[-1]

    monkeypatch.setattr(hardware, "device_for", lambda stream: "cuda")
    monkeypatch.setattr(hardware, "open_decoder", open_decoder)
    frames = frames_of(clip)
    assert len(opened) == 1
    assert [(frame.seq, frame.pts) for frame in frames] == [(frame.seq, frame.pts) for frame in plain]
    assert frames[0].image.shape == plain[0].image.shape == (SIZE[0], SIZE[1], 3)
    assert all(psnr(one.image, other.image) > 35 for one, other in zip(frames, plain, strict=True))
    said = [record.message for record in caplog.records]
    assert len(said) == (breaks_at is not None)
    assert all(line.startswith("decoding on cuda does not work") and "software does it" in line for line in said)


def test_a_device_that_is_not_there_costs_a_line(
    clip: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def open_decoder(stream: Any, device: str) -> Any:
        raise av.error.PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(hardware, "open_decoder", open_decoder)
    hardware.choose("cuda", "auto")
    assert [len(frames_of(clip)) for _ in range(2)] == [60, 60]
    assert [record.message for record in caplog.records] == [
        f"decoding on cuda does not work ({DRIVER}): software does it"
    ]


def test_large_pictures_are_decoded_on_a_device_that_works(
    clip: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        monkeypatch.setattr(hardware, "lack_of_device", lambda device: "")
        assert hardware.device_for(stream) == ""
        monkeypatch.setattr(hardware, "DECODED_ALONE", 0)
        assert hardware.device_for(stream) == "cuda"
        monkeypatch.setattr(hardware, "lack_of_device", lambda device: DRIVER)
        assert hardware.device_for(stream) == ""
        assert not caplog.records  # nobody asked for it
        hardware.choose("cuda", "auto")
        assert hardware.device_for(stream) == "cuda"
        hardware.choose("software", "auto")
        assert hardware.device_for(stream) == ""


# encoding


class FakeCard:
    """An encoder, or a track of one, that breaks at a picture."""

    def __init__(self, real: Any, breaks_at: int) -> None:
        self._real, self._left = real, breaks_at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def encode(self, picture: av.VideoFrame | None) -> list[Any]:
        if self._left == 0:
            raise av.error.ExternalError(0x54584542, "Generic error in an external library")
        self._left -= 1
        packets: list[Any] = self._real.encode(picture)
        return packets


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVENC as far as everyone is told: x264 of another kind."""
    without_nvenc(monkeypatch, "")
    monkeypatch.setattr(hardware, "NVENC", "libx264")
    monkeypatch.setattr(hardware, "file_options", lambda crf: {"preset": "fast", "tune": "zerolatency", "crf": "12"})
    hardware.choose("auto", "nvenc")


def pictures(count: int) -> list[Frame]:
    return [Frame(image, round(i * 1e6 / 30), i, 50 + i / 30) for i, image in enumerate(moving(*SIZE, count))]


@pytest.mark.usefixtures("card")
def test_viewers_get_every_picture_when_the_card_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_nvenc(size: tuple[int, int], fps: float, bitrate: int) -> Any:
        return FakeCard(coder.open_codec("h264", size, fps, bitrate), 7)

    monkeypatch.setattr(coder, "open_nvenc", open_nvenc)
    told: list[str] = []
    maker = PictureCoder("h264", 30.0, tell=told.append)
    shown = pictures(20)
    packets: list[Encoded] = [encoded for frame in shown for encoded in maker.encode(frame, False)]
    assert [number for number, encoded in enumerate(packets) if encoded.keyframe] == [0, 7]
    seen = decode(packets)
    assert all(psnr(a.to_ndarray(format="rgb24"), b.image) > 28 for a, b in zip(seen, shown, strict=True))
    assert told == ["nvenc stopped working (the card has no such engine, or no session is free): x264 goes on"]


@pytest.mark.usefixtures("card")
def test_one_who_watches_goes_on_when_the_card_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_nvenc(size: tuple[int, int], fps: float, bitrate: int) -> Any:
        return FakeCard(coder.open_codec("h264", size, fps, bitrate), 4)

    async def watch() -> list[bool]:
        reader = Encoders(stream).get("h264", 0).subscribe(asyncio.get_running_loop())
        seen = []
        for number in range(8):
            stream.put(50 + number / 30)
            seen.append((await asyncio.wait_for(reader.get(), PATIENCE)).keyframe)
        reader.close()
        return seen

    monkeypatch.setattr(coder, "open_nvenc", open_nvenc)
    stream = FakeStream()
    assert [number for number, keyframe in enumerate(asyncio.run(watch())) if keyframe] == [0, 4]
    assert [line.partition(" (")[0] for line in stream.said] == ["note: nvenc stopped working"]


@pytest.mark.usefixtures("card")
def test_a_card_without_a_free_session_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def open_nvenc(size: tuple[int, int], fps: float, bitrate: int) -> Any:
        raise av.error.ExternalError(0x54584542, "Generic error in an external library")

    monkeypatch.setattr(coder, "open_nvenc", open_nvenc)
    for _ in range(2):
        told: list[str] = []
        maker = PictureCoder("h264", 30.0, tell=told.append)
        assert len([maker.encode(frame, False) for frame in pictures(3)]) == 3
    assert not told  # it was not tried again
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("breaks_at", [0, 1, 17, 45])
def test_a_recording_goes_on_when_the_card_fails(suffix: str, breaks_at: int, tmp_path: Path) -> None:
    path, shown = tmp_path / f"out.{suffix}", pictures(45)
    with closing(
        FileSink(path, VideoSpec(*SIZE, fps=30.0, live=True, time_base=Fraction(1, 90_000)), "h264", 12)
    ) as sink:
        sink._encoder = FakeCard(sink._stream, breaks_at)  # type: ignore[assignment]
        for frame in shown:
            sink.write(frame)
    contents = read_back(path)
    assert len(contents.pts) == 45
    assert all(psnr(a, b.image) > 30 for a, b in zip(contents.images, shown, strict=True))
    with av.open(str(path)) as container:  # also for one who jumps into it
        container.seek(1_000_000)
        late = next(container.decode(video=0))
        assert late.pts is not None
        number = round(float(late.pts * late.time_base) * 30)
        assert psnr(late.to_ndarray(format="rgb24"), shown[number].image) > 30


def test_a_recording_without_a_free_session_begins_with_x264(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hardware, "uses_nvenc", lambda size: True)
    monkeypatch.setattr(hardware, "NVENC", "h264_v4l2m2m")  # listed, and nowhere to be opened
    path = tmp_path / "out.mp4"
    with closing(FileSink(path, VideoSpec(*SIZE, fps=30.0, live=True), "h264", 20)) as sink:
        for frame in pictures(5):
            sink.write(frame)
    assert len(read_back(path).pts) == 5
    assert len(caplog.records) == 1


# the real thing


@pytest.fixture
def gpu() -> None:
    """A driver that FFmpeg can load; where there is one, torch has it too."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a gpu: no CUDA device here")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_nvdec_shows_what_software_shows(clip: Path) -> None:
    if lack := hardware.lack_of_device("cuda"):
        pytest.skip(f"this gpu does not decode: {lack}")
    plain = frames_of(clip)
    hardware.choose("cuda", "auto")
    with closing(open_source(str(clip))) as source:
        frames = list(source.frames())
        assert source._decoder.device == "cuda"  # type: ignore[attr-defined]
    assert [frame.pts for frame in frames] == [frame.pts for frame in plain]
    assert all(psnr(one.image, other.image) > 35 for one, other in zip(frames, plain, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_nvenc_encodes_at_once_and_makes_keyframes_on_request(tmp_path: Path) -> None:
    if lack := hardware.lack_of_nvenc():
        pytest.skip(f"this gpu does not encode: {lack}")
    hardware.choose("auto", "nvenc")
    maker, shown = PictureCoder("h264", 30.0), pictures(20)
    packets = [maker.encode(frame, number == 10) for number, frame in enumerate(shown)]
    assert [len(at_once) for at_once in packets] == [1] * 20
    assert [at_once[0].keyframe for at_once in packets] == [number in (0, 10) for number in range(20)]
    seen = decode([at_once[0] for at_once in packets])
    assert all(psnr(a.to_ndarray(format="rgb24"), b.image) > 28 for a, b in zip(seen, shown, strict=True))
    with closing(FileSink(tmp_path / "out.mp4", VideoSpec(*SIZE, fps=30.0, live=True), "h264", 18)) as sink:
        for frame in shown:
            sink.write(frame)
    assert len(read_back(tmp_path / "out.mp4").pts) == 20
