"""What one session costs on each engine: rate, capture-to-sink latency, stages, and the share outside the networks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accel.errors import UserError
from models.params import Params
from stream.meter import percentiles
from stream.pump import start_pump
from stream.session import Session
from stream.sink import open_sink
from stream.source import open_source
from stream.worker import Worker

if TYPE_CHECKING:
    from models.stylizer import Stylizer

BLOCKS = 4  # per engine; engines take turns, in the reverse order every other time, so that drift cancels
WARM_UP = 8  # frames of each engine that are not counted
NETWORKS = ("encode", "unet", "decode")
PATIENCE = 600.0  # s for one block


@dataclass(slots=True)
class Lane:
    """One engine and what was measured of it, ms."""

    worker: Worker
    stylizer: Stylizer
    info: dict[str, Any]
    rates: list[float] = field(default_factory=list)  # fps of each block
    latencies: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)
    captured: int = 0  # live
    dropped: int = 0


def measure(
    source: str = "demo",
    model: str = "mini",
    engines: tuple[str, ...] = ("openvino", "torch"),
    size: tuple[int, int] = (512, 288),
    frames: int = 240,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the same `frames` on every engine in one process, in interleaved blocks, and report.

    Rate and stages come from reading as fast as possible; latency from the same frames at the source's own rate, as
    from a camera, where a busy engine drops frames. The last engine is what `ratio` refers to.
    """
    from models.load import load

    if not engines or len(set(engines)) < len(engines):
        raise UserError(f"engines to compare: {', '.join(engines) or 'none'}", hint="name each engine once")
    opened = open_source(source, size=size)
    shape = (opened.spec.width, opened.spec.height)
    opened.close()
    lanes: dict[str, Lane] = {}
    with ExitStack() as workers:
        for engine in engines:
            stylizer = load(model, shape, engine, log)
            worker = workers.enter_context(Worker(stylizer))
            lanes[engine] = Lane(worker, stylizer, dict(stylizer.info))
            _play(lanes[engine], source, size, WARM_UP, realtime=False)
        per_block = max(2, -(-frames // BLOCKS))
        for block in range(BLOCKS):
            log(f"block {block + 1} of {BLOCKS}")
            order = engines if block % 2 == 0 else engines[::-1]
            for engine in order:
                _block(lanes[engine], source, size, per_block)
    return _report(lanes, source, model, shape, per_block * BLOCKS)


def text(report: dict[str, Any]) -> str:
    """The tables of a report for a terminal, those of `bench.engines` too."""
    return "\n\n".join(_table(section) for section in report["sections"] if section["kind"] == "table")


def _table(section: dict[str, Any]) -> str:
    rows = [list(map(str, section["columns"]))]
    rows += [["–" if cell is None else str(cell) for cell in row] for row in section["rows"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([section["title"], *lines])


def _block(lane: Lane, source: str, size: tuple[int, int], frames: int) -> None:
    meter = _play(lane, source, size, frames, realtime=False).meter
    lane.rates.append(meter.fps())
    for name, times in meter.samples()[1].items():
        lane.stages.setdefault(name, []).extend(times)
    live = _play(lane, source, size, frames, realtime=True).meter
    lane.latencies.extend(live.samples()[0])
    lane.captured += live.frames_in
    lane.dropped += live.dropped


def _play(lane: Lane, url: str, size: tuple[int, int], frames: int, *, realtime: bool) -> Session:
    source = open_source(url, size=size, realtime=realtime)
    live = source.spec.live
    session = lane.worker.open(Params(), live)
    session.attach(open_sink("null", source.spec), lossless=not live)
    reader = start_pump(lambda: open_source(url, size=size), session, first=source, frames=frames)
    if not session.join(PATIENCE):
        session.stop()
        raise UserError(f"{lane.info.get('engine')}: {frames} frames took over {PATIENCE:.0f} s", hint="use --frames")
    reader.join()
    if session.error:
        raise session.error
    return session


def _report(lanes: dict[str, Lane], source: str, model: str, size: tuple[int, int], frames: int) -> dict[str, Any]:
    from bench.machine import describe

    results = {engine: _result(lane) for engine, lane in lanes.items()}
    reference = list(lanes)[-1]
    for result in results.values():
        result["ratio"] = round(result["fps"] / results[reference]["fps"], 3) if results[reference]["fps"] else 0.0
    return {
        "title": f"Latency of {model} at {size[0]}x{size[1]}",
        "summary": f"{frames} frames of {source} per engine, engines taking turns in {BLOCKS} blocks.",
        "machine": describe(),
        "source": source,
        "model": model,
        "size": f"{size[0]}x{size[1]}",
        "frames": frames,
        "reference": reference,
        "engines": results,
        "sections": _sections(lanes, results, reference),
    }


def _sections(lanes: dict[str, Lane], results: dict[str, Any], reference: str) -> list[dict[str, Any]]:
    columns = ["engine", "fps", f"× {reference}", "p50 ms", "p95 ms", "p99 ms", "dropped live", "outside networks"]
    rows = [
        [
            *(engine, f"{r['fps']:.1f}", f"{r['ratio']:.2f}"),
            *(f"{r['latency_ms'][percent]:.1f}" for percent in ("p50", "p95", "p99")),
            *(f"{r['dropped_share']:.0%}", f"{r['outside_networks']:.0%}"),
        ]
        for engine, r in results.items()
    ]
    stages = list(dict.fromkeys(name for r in results.values() for name in r["stages_ms"]))
    groups = [
        {
            "label": name,
            "bars": [
                {"label": engine, "value": r["stages_ms"][name]["p50"], "high": r["stages_ms"][name]["p95"]}
                for engine, r in results.items()
                if name in r["stages_ms"]
            ],
        }
        for name in stages
    ]
    return [
        {
            "kind": "table",
            "title": "Rate and latency",
            "note": "Rate: read as fast as possible. Latency: capture to sink, at the source's own rate, newest wins.",
            "columns": columns,
            "rows": rows,
        },
        {"kind": "bars", "title": "Stages, p50 and p95", "unit": "ms", "groups": groups},
        {
            "kind": "histogram",
            "title": "Latency",
            "unit": "ms",
            "series": [{"label": engine, "values": lane.latencies} for engine, lane in lanes.items()],
        },
        {
            "kind": "lines",
            "title": "Rate of each block",
            "x": "block",
            "y": "fps",
            "series": [
                {"label": engine, "x": list(range(1, BLOCKS + 1)), "y": lane.rates} for engine, lane in lanes.items()
            ],
        },
    ]


def _result(lane: Lane) -> dict[str, Any]:
    # Equal blocks: the rate over all of them is the harmonic mean.
    fps = len(lane.rates) / sum(1 / rate for rate in lane.rates) if all(lane.rates) else 0.0
    in_networks = sum(sum(lane.stages[name]) / len(lane.stages[name]) for name in NETWORKS if name in lane.stages)
    p50, p95, p99 = percentiles(lane.latencies, (50, 95, 99))
    stages = {name: percentiles(times, (50, 95)) for name, times in lane.stages.items()}
    return {
        "fps": round(fps, 2),
        "fps_blocks": [round(rate, 2) for rate in lane.rates],
        "latency_ms": {"p50": p50, "p95": p95, "p99": p99},
        "dropped_share": round(lane.dropped / lane.captured, 4) if lane.captured else 0.0,
        "stages_ms": {name: {"p50": low, "p95": high} for name, (low, high) in stages.items()},
        "outside_networks": round(max(0.0, 1 - in_networks * fps / 1000), 4),  # of the time per frame
        "engine": lane.info.get("engine"),
        "device": lane.info.get("device"),
        "versions": lane.info.get("versions", {}),
    }
