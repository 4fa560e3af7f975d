"""How many live streams one device carries: sessions of one model through one worker, each with a camera of its own.

Every number of sessions is played one frame per launch, and with the frames of several sessions in one (`batch`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from accel.errors import UserError
from bench import record
from bench.pictures import first_pictures
from models.params import Params
from stream.config import load_params
from stream.frame import Frame, VideoSpec
from stream.meter import percentiles
from stream.pump import start_pump
from stream.session import Session
from stream.sink import open_sink
from stream.worker import Worker

COUNTS = (1, 2, 4)
BATCH = 4
MOST = 64
ROUNDS = 2  # of every number of sessions, the second in reverse order, so that drift cancels
CLIP_FRAMES = 32  # of the source, shown over and over
SETTLE_S = 0.5  # before the clock counts: the first frame of a stream is slow
FED = 0.95  # of the cameras' own rate, from which on they are what limits
MODE = "temporal.mode=every-frame"  # else the rate would be kept by diffusing less
PATIENCE = 60.0  # s for a session to end

Picture = NDArray[np.uint8]
Lane = tuple[int, int]  # sessions, and how many of their frames a launch takes


@dataclass(slots=True)
class Turn:
    """So many sessions for so many seconds."""

    rates: list[float]  # fps of each session
    latencies: list[float]  # ms, of all
    memory: float  # resident, MB

    @property
    def total(self) -> float:
        """Frames per second of all sessions."""
        return sum(self.rates)


class Camera:
    """A live source that shows the same pictures over and over, from the one numbered `first` on."""

    def __init__(self, pictures: Sequence[Picture], fps: float, first: int = 0) -> None:
        height, width, _ = pictures[0].shape
        self.spec = VideoSpec(width, height, fps, live=True)
        self.warnings: list[str] = []
        self.skipped = 0
        self._pictures, self._first = pictures, first
        self._closed = False

    def frames(self) -> Iterator[Frame]:
        """A picture whenever it is due, as a driver delivers it; what came while nobody took is gone."""
        began, seq, fps = time.monotonic(), -1, self.spec.fps
        while not self._closed:
            time.sleep(max(0.0, began + (seq + 1) / fps - time.monotonic()))
            now = time.monotonic()
            seq = max(seq + 1, int((now - began) * fps))
            picture = self._pictures[(self._first + seq) % len(self._pictures)]
            yield Frame(picture, round((now - began) * 1e6), seq, now)

    def close(self) -> None:
        """End at the next picture."""
        self._closed = True


def measure(
    source: str = "demo",
    model: str = "mini",
    engine: str = "auto",
    size: tuple[int, int] = (512, 288),
    counts: Sequence[int] = COUNTS,
    seconds: float = 5.0,
    fps: float = 240.0,
    settings: Sequence[str] = (),
    log: Callable[[str], None] = lambda line: None,
    batch: int = BATCH,
) -> dict[str, Any]:
    """Play each number of sessions for `seconds` altogether, and return a record. Raises UserError.

    Cameras give `fps` frames a second, which has to be more than the device can paint. Every frame that is taken is
    diffused; more than one session also with up to `batch` frames in a launch.
    """
    from models.load import load
    from models.structure import structure_of

    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise UserError(f"numbers of sessions: {', '.join(map(str, counts)) or 'none'}", hint="for example 1,2,4")
    params = load_params(sets=[MODE, *settings], model=model)
    started = record.start()
    pictures = first_pictures(source, size, CLIP_FRAMES)
    shape = (pictures[0].shape[1], pictures[0].shape[0])
    stylizer = load(model, shape, engine, log, structure=structure_of(params))
    stylizer.widen(min(batch, max(counts)))
    turns: dict[Lane, list[Turn]] = {(n, width): [] for n in counts for width in (1, min(n, stylizer.width))}
    with Worker(stylizer, batch=1) as apart, Worker(stylizer, batch=batch) as together:
        _play(apart, pictures, fps, 1, seconds / ROUNDS, params)  # warms up
        for turn in range(ROUNDS):
            for count, width in list(turns)[:: 1 if turn % 2 == 0 else -1]:
                log(f"{_named(count, width)}, {turn + 1} of {ROUNDS}")
                worker = apart if width == 1 else together
                turns[count, width].append(_play(worker, pictures, fps, count, seconds / ROUNDS, params))
    work: dict[str, Any] = {**record.model_of(model), **record.source_of(source), "size": f"{shape[0]}x{shape[1]}"}
    work |= {"seconds": seconds, "camera_fps": fps, "settings": record.changed(params)}
    metrics = {_named(*lane): _metrics(mine) for lane, mine in turns.items()}
    return record.record("scale", started, work, metrics, _report(turns, work, dict(stylizer.info)))


def counts_of(text: str) -> tuple[int, ...]:
    """The numbers in a list with commas. Raises UserError.

    >>> counts_of("1,2,4")
    (1, 2, 4)
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) <= MOST for word in words):
        raise UserError(f"bad numbers of sessions: {text}", hint=f"from 1 to {MOST}, for example 1,2,4")
    return tuple(dict.fromkeys(map(int, words)))


