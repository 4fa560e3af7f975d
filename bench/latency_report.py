"""What `bench.latency` measured, as metrics, results and sections of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench import load, record
from stream.meter import percentiles

if TYPE_CHECKING:
    from models.stylizer import Stylizer
    from stream.worker import Worker

BLOCKS = 4  # per engine; engines take turns, in the reverse order every other time, so that drift cancels
NETWORKS = ("encode", "unet", "decode")
PERCENTILES = {"p50": 50, "p95": 95, "p99": 99}


@dataclass(slots=True)
class Block:
    """One engine's turn."""

    fps: float  # read as fast as possible
    stages: dict[str, list[float]]  # ms
    latencies: list[float]  # ms, at the source's own rate
    captured: int  # at that rate
    dropped: int

    @property
    def outside(self) -> float:
        """The share of a frame's time in which no network runs."""
        inside = sum(sum(self.stages[name]) / len(self.stages[name]) for name in NETWORKS if name in self.stages)
        return max(0.0, 1 - inside * self.fps / 1000)


@dataclass(slots=True)
class Lane:
    """One engine and what was measured of it."""

    worker: Worker
    stylizer: Stylizer
    info: dict[str, Any]
    blocks: list[Block] = field(default_factory=list)
    beside_load: list[Block] = field(default_factory=list)  # the same with another load running

    def latencies(self) -> list[float]:
        """Of all quiet blocks, ms."""
        return [ms for block in self.blocks for ms in block.latencies]


def metrics(lanes: dict[str, Lane]) -> dict[str, dict[str, Any]]:
    """The lanes of the record; what was measured beside other load is a lane of its own."""
    found = {}
    for engine, lane in lanes.items():
        found[engine] = _of(lane.blocks)
        if lane.beside_load:
            found[f"{engine}, beside load"] = _of(lane.beside_load)
    return found


def _of(blocks: Sequence[Block]) -> dict[str, Any]:
    stages = dict.fromkeys(name for block in blocks for name in block.stages)
    found = {
        "rate": record.metric("fps", "higher", [[block.fps] for block in blocks]),
        "latency": record.metric("ms", "lower", [block.latencies for block in blocks]),
        "outside": record.metric("of 1", "lower", [[block.outside] for block in blocks]),
    }
    times = {name: [block.stages.get(name, []) for block in blocks] for name in stages}
    return found | {f"stage {name}": record.metric("ms", "lower", each) for name, each in times.items()}


def report(lanes: dict[str, Lane], work: dict[str, Any]) -> dict[str, Any]:
    """Title, summary, results and sections, for `bench.record`."""
    results = {engine: _result(lane, lane.blocks) for engine, lane in lanes.items()}
    loaded = {engine: _result(lane, lane.beside_load) for engine, lane in lanes.items() if lane.beside_load}
    reference = list(lanes)[-1]
    for group in filter(None, (results, loaded)):
        for result in group.values():
            result["ratio"] = round(result["fps"] / group[reference]["fps"], 3) if group[reference]["fps"] else 0.0
    beside = f", and as many beside {load.cores()} busy processes" if loaded else ""
    return {
        "title": f"Latency of {work['model']} at {work['size']}",
        "summary": f"{work['frames']} frames of {work['source']} per engine, engines taking turns in {BLOCKS} "
        f"blocks{beside}.",
        "reference": reference,
        "engines": results,
        "beside_load": loaded,
        "sections": _sections(lanes, results, loaded, reference),
    }


def _sections(
    lanes: dict[str, Lane], results: dict[str, Any], loaded: dict[str, Any], reference: str
) -> list[dict[str, Any]]:
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
    series = [{"label": engine, "values": lane.latencies()} for engine, lane in lanes.items()]
    for engine, lane in lanes.items():
        if lane.beside_load:
            values = [ms for block in lane.beside_load for ms in block.latencies]
            series.append({"label": f"{engine}, beside load", "values": values})
    rates = [
        {"label": engine, "x": list(range(1, BLOCKS + 1)), "y": [block.fps for block in lane.blocks]}
        for engine, lane in lanes.items()
    ]
    return [
        _rates(results, loaded, reference),
        {
            "kind": "table",
            "title": "Stages, ms",
            "note": "Of a frame, read as fast as possible; networks are " + ", ".join(NETWORKS) + ".",
            "columns": ["engine", "stage", *PERCENTILES],
            "rows": [
                [engine, name, *(f"{times[percent]:.2f}" for percent in PERCENTILES)]
                for engine, r in results.items()
                for name, times in r["stages_ms"].items()
            ],
        },
        {"kind": "bars", "title": "Stages, p50 and p95", "unit": "ms", "groups": groups},
        {"kind": "histogram", "title": "Latency", "unit": "ms", "series": series},
        {"kind": "lines", "title": "Rate of each block", "x": "block", "y": "fps", "series": rates},
    ]


def _rates(results: dict[str, Any], loaded: dict[str, Any], reference: str) -> dict[str, Any]:
    named = results | {f"{engine}, beside load": r for engine, r in loaded.items()}
    rows = [
        [
            *(name, f"{r['fps']:.1f}", f"{r['ratio']:.2f}"),
            *(f"{r['latency_ms'][percent]:.1f}" for percent in PERCENTILES),
            *(f"{r['dropped_share']:.0%}", f"{r['outside_networks']:.1%}"),
        ]
        for name, r in named.items()
    ]
    return {
        "kind": "table",
        "title": "Rate and latency",
        "note": "Rate: read as fast as possible. Latency: capture to sink, at the source's own rate, newest wins.",
        "columns": ["engine", "fps", f"× {reference}", *(f"{p} ms" for p in PERCENTILES), "dropped live", "outside"],
        "rows": rows,
    }


def _result(lane: Lane, blocks: Sequence[Block]) -> dict[str, Any]:
    rates = [block.fps for block in blocks]
    # Equal blocks: the rate over all of them is the harmonic mean.
    fps = len(rates) / sum(1 / rate for rate in rates) if all(rates) else 0.0
    stages: dict[str, list[float]] = {}
    for block in blocks:
        for name, times in block.stages.items():
            stages.setdefault(name, []).extend(times)
    captured = sum(block.captured for block in blocks)
    return {
        "fps": round(fps, 2),
        "fps_blocks": [round(rate, 2) for rate in rates],
        "latency_ms": _percentiles([ms for block in blocks for ms in block.latencies]),
        "dropped_share": round(sum(block.dropped for block in blocks) / captured, 4) if captured else 0.0,
        "stages_ms": {name: _percentiles(times) for name, times in stages.items()},
        "outside_networks": round(sum(block.outside for block in blocks) / len(blocks), 4),  # of the time per frame
        "engine": lane.info.get("engine"),
        "device": lane.info.get("device"),
        "versions": lane.info.get("versions", {}),
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    return dict(zip(PERCENTILES, percentiles(values, tuple(PERCENTILES.values())), strict=True))
