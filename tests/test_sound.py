"""Sound: cut into pieces, held back with the pictures, kept in recordings."""

from __future__ import annotations

import queue
import time
from contextlib import closing
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from stream.frame import Frame, VideoSpec
from stream.playout import Playout
from stream.sinks.file import FileSink
from stream.sound import PIECE_S, RATE, SAMPLES, Cutter, Delay, Sound, samples_of, sound_of
from tests.fakes import PATIENCE
from tests.media import bars


def ramp(number: int) -> NDArray[np.int16]:
    """Piece `number` of a sound whose every sample tells its place."""
    count = (np.arange(SAMPLES) + number * SAMPLES) % 30_000 + 1
    return np.stack([count, -count], axis=1).astype(np.int16)


def piece(number: int, jitter: float = 0.0) -> Sound:
    return sound_of(ramp(number), 100.0 + number * PIECE_S + jitter)


def decoded(rate: int, layout: str, samples: int, fmt: str = "s16", start: int = 0) -> av.AudioFrame:
    channels = 2 if layout == "stereo" else 1
    wave = np.sin((np.arange(samples) + start) / rate * 2 * np.pi * 440)
    data = np.repeat((wave * 12_000).astype(np.int16)[None], channels, axis=0).T.reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(data), format="s16", layout=layout)
    frame.sample_rate = rate
    return frame


# cutter


