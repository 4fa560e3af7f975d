"""Source to file and back: frames, pts and sound are equal."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from stream.sink import open_sink
from stream.source import open_source
from tests.media import CLIPS, audio_sizes, bars, bars_error, moving, read_back, write_clip


def through(clip: Path, out: Path, *, limit: int | None = None, codec: str = "h264") -> list[str]:
    """Copy the pictures of `clip` into `out`, unstyled; the warnings of both ends."""
    with closing(open_source(str(clip))) as source, closing(open_sink(str(out), source.spec, codec=codec)) as sink:
        for count, frame in enumerate(source.frames()):
            if count == limit:
                break
            sink.write(frame)
    return [*source.warnings, *sink.warnings]


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
@pytest.mark.parametrize(
    "how",
    [
        {"fps": 25},
        {"fps": 60},
        {"pts": [3003 * i for i in range(30)]},  # 29.97
        {"pts": [0, 1000, 9000, 9050, 40_000, *range(50_000, 300_000, 10_000)]},
        {"pts": [135_000 + 3000 * i for i in range(30)]},
        {"options": {"bf": "2", "preset": "fast"}},
        {"pix_fmt": "yuv420p10le"},
        {"pix_fmt": "yuvj420p", "full_range": True},
    ],
    ids=["25", "60", "29.97", "vfr", "late", "bframes", "10bit", "full"],
)
def test_frames_and_pts_are_equal_in_mp4(tmp_path: Path, how: dict[str, object], suffix: str) -> None:
    clip = write_clip(tmp_path / "in.mp4", moving(128, 96, 30), **how)  # type: ignore[arg-type]
    out = tmp_path / f"out{suffix}"
    assert through(clip, out) == []
    before, after = read_back(clip), read_back(out)
    assert after.pts == before.pts
    differences = [np.abs(a.astype(int) - b).mean() for a, b in zip(before.images, after.images, strict=True)]
    assert max(differences) < 6


def test_pts_in_matroska_are_equal_to_the_millisecond(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "in.mp4", moving(128, 96, 30), pts=[3003 * i for i in range(30)])
    assert through(clip, tmp_path / "out.mkv") == []
    pairs = zip(read_back(clip).pts, read_back(tmp_path / "out.mkv").pts, strict=True)
    assert all(abs(a - b) <= 500 for a, b in pairs)


def test_colours_survive_both_ways(tmp_path: Path) -> None:
    for matrix in (1, 6):
        clip = write_clip(tmp_path / "in.mp4", [bars(320, 192)] * 10, matrix=matrix)
        through(clip, tmp_path / "out.mp4")
        assert max(bars_error(image) for image in read_back(tmp_path / "out.mp4").images) <= 8


SOUND = [
    ("aac", ".mp4", ".mp4"),
    ("aac", ".mp4", ".mkv"),
    ("aac", ".mkv", ".mp4"),
    ("libopus", ".mkv", ".mkv"),
    ("libopus", ".mkv", ".mp4"),
    ("libmp3lame", ".mp4", ".mp4"),
    ("pcm_s16le", ".mov", ".mov"),
]


@pytest.mark.parametrize(("codec", "source", "target"), SOUND)
@pytest.mark.parametrize("start", [0.0, 0.25])
def test_sound_is_copied_packet_by_packet(tmp_path: Path, codec: str, source: str, target: str, start: float) -> None:
    clip = write_clip(tmp_path / f"in{source}", moving(128, 96, 45), audio=codec, audio_start=start)
    out = tmp_path / f"out{target}"
    assert through(clip, out) == []
    before, after = read_back(clip, pictures=False), read_back(out, pictures=False)
    assert len(before.audio) > 5
    if codec.startswith("pcm"):  # MOV cuts raw samples into packets as it likes
        assert sum(size for _, size in after.audio) == sum(size for _, size in before.audio)
        assert after.audio[0][0] == before.audio[0][0]
        return
    assert [size for _, size in after.audio] == [size for _, size in before.audio]
    offsets = [b[0] - a[0] for a, b in zip(before.audio, after.audio, strict=True)]
    moved = (after.pts[0] - before.pts[0]) * 1e-6  # pictures and sound move together
    assert all(abs(offset - moved) <= 0.0021 for offset in offsets)


def test_sound_longer_than_the_pictures_is_kept_whole(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "in.mp4", moving(128, 96, 30), audio="aac", audio_s=3.0)
    through(clip, tmp_path / "out.mp4")
    assert len(read_back(tmp_path / "out.mp4").audio) == len(read_back(clip).audio)


def test_sound_ends_with_the_pictures_when_they_are_cut(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "in.mp4", moving(128, 96, 90), audio="aac")
    through(clip, tmp_path / "out.mp4", limit=30)
    back = read_back(tmp_path / "out.mp4")
    assert len(back.pts) == 30
    assert 0.9 < back.audio[-1][0] < 1.01


def test_a_codec_the_container_cannot_hold_is_one_warning(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "in.mkv", moving(128, 96, 20), audio="wavpack")
    warnings = through(clip, tmp_path / "out.mp4")
    assert len(warnings) == 1
    assert "no sound" in warnings[0]
    back = read_back(tmp_path / "out.mp4")
    assert (len(back.pts), back.audio) == (20, [])


@pytest.mark.skipif(not CLIPS, reason="the shared clips are not here (LIVESTYLE_SHARED)")
@pytest.mark.parametrize("clip", CLIPS, ids=lambda path: path.stem)
def test_real_clips_come_back_with_equal_times_and_sound(tmp_path: Path, clip: Path) -> None:
    out = tmp_path / "out.mp4"
    with (
        closing(open_source(str(clip), size=(128, 128))) as source,
        closing(open_sink(str(out), source.spec)) as sink,
    ):
        sent = []
        for frame in source.frames():
            sent.append(frame.pts)
            sink.write(frame)
    assert read_back(out, pictures=False).pts == sent
    assert audio_sizes(out) == audio_sizes(clip)
    assert sink.warnings == []
