"""Sources: sizes, colour, rotation, time, and everything that can be wrong with a file or a stream."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from accel.errors import UserError
from stream import pacing
from stream.fit import fit_size, round_size
from stream.frame import Frame, VideoSpec, to_ticks, to_us
from stream.source import Source, SourceLost, open_source, retry_delays, scheme_of
from stream.sources import camera, network
from stream.sources.container import ContainerSource, Opening
from stream.sources.realtime import Realtime
from tests.media import CLIPS, TB, bars, bars_error, moving, read_back, write_clip
from tests.rtsp import RtspServer


def frames_of(url: object, **how: object) -> list[Frame]:
    with closing(open_source(str(url), **how)) as source:  # type: ignore[arg-type]
        return list(source.frames())


# sizes


@pytest.mark.parametrize(
    ("native", "box", "mode", "scaled", "size"),
    [
        ((1280, 720), (512, 512), "fit", (512, 288), (512, 288)),
        ((405, 717), (512, 512), "fit", (288, 512), (288, 512)),
        ((640, 480), (512, 288), "fit", (384, 288), (384, 288)),
        ((320, 240), (512, 512), "fit", (512, 384), (512, 384)),
        ((4000, 10), (512, 512), "fit", (512, 8), (512, 8)),
        ((1280, 720), (512, 512), "crop", (911, 512), (512, 512)),
        ((405, 717), (512, 288), "crop", (512, 907), (512, 288)),
        ((512, 288), (512, 288), "crop", (512, 288), (512, 288)),
        ((405, 717), (512, 288), "stretch", (512, 288), (512, 288)),
    ],
)
def test_a_picture_comes_into_its_box(native, box, mode, scaled, size) -> None:
    fit = fit_size(native, box, mode)
    assert (fit.scaled, fit.size) == (scaled, size)


def test_fit_is_never_outside_the_box_and_always_a_multiple_of_8() -> None:
    for width, height in itertools.product(range(3, 3000, 137), repeat=2):
        size = fit_size((width, height), (520, 296)).size
        assert size[0] <= 520
        assert size[1] <= 296
        assert size[0] % 8 == size[1] % 8 == 0 < min(size)
    assert round_size(1, 1) == (8, 8)
    with pytest.raises(ValueError, match="no such fit"):
        fit_size((1, 1), (8, 8), "cover")


def test_ticks_survive_the_way_over_microseconds() -> None:
    for base in (TB, Fraction(1, 600), Fraction(1001, 30_000), Fraction(1, 1000)):
        assert all(to_ticks(to_us(pts, base), base) == pts for pts in (*range(-50, 2000, 7), 10**9 + 7))


# files


@pytest.mark.parametrize("size", [(405, 717), (641, 361), (320, 240)])
def test_odd_sizes_are_delivered_whole(tmp_path: Path, size: tuple[int, int]) -> None:
    clip = write_clip(tmp_path / "odd.mkv", [bars(*size)] * 3, pix_fmt="yuv444p")
    plain = frames_of(clip)
    assert [f.image.shape for f in plain] == [(size[1], size[0], 3)] * 3
    assert bars_error(plain[0].image) <= 6
    fitted = frames_of(clip, size=(256, 256))[0].image
    assert fitted.shape[0] % 8 == fitted.shape[1] % 8 == 0
    assert fitted.flags.c_contiguous


@pytest.mark.parametrize("box", [None, (512, 288)])
@pytest.mark.parametrize(
    ("pix_fmt", "matrix", "full"),
    [
        ("yuv420p", 1, False),
        ("yuv420p", 6, False),
        ("yuv420p", 2, False),  # says nothing: BT.601 at this size
        ("yuvj420p", 1, True),
        ("yuv420p", 6, True),
        ("yuv420p10le", 1, False),
        ("yuv420p10le", 6, True),
        ("yuv422p", 1, False),
    ],
)
def test_colour_bars_keep_their_colours(tmp_path: Path, pix_fmt, matrix, full, box) -> None:
    clip = write_clip(tmp_path / "bars.mkv", [bars(640, 360)] * 2, pix_fmt=pix_fmt, matrix=matrix, full_range=full)
    for frame in frames_of(clip, size=box):
        assert bars_error(frame.image) <= 6


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_clips_stand_upright(tmp_path: Path, rotation: int) -> None:
    upright = np.zeros((128, 192, 3), np.uint8)
    upright[:64, :96] = (255, 0, 0)  # red top left, green top right, blue bottom left
    upright[:64, 96:] = (0, 255, 0)
    upright[64:, :96] = (0, 0, 255)
    stored = np.ascontiguousarray(np.rot90(upright, -rotation // 90))  # a player turns it counterclockwise again
    clip = write_clip(tmp_path / "turned.mp4", [stored] * 2, rotation=rotation)
    with closing(open_source(str(clip))) as source:
        image = next(source.frames()).image
    assert (source.spec.width, source.spec.height) == (192, 128)
    assert np.abs(image[32::64, 48::96].astype(int) - upright[32::64, 48::96]).max() <= 6
    assert frames_of(clip, size=(96, 96))[0].image.shape == (64, 96, 3)


def test_anamorphic_pixels_become_square(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "pal.mp4", [bars(720, 576)] * 2, sar=Fraction(64, 45), matrix=6)
    with closing(open_source(str(clip), size=(512, 512))) as source:
        assert source.spec.native == (1024, 576)
        assert next(source.frames()).image.shape == (288, 512, 3)


def test_variable_frame_rate_keeps_every_pts(tmp_path: Path) -> None:
    pts = [4500, 7503, 7600, 20_000, 90_001, 90_500, 180_000]
    frames = frames_of(write_clip(tmp_path / "vfr.mp4", moving(64, 64, 7), pts=pts))
    assert [to_ticks(f.pts, TB) for f in frames] == pts
    assert [f.seq for f in frames] == list(range(7))


def test_b_frames_come_in_order_of_showing(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "b.mp4", moving(64, 64, 40), options={"bf": "3", "preset": "fast"})
    assert [f.pts for f in frames_of(clip)] == read_back(clip).pts == sorted({f.pts for f in frames_of(clip)})


def test_a_change_of_resolution_keeps_the_delivered_size(tmp_path: Path) -> None:
    small = write_clip(tmp_path / "a.h264", [bars(320, 180)] * 3)
    large = write_clip(tmp_path / "b.h264", [bars(640, 360)] * 3)
    both = tmp_path / "both.h264"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    for fit in ("fit", "crop"):
        frames = frames_of(both, size=(256, 256), fit=fit)
        assert len(frames) == 6
        assert len({f.image.shape for f in frames}) == 1
    assert bars_error(frames_of(both)[-1].image) <= 6
    assert all(b.pts > a.pts for a, b in itertools.pairwise(frames_of(both)))  # raw H.264 has no pts of its own


@pytest.mark.parametrize("keep", [0.35, 0.8])
def test_a_cut_off_file_gives_what_it_has_and_one_warning(tmp_path: Path, keep: float) -> None:
    whole = write_clip(tmp_path / "whole.mkv", moving(320, 192, 90))
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * keep)])
    with closing(open_source(str(cut))) as source:
        count = len(list(source.frames()))
    assert 0 < count < 90
    assert count == len(read_back(cut).pts)
    assert len(source.warnings) == 1
    assert "cut short" in source.warnings[0]
    with closing(open_source(str(whole))) as source:
        assert len(list(source.frames())) == 90
    assert source.warnings == []


def test_damage_in_the_middle_is_skipped_and_counted(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "hurt.mp4", moving(320, 192, 60))
    data = bytearray(clip.read_bytes())
    start = data.index(b"mdat") + len(data) // 3
    data[start : start + 30_000] = bytes(30_000)  # a smaller hole is concealed by the decoder
    clip.write_bytes(data)
    with closing(open_source(str(clip))) as source:
        count = len(list(source.frames()))
    assert 30 < count < 60
    assert source.skipped == 60 - count
    assert any("damaged" in line for line in source.warnings)


def audio_only(folder: Path) -> Path:
    with av.open(str(folder / "song.wav"), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
    return folder / "song.wav"


def no_frames(folder: Path) -> Path:
    clip = write_clip(folder / "frames.mkv", moving(64, 64, 5))
    data = clip.read_bytes()
    clip.write_bytes(data[: data.index(bytes.fromhex("1f43b675"))])  # up to the first Matroska cluster
    return clip


def text(folder: Path) -> Path:
    (folder / "letter.mp4").write_text("dear reader, this is no film\n" * 50)
    return folder / "letter.mp4"


def nothing(folder: Path) -> Path:
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "gone.mp4", "no such file"),
        (lambda folder: folder, "is a folder"),
        (text, "not a video"),
        (nothing, "is empty"),
        (audio_only, "no video in"),
        (no_frames, "no picture can be decoded"),
    ],
)
def test_what_is_no_video_is_the_users_to_mend(tmp_path: Path, make, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        open_source(str(make(tmp_path)))
    assert caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


def test_unknown_schemes_list_the_known_ones() -> None:
    with pytest.raises(UserError, match="gopher") as caught:
        scheme_of("gopher://x")
    assert "rtsp://" in caught.value.hint


def test_closing_in_the_middle_ends_the_frames(tmp_path: Path) -> None:
    source = open_source(str(write_clip(tmp_path / "a.mp4", moving(64, 64, 30))))
    seen = []
    for frame in source.frames():
        seen.append(frame)
        if len(seen) == 3:
            source.close()
    assert len(seen) == 3
    assert source.warnings == []
    source.close()
    assert list(source.frames()) == []


def test_closing_from_another_thread_never_pulls_the_file_from_under_the_reader(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", moving(64, 64, 200))
    for _ in range(10):
        source = open_source(str(clip))
        seen, started = [], threading.Event()

        def read(source: Source = source, seen: list[Frame] = seen, started: threading.Event = started) -> None:
            for frame in source.frames():
                seen.append(frame)
                started.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert started.wait(10)
        source.close()
        reader.join(10)
        assert not reader.is_alive()
        assert seen


@pytest.mark.skipif(not CLIPS, reason="the shared clips are not here (LIVESTYLE_SHARED)")
@pytest.mark.parametrize("clip", CLIPS, ids=lambda path: path.stem)
def test_real_clips_are_delivered_whole_and_in_order(clip: Path) -> None:
    with closing(open_source(str(clip), size=(256, 256))) as source:
        pts = [f.pts for f in source.frames()]
    assert pts == read_back(clip, pictures=False).pts
    assert all(b > a for a, b in itertools.pairwise(pts))
    assert source.warnings == []
    assert source.skipped == 0


# demo and test pattern


@pytest.mark.parametrize("name", ["demo", "test"])
def test_built_in_pictures_move_and_are_deterministic(name: str) -> None:
    for size in ((512, 288), (256, 256), (288, 512)):
        with closing(open_source(name, size=size)) as one, closing(open_source(name, size=size)) as two:
            first = list(itertools.islice(one.frames(), 5))
            again = list(itertools.islice(two.frames(), 5))
        assert first[0].image.shape == (size[1], size[0], 3)
        assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))
        assert all(np.abs(a.image.astype(int) - b.image).max() > 0 for a, b in itertools.pairwise(first))
        assert [f.pts for f in first] == [0, 33_333, 66_667, 100_000, 133_333]
        assert not one.spec.live


def test_the_demo_moves_smoothly_without_jumps() -> None:
    with closing(open_source("demo", size=(128, 72))) as source:
        images = [f.image.astype(int) for f in itertools.islice(source.frames(), 30 * 36)]  # once through all scenes
    steps = np.array([np.abs(b - a).mean() for a, b in itertools.pairwise(images)])
    assert steps.min() > 0.05
    assert steps.max() < 12


# real time


class Recorded:
    """A source that needs no file."""

    def __init__(self, pts: list[int]) -> None:
        self.spec = VideoSpec(8, 8, fps=25, live=False)
        self.warnings: list[str] = []
        self.skipped = 0
        self.closed = False
        self._pts = pts

    def frames(self) -> Iterator[Frame]:
        for seq, pts in enumerate(self._pts):
            yield Frame(np.zeros((8, 8, 3), np.uint8), pts, seq, 0.0)

    def close(self) -> None:
        self.closed = True


def test_a_recording_plays_at_its_own_rate() -> None:
    now = [100.0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 6))
        now[0] += seconds

    source = Realtime(Recorded([5_000_000, 5_040_000, 5_120_000, 5_130_000]), clock=lambda: now[0], sleep=sleep)
    frames = source.frames()
    next(frames)
    next(frames)
    now[0] += 0.2  # the reader was slow: what is late comes at once
    late = [next(frames).captured, next(frames).captured]
    assert slept == [0.04]
    assert late == [now[0], now[0]]
    assert source.spec.live
    source.close()
    assert list(frames) == []


def test_due_times_do_not_drift() -> None:
    assert pacing.due(3_600_000_000, 0, 10.0) == 3610.0
    assert pacing.wait(500_000, 0, 10.0, 10.2) == pytest.approx(0.3)
    assert pacing.wait(500_000, 0, 10.0, 11.0) == 0.0


def test_realtime_wraps_recordings_only(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", moving(64, 64, 3), fps=100)
    with closing(open_source(str(clip), realtime=True)) as source:
        assert source.spec.live
        assert len(list(source.frames())) == 3


# live sources


def test_retries_follow_the_schedule_of_go2rtc() -> None:
    delays = list(itertools.islice(retry_delays(jitter=lambda: 0.0), 23))
    assert delays == [1.0] * 5 + [5.0] * 5 + [10.0] * 10 + [60.0] * 3
    assert list(itertools.islice(retry_delays(jitter=lambda: 1.0), 6)) == [1.25] * 5 + [6.25]


def until_lost(source: Source) -> list[Frame]:
    seen: list[Frame] = []
    with pytest.raises(SourceLost):
        seen.extend(source.frames())
    return seen


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("scheme", ["rtsp", "rtmp", "http"])
def test_a_refused_connection_is_the_users_to_mend(scheme: str) -> None:
    with pytest.raises(UserError, match="refused") as caught:
        open_source(f"{scheme}://admin:secret@127.0.0.1:{free_port()}/x")
    assert "secret" not in str(caught.value)
    assert caught.value.hint


def test_srt_says_what_to_do_where_the_build_lacks_it() -> None:
    if "srt" in getattr(av, "protocols", ()):
        pytest.skip("this build has SRT")
    with pytest.raises(UserError, match="srt"):
        open_source("srt://127.0.0.1:1")


def test_a_missing_camera_lists_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camera, "cameras", lambda: ["/dev/video7"])
    with pytest.raises(UserError, match="camera:93") as caught:
        open_source("camera:93")
    if sys.platform == "linux":
        assert "/dev/video7" in caught.value.hint


def test_passwords_stay_out_of_names() -> None:
    assert network.public("rtsp://u:p@h:554/a?token=t") == "rtsp://h:554/a"


def test_a_live_stream_that_ends_is_lost(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", moving(64, 64, 10), pts=[9000 + 3000 * i for i in range(10)])
    ticks = itertools.count(step=0.01)  # every packet is waited for: nothing piled up
    source = ContainerSource(av.open(str(clip)), Opening("cam", live=True, clock=lambda: next(ticks)))
    assert len(until_lost(source)) == 10
    source = ContainerSource(av.open(str(clip)), Opening("cam", live=True, clock=lambda: next(ticks)))
    frames = source.frames()
    assert [next(frames).pts for _ in range(10)] == [round(i * 1e6 / 30) for i in range(10)]  # since it opened


class SlowContainer:
    """A container whose packets take the given times to come, in s."""

    def __init__(self, path: Path, waits: Iterator[float]) -> None:
        self._container, self._waits = av.open(str(path)), waits
        self.now = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self._container, name)

    def demux(self, stream: av.VideoStream) -> Iterator[object]:
        for packet in self._container.demux(stream):
            self.now += next(self._waits)
            yield packet


def test_what_piled_up_before_reading_is_thrown_away(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", moving(64, 64, 30), options={"preset": "ultrafast", "tune": "zerolatency"})
    slow = SlowContainer(clip, itertools.chain([0.0] * 20, itertools.repeat(0.033)))
    source = ContainerSource(slow, Opening("cam", live=True, clock=lambda: slow.now))  # type: ignore[arg-type]
    pts = [frame.pts for frame in until_lost(source)]
    assert pts == [round(i * 1e6 / 30) for i in (0, *range(20, 30))]


def test_an_rtsp_camera_is_read_until_it_breaks_off_and_can_be_opened_again() -> None:
    server = RtspServer(moving(320, 192, 10), rounds=60, clients=2)
    server.start()
    for _ in range(2):
        with closing(open_source(server.url, size=(256, 256))) as source:
            assert source.spec.live
            assert (source.spec.width, source.spec.height) == (256, 152)
            seen = until_lost(source)
        assert len(seen) >= 20
        assert seen[0].pts == 0
        assert all(b.pts > a.pts for a, b in itertools.pairwise(seen))
    assert all("TCP" in transport for transport in server.transports)
    server.join(10)
    with pytest.raises(UserError, match="refused"):
        open_source(server.url)


def test_http_recordings_are_read_to_their_end(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", moving(64, 64, 12), audio="aac")
    server = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HTTP_SERVER), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        url = f"http://127.0.0.1:{port}/a.mp4"
        with closing(open_source(url)) as source:
            assert not source.spec.live
            assert source.spec.audio == url
            assert len(list(source.frames())) == 12
        with pytest.raises(UserError, match=r"404|not found"):
            open_source(f"http://127.0.0.1:{port}/gone.mp4")
    finally:
        server.kill()
        server.wait()
        if server.stdout:
            server.stdout.close()


HTTP_SERVER = """
    import functools, http.server, sys
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
    handler.func.log_message = lambda *a: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
"""