@pytest.mark.parametrize(
    ("rate", "layout", "samples"), [(48_000, "stereo", 960), (44_100, "stereo", 1024), (8_000, "mono", 160)]
)
def test_any_sound_becomes_pieces_of_20_ms_at_the_right_times(rate: int, layout: str, samples: int) -> None:
    cutter = Cutter()
    count = rate * 2 // samples  # two seconds
    pieces = []
    for i in range(count):
        pieces += cutter.put(decoded(rate, layout, samples, start=i * samples), 50.0 + i * samples / rate)
    assert 95 <= len(pieces) <= 100
    assert all(p.frame.samples == SAMPLES and p.frame.sample_rate == RATE for p in pieces)
    assert all(samples_of(p).shape == (SAMPLES, 2) for p in pieces)
    times = np.array([p.captured for p in pieces])
    assert np.abs(times - (50.0 + np.arange(len(pieces)) * PIECE_S)).max() < 0.005
    heard = np.concatenate([samples_of(p)[:, 0] for p in pieces])[RATE // 2 : RATE].astype(float)
    loudest = np.abs(np.fft.rfft(heard)).argmax() * RATE / len(heard)
    assert loudest == pytest.approx(440, abs=3)


def test_a_stream_may_change_its_rate_in_the_middle() -> None:
    cutter = Cutter()
    cutter.put(decoded(44_100, "stereo", 1024), 50.0)
    pieces = cutter.put(decoded(48_000, "mono", 4800), 50.0 + 1024 / 44_100)
    assert len(pieces) >= 4


# delay


def test_sound_leaves_with_the_pictures_of_its_time() -> None:
    delay = Delay()
    for number in range(10):
        delay.put(piece(number))
    assert delay.due(now=100.1, latency=0.15) == []
    out = delay.due(now=100.155, latency=0.15)
    assert len(out) == 1
    assert out[0].captured == pytest.approx(100.005)
    assert delay.delay == pytest.approx(0.15)


def test_what_goes_out_is_what_came_in_when_nothing_changes() -> None:
    delay = Delay()
    heard = []
    for number in range(100):
        delay.put(piece(number))
        heard += delay.due(now=100.0 + (number + 1) * PIECE_S, latency=0.1)
    samples = np.concatenate([samples_of(s)[:, 0] for s in heard]).astype(int)
    assert len(heard) == 96
    steps = np.diff(samples)
    assert set(np.unique(steps)) <= {1, -29_999}
    assert delay.silences == delay.dropped == 0


def test_the_delay_follows_by_one_per_cent_and_no_piece_is_missed() -> None:
    delay = Delay()
    seen = []
    for number in range(500):
        delay.put(piece(number))
        now = 100.0 + (number + 1) * PIECE_S
        latency = 0.1 if number < 50 else 0.15
        out = delay.due(now, latency)
        if out:
            assert delay.delay is not None
            seen.append((now, delay.delay))
    times, held = np.array(seen).T
    speed = np.diff(held) / np.diff(times)
    assert speed.max() <= 0.0101
    assert speed.min() >= -0.0001
    assert held[0] == pytest.approx(0.1, abs=0.005)
    assert held[-1] == pytest.approx(0.15, abs=0.006)
    assert len(seen) == 496
    assert delay.silences == 0


def test_a_delay_that_is_far_off_jumps() -> None:
    delay = Delay()
    for number in range(100):
        delay.put(piece(number))
        delay.due(100.0 + (number + 1) * PIECE_S, 0.1 if number < 50 else 1.0)
    assert delay.delay == pytest.approx(1.0, abs=0.005)


def test_gaps_are_silence_and_sound_after_them_is_in_time() -> None:
    delay = Delay()
    heard = []
    for number in range(100):
        if not 40 <= number < 60:
            delay.put(piece(number))
        heard += delay.due(100.0 + (number + 1) * PIECE_S, 0.1)
    quiet = [s for s in heard if not samples_of(s).any()]
    assert 18 <= len(quiet) <= 21
    assert len(heard) == 96
    assert heard[-1].captured == pytest.approx(100.0 + 95 * PIECE_S, abs=0.03)


def test_jitter_of_arrival_is_not_heard() -> None:
    delay = Delay()
    rng = np.random.default_rng(1)
    heard = []
    for number in range(300):
        delay.put(piece(number, jitter=float(rng.uniform(-0.02, 0.02))))
        heard += delay.due(100.0 + (number + 1) * PIECE_S, 0.15)
    assert delay.silences == delay.dropped == 0
    samples = np.concatenate([samples_of(s)[:, 0] for s in heard]).astype(int)
    assert np.abs(np.diff(samples))[np.abs(np.diff(samples)) < 20_000].max() <= 2


def test_a_sender_whose_clock_runs_fast_is_followed_without_a_gap() -> None:
    delay = Delay()
    for number in range(3000):  # a minute at 500 ppm: 30 ms
        delay.put(sound_of(ramp(number), 100.0 + number * PIECE_S * 0.9995))
        delay.due(100.0 + (number + 1) * PIECE_S * 0.9995, 0.1)
    assert delay.silences == delay.dropped == 0
    assert delay.delay == pytest.approx(0.1, abs=0.03)


def test_sound_that_is_slower_than_the_pictures_is_waited_for() -> None:
    delay = Delay()
    heard = []
    for number in range(200):
        if number >= 5:
            delay.put(piece(number - 5))  # 100 ms on its way
        heard += delay.due(100.0 + (number + 1) * PIECE_S, 0.03)
    assert delay.silences <= 2
    assert delay.delay == pytest.approx(0.125, abs=0.03)


def test_what_nobody_takes_is_bounded_and_counted() -> None:
    delay = Delay(most_s=1.0)
    for number in range(500):
        delay.put(piece(number))
    assert delay.dropped == 450
    out = delay.due(100.0 + 500 * PIECE_S, 0.1)
    assert len(out) == 1


def test_sound_that_begins_anew_is_taken_up_again() -> None:
    delay = Delay()
    for number in range(20):
        delay.put(piece(number))
        delay.due(100.0 + (number + 1) * PIECE_S, 0.05)
    heard = []
    for number in range(1000, 1050):  # 20 s later
        delay.put(piece(number))
        heard += delay.due(100.0 + (number + 1) * PIECE_S, 0.05)
    assert sum(bool(samples_of(s).any()) for s in heard) >= 46
    assert len(heard) <= 55


def test_a_playout_gives_sound_out_with_the_latency_of_the_pictures_and_rests_without() -> None:
    out: queue.Queue[tuple[float, Sound]] = queue.Queue()
    playout = Playout(lambda sound: out.put((time.monotonic(), sound)), lambda: 0.15)
    playout.start()
    now = time.monotonic()
    for number in range(20):
        playout.hear(sound_of(ramp(number), now + number * PIECE_S - 0.3))
    held = []
    for _ in range(10):
        left, sound = out.get(timeout=PATIENCE)
        held.append(left - sound.captured)
    assert min(held) >= 0.145
    assert np.median(held) < 0.4
    playout.close()
    playout.join(PATIENCE)
    assert not playout.is_alive()


# recordings


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv"])
def test_a_recording_keeps_live_sound_in_step_with_the_pictures(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    spec = VideoSpec(96, 64, fps=25.0, live=True)
    number = 0
    with closing(FileSink(path, spec, "h264", 23)) as sink:
        sink.sounding()
        for seq in range(75):  # 3 s; a beep of 0.2 s each second, away from 1.5 to 2.5 s
            time = seq / 25
            while number * PIECE_S < time + 0.04:
                at = number * PIECE_S
                if not 1.5 <= at < 2.5:
                    tone = 9000 * np.sin(np.arange(SAMPLES) * 0.06) * (at % 1.0 < 0.2)
                    sink.hear(sound_of(np.stack([tone, tone], 1).astype(np.int16), 700.0 + at))
                number += 1
            sink.write(Frame(bars(96, 64), round((time + 8.0) * 1e6), seq, 700.0 + time))
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        assert stream.codec_context.name == "aac"
        frames = [(float(f.pts * f.time_base), f.to_ndarray()) for f in container.decode(stream)]
    with av.open(str(path)) as container:
        pictures = [float(f.pts * f.time_base) for f in container.decode(video=0)]
    zero = pictures[0]
    assert len(pictures) == 75
    loud = np.array([time - zero for time, data in frames if np.abs(data).max() > 0.1])
    assert np.abs(np.diff([time for time, _ in frames])).max() < 0.03  # no gap
    for beep, there in ((0.0, True), (1.0, True), (2.0, False)):
        found = loud[(loud > beep - 0.3) & (loud < beep + 0.7)]
        assert bool(len(found)) is there
        if there:
            assert found.min() == pytest.approx(beep, abs=0.05)
            assert found.max() == pytest.approx(beep + 0.2, abs=0.06)


def test_a_recording_without_sound_announced_has_no_track(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with closing(FileSink(path, VideoSpec(96, 64, fps=25.0, live=True), "h264", 23)) as sink:
        sink.write(Frame(bars(96, 64), 0, 0, 1.0))
        sink.sounding()
        sink.hear(piece(0))
        sink.write(Frame(bars(96, 64), 40_000, 1, 1.04))
    with av.open(str(path)) as container:
        assert [stream.type for stream in container.streams] == ["video"]


def test_a_picture_of_another_shape_gets_bars_in_the_recording(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with closing(FileSink(path, VideoSpec(96, 64, fps=25.0, live=True), "h264", 12)) as sink:
        sink.write(Frame(np.full((64, 96, 3), 200, np.uint8), 0, 0, 1.0))
        sink.write(Frame(np.full((96, 64, 3), 200, np.uint8), 40_000, 1, 1.04))
    with av.open(str(path)) as container:
        last = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][-1]
    assert last[:, 48].min() > 180
    assert last[:, :20].max() < 30