def _play(worker: Worker, pictures: Sequence[Picture], fps: float, count: int, seconds: float, params: Params) -> Turn:
    cameras = [Camera(pictures, fps, first=i * len(pictures) // count) for i in range(count)]
    sessions = [worker.open(params, True, fps=fps) for _ in cameras]
    readers = []
    for camera, session in zip(cameras, sessions, strict=True):
        session.attach(open_sink("null", camera.spec), lossless=False)
        readers.append(start_pump(partial(Camera, pictures, fps), session, first=camera))
    try:
        _wait(sessions, SETTLE_S)
        before, begun = [session.meter.frames_out for session in sessions], time.monotonic()
        _wait(sessions, seconds)
        took = time.monotonic() - begun
        after = [session.meter.frames_out for session in sessions]
        counted = [b - a for a, b in zip(before, after, strict=True)]
        newest = [s.meter.samples()[0][-n:] for s, n in zip(sessions, counted, strict=True) if n]
        memory = psutil.Process(os.getpid()).memory_info().rss / 1e6
    finally:
        for session in sessions:
            session.stop()
    for session, reader in zip(sessions, readers, strict=True):
        session.join(PATIENCE)
        reader.join(PATIENCE)
    return Turn([n / took for n in counted], [ms for latencies in newest for ms in latencies], memory)


def _wait(sessions: Sequence[Session], seconds: float) -> None:
    """Sleep; what broke a session is raised at once."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))
        for session in sessions:
            if session.error:
                raise session.error


def _named(count: int, width: int) -> str:
    together = f", {width} frames a launch" if width > 1 else ""
    return f"{count} session{'s' * (count > 1)}{together}"


def _short(count: int, width: int) -> str:
    return f"{count}, {width} a launch" if width > 1 else str(count)


def _metrics(turns: Sequence[Turn]) -> dict[str, Any]:
    return {
        "total rate": record.metric("fps", "higher", [[turn.total] for turn in turns]),
        "rate of a session": record.metric("fps", "higher", [turn.rates for turn in turns]),
        "latency": record.metric("ms", "lower", [turn.latencies for turn in turns]),
        "memory": record.metric("MB", "lower", [[turn.memory] for turn in turns]),
    }


def _report(turns: dict[Lane, list[Turn]], work: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    results = {lane: _result(mine) for lane, mine in turns.items()}
    one = results[min(turns)]["fps"]
    for result in results.values():
        result["ratio"] = round(result["fps"] / one, 3) if one else 0.0
    fed = [_named(*lane) for lane, r in results.items() if r["fps"] > FED * work["camera_fps"] * lane[0]]
    limited = f" With {'; '.join(fed)} the cameras were the limit: give them more --fps." if fed else ""
    most = max(turns)
    shared = f" {_named(*most)}: {results[most]['ratio']:.2f} × the frames of {_named(*min(turns))}."
    return {
        "title": f"Sessions of {work['model']} at {work['size']}",
        "summary": f"{info.get('engine')}, one worker, cameras of {work['camera_fps']:g} fps, {work['seconds']:g} s of "
        f"each in {ROUNDS} turns.{shared}{limited}",
        "engine": info.get("engine"),
        "device": info.get("device"),
        "sessions": {_short(*lane): result for lane, result in results.items()},
        "sections": _sections(turns, results),
    }


def _result(turns: Sequence[Turn]) -> dict[str, Any]:
    latencies = [ms for turn in turns for ms in turn.latencies]
    p50, p99 = percentiles(latencies, (50, 99))
    per_session = [rate for turn in turns for rate in turn.rates]
    return {
        "fps": round(sum(turn.total for turn in turns) / len(turns), 2),
        "fps_of_a_session": {"least": round(min(per_session), 2), "most": round(max(per_session), 2)},
        "latency_ms": {"p50": p50, "p99": p99},
        "memory_mb": round(max(turn.memory for turn in turns), 1),
    }


def _sections(turns: dict[Lane, list[Turn]], results: dict[Lane, dict[str, Any]]) -> list[dict[str, Any]]:
    columns = [
        "sessions",
        "frames a launch",
        "fps in all",
        "fps of each",
        f"× {min(turns)[0]}",
        "p50 ms",
        "p99 ms",
        "MB",
    ]
    rows = [
        [
            *(str(count), str(width), f"{r['fps']:.1f}"),
            f"{r['fps_of_a_session']['least']:.1f}–{r['fps_of_a_session']['most']:.1f}",
            *(f"{r['ratio']:.2f}", f"{r['latency_ms']['p50']:.1f}", f"{r['latency_ms']['p99']:.1f}"),
            f"{r['memory_mb']:.0f}",
        ]
        for (count, width), r in results.items()
    ]
    ways = {"one frame a launch": [lane for lane in sorted(turns) if lane[1] == 1]}
    if shared := [lane for lane in sorted(turns) if lane[1] > 1]:
        ways["shared launches"] = shared
    rate = [
        {"label": label, "x": [n for n, _ in lanes], "y": [results[lane]["fps"] for lane in lanes]}
        for label, lanes in ways.items()
    ]
    latency = [
        {
            "label": f"{percent}, {label}",
            "x": [n for n, _ in lanes],
            "y": [results[lane]["latency_ms"][percent] for lane in lanes],
        }
        for label, lanes in ways.items()
        for percent in ("p50", "p99")
    ]
    return [
        {
            "kind": "table",
            "title": "Sessions",
            "note": "Frames a launch: at most. Latency: capture to sink, newest frame wins. MB: of the process, the "
            "model's own included.",
            "columns": columns,
            "rows": rows,
        },
        {"kind": "lines", "title": "Rate", "x": "sessions", "y": "fps", "series": rate},
        {"kind": "lines", "title": "Latency", "x": "sessions", "y": "ms", "series": latency},
    ]
