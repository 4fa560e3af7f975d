"""Sinks: what they refuse, what they survive, and what a broken-off file still holds."""

from __future__ import annotations

import errno
import itertools
import re
import subprocess
import sys
import textwrap
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from accel.errors import UserError
from stream.frame import Frame, VideoSpec
from stream.sink import SinkClosed, check_sink, open_sink
from stream.sinks import window
from tests.media import bars, bars_error, boxes, moving, read_back, write_clip

ROOT = Path(__file__).parents[1]


def spec(width: int = 192, height: int = 128, **more: object) -> VideoSpec:
    return VideoSpec(width, height, fps=30.0, live=False, **more)  # type: ignore[arg-type]


def frames(count: int, width: int = 192, height: int = 128, step: int = 33_333) -> list[Frame]:
    return [Frame(image, i * step, i, 0.0) for i, image in enumerate(moving(width, height, count))]


@pytest.mark.parametrize(
    ("name", "codec", "says"),
    [
        ("out.avi", "h264", r"\.mp4 \.mov \.mkv"),
        ("out", "h264", r"\.mp4 \.mov \.mkv"),
        ("nowhere/out.mp4", "h264", "create it"),
        ("out.mp4", "ffv1", r"out\.mkv"),
        ("out.mov", "ffv1", r"out\.mkv"),
        ("out.mp4", "vp8", "h264"),
        ("folder.mp4", "h264", "file inside"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_made(
    tmp_path: Path, name: str, codec: str, says: str
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        check_sink(str(tmp_path / name), codec=codec)
    assert re.search(says, caught.value.hint)
    assert "\n" not in caught.value.message + caught.value.hint
    with pytest.raises(UserError):
        open_sink(str(tmp_path / name), spec(), codec=codec)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match="not allowed"):
        check_sink(str(tmp_path / "out.mp4"))


def test_the_input_is_never_written_over(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "in.mp4", moving(64, 64, 3))
    link = tmp_path / "link.mp4"
    link.symlink_to(clip)
    size = clip.stat().st_size
    for name in (str(clip), str(link), str(tmp_path / "." / "in.mp4")):
        with pytest.raises(UserError, match="being read"):
            open_sink(name, spec(origin=str(clip)))
    assert clip.stat().st_size == size


def test_unknown_kinds_list_the_known_ones() -> None:
    with pytest.raises(UserError, match="ftp") as caught:
        open_sink("ftp://x/y.mp4", spec())
    assert "window" in caught.value.hint


def test_null_counts() -> None:
    with closing(open_sink("null", spec())) as sink:
        for frame in frames(3):
            sink.write(frame)
    assert sink.written == 3


@pytest.mark.parametrize("name", ["out.mp4", "out.mov", "out.mkv"])
@pytest.mark.parametrize("codec", ["h264", "mpeg4"])
def test_a_closed_file_is_ordinary_and_tagged_bt709(tmp_path: Path, name: str, codec: str) -> None:
    out = tmp_path / name
    with closing(open_sink(str(out), spec(), codec=codec)) as sink:
        for i in range(40):
            sink.write(Frame(bars(192, 128), i * 40_000, i, 0.0))
    assert sink.written == 40
    back = read_back(out)
    assert back.pts == [i * 40_000 for i in range(40)]
    assert back.tags[0] == 1
    assert back.tags[1] == 1 or (codec, name) == ("mpeg4", "out.mov")  # neither says its range: it is limited
    assert max(bars_error(image) for image in back.images) <= 10
    if name.endswith(".mp4"):
        assert "moof" not in boxes(out)
        assert boxes(out)[0] == "ftyp"
        assert "moov" in boxes(out)


def test_ffv1_is_lossless(tmp_path: Path) -> None:
    out = tmp_path / "out.mkv"
    rng = np.random.default_rng(0)
    sent = [Frame(rng.integers(0, 256, (127, 191, 3), np.uint8), i * 40_000, i, 0.0) for i in range(5)]
    with closing(open_sink(str(out), spec(191, 127), codec="ffv1")) as sink:
        for frame in sent:
            sink.write(frame)
    back = read_back(out)
    assert all(np.array_equal(a.image, b) for a, b in zip(sent, back.images, strict=True))


def test_a_last_odd_row_and_column_are_cut_off(tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    with closing(open_sink(str(out), spec(191, 127))) as sink:
        for frame in frames(5, 191, 127):
            sink.write(frame)
    assert read_back(out).images[0].shape == (126, 190, 3)


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv"])
def test_times_that_do_not_grow_are_nudged(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    times = [0, 40_000, 40_000, 40_000, 20_000, 80_000, 80_001, 120_000]
    with closing(open_sink(str(out), spec(time_base=Fraction(1, 90_000)))) as sink:
        for i, image in enumerate(moving(192, 128, len(times))):
            sink.write(Frame(image, times[i], i, 0.0))
    back = read_back(out)
    assert len(back.pts) == len(times)
    assert all(b > a for a, b in itertools.pairwise(back.pts))
    assert back.pts[-1] == 120_000
    assert sink.nudged == 4


@pytest.mark.parametrize("start", [-66_666, 0, 1_500_000])
def test_no_frame_is_lost_wherever_the_time_starts(tmp_path: Path, start: int) -> None:
    out = tmp_path / "out.mp4"
    with closing(open_sink(str(out), spec())) as sink:
        for frame in frames(10):
            sink.write(Frame(frame.image, frame.pts + start, frame.seq, 0.0))
    back = read_back(out).pts
    assert len(back) == 10
    assert abs(back[0] - max(start, 0)) <= 12


def test_a_file_without_a_frame_closes_quietly(tmp_path: Path) -> None:
    sink = open_sink(str(tmp_path / "out.mp4"), spec())
    sink.close()
    sink.close()
    assert sink.written == 0


# broken off

CHILD = """
import os, resource, sys
sys.path.insert(0, {root!r})
from stream.frame import VideoSpec, Frame
from stream.sink import open_sink
from accel.errors import UserError
from tests.media import moving
import numpy as np
how, out = sys.argv[1:]
if how in ("full", "no room"):
    room = 600_000 if how == "full" else 50
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
sink = open_sink(out, VideoSpec(192, 128, fps=30, live=False))
rng = np.random.default_rng(0)
noise = rng.integers(0, 256, (128, 192, 3), np.uint8)
try:
    for i in range(240):
        sink.write(Frame(np.roll(noise, i, 1), i * 33_333, i, 0.0))
        if how == "kill" and i == 200:
            os.kill(os.getpid(), 9)
except UserError as error:
    print(error.message, error.hint, sep="\\n")
    sink.close()
    sys.exit(2)
sink.close()
"""


def child(how: str, out: Path) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(CHILD.format(root=str(ROOT)))
    return subprocess.run(
        [sys.executable, "-c", code, how, str(out)], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("name", ["out.mp4", "out.mov", "out.mkv"])
def test_a_killed_writer_leaves_a_playable_file(tmp_path: Path, name: str) -> None:
    assert child("kill", tmp_path / name).returncode == -9
    back = read_back(tmp_path / name)
    assert 120 <= len(back.pts) <= 201
    assert back.pts[1] in (33_333, 33_000)


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv"])
def test_a_full_disk_is_two_lines_and_leaves_a_playable_file(tmp_path: Path, name: str) -> None:
    done = child("full", tmp_path / name)
    assert done.returncode == 2, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert "cannot go on writing" in done.stdout
    assert done.stderr == ""
    assert (tmp_path / name).stat().st_size <= 600_000
    assert len(read_back(tmp_path / name).pts) >= 20


@pytest.mark.parametrize("name", ["out.mp4", "out.mov", "out.mkv"])
def test_a_disk_without_any_room_is_two_lines(tmp_path: Path, name: str) -> None:
    done = child("no room", tmp_path / name)
    assert (done.returncode, done.stderr) == (2, "")  # FFmpeg's muxer does not survive another packet
    assert "cannot go on writing" in done.stdout


def test_a_disk_that_fills_while_closing_leaves_a_playable_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.mp4"
    sink = open_sink(str(out), spec())
    for frame in frames(150):
        sink.write(frame)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("stream.sinks.disk.os.write", full)
    with pytest.raises(UserError, match="no space left"):
        sink.close()
    monkeypatch.undo()
    assert len(read_back(out).pts) >= 60


def test_pictures_of_another_size_are_brought_to_the_files(tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    with closing(open_sink(str(out), spec())) as sink:
        sink.write(frames(1)[0])
        sink.write(Frame(bars(320, 240), 40_000, 1, 0.0))
        sink.write(Frame(bars(64, 64), 80_000, 2, 0.0))
    assert [image.shape for image in read_back(out).images] == [(128, 192, 3)] * 3


# window


def test_a_window_needs_a_screen_and_a_library_that_has_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window.sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(UserError, match="no screen"):
        open_sink("window", spec())
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "  GUI:                           NONE\n")
    with pytest.raises(UserError, match="headless"):
        open_sink("window", spec())


def test_closing_the_window_or_q_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = iter([-1, -1, ord("q")])
    shown: list[np.ndarray] = []
    for name, fake in {
        "namedWindow": lambda *_: None,
        "resizeWindow": lambda *_: None,
        "imshow": lambda _, image: shown.append(image),
        "waitKey": lambda _: next(keys),
        "getWindowProperty": lambda *_: 1.0,
        "destroyAllWindows": lambda: None,
    }.items():
        monkeypatch.setattr(cv2, name, fake, raising=False)
    red = Frame(np.full((8, 8, 3), (255, 0, 0), np.uint8), 0, 0, 0.0)
    sink = window.WindowSink(spec(8, 8))
    sink.write(red)
    sink.write(red)
    assert shown[0][0, 0].tolist() == [0, 0, 255]  # OpenCV shows BGR
    with pytest.raises(SinkClosed):
        sink.write(red)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: 0.0)
    with pytest.raises(SinkClosed, match="closed"):
        sink.write(red)
    sink.close()
    sink.close()
