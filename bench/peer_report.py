"""What `bench.peers` measured, as a report."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench import record
from bench.peer_lanes import Image, Work
from bench.peer_process import Lane
from bench.peer_streamdiffusion import PACKAGE, VERSION
from stream.meter import percentiles

BLOCKS = 4  # per lane; lanes take turns, in the reverse order every other time, so that drift cancels
REFERENCE = "float32"  # the form of the peer whose pictures the others are compared with


@dataclass(slots=True)
class Run:
    """What was measured of one lane."""

    lane: Lane
    info: dict[str, Any]
    pictures: list[Image]
    blocks: list[list[float]] = field(default_factory=list)  # ms of each frame
    computed: float = 0.0  # ms of the processors' time for all frames, all threads together
    memory: float = 0.0  # the most held between two blocks, MB
    peak: float = 0.0  # MB, building included

    @property
    def rates(self) -> list[float]:
        """Frames per second of each block."""
        return [1000 * len(block) / sum(block) for block in self.blocks]


def report(
    runs: dict[str, Run],
    work: Work,
    told: dict[str, str],
    started: record.Start,
    equal: dict[str, float],
) -> dict[str, Any]:
    """The record; `told` is what tells model and source in it, `equal` is `peer_lanes.difference`."""
    fastest = max(
        (name for name in runs if name.startswith(PACKAGE)), key=lambda name: statistics.mean(runs[name].rates)
    )
    results = {name: _result(run, runs[fastest], runs[f"{PACKAGE} {REFERENCE}"]) for name, run in runs.items()}
    shape, frames = f"{work.size[0]}x{work.size[1]}", sum(map(len, runs[fastest].blocks))
    done = {**told, "size": shape, "steps": work.steps, "strength": work.strength, "prompt": work.prompt}
    done |= {"batch": work.batch, "frames": frames, "threads": work.threads}
    started.machine.update({"torch threads": str(work.threads), PACKAGE: VERSION})
    found = {
        "title": f"livestyle and StreamDiffusion {VERSION} at {shape}, {work.steps} step{'s' * (work.steps > 1)}",
        "summary": (
            f"{frames} frames of {told['source']} each, in {BLOCKS} turns; {work.threads} threads, {work.device}. "
            f"In float32 the two differ by {equal['max']:.1g} of 1 at most, {equal['mean']:.1g} on average."
        ),
        "fastest_peer": fastest,
        "equal_in_float32": equal,
        "results": results,
        "sections": _sections(runs, results, fastest),
    }
    return record.record("peers", started, done, {name: _metrics(run) for name, run in runs.items()}, found)


def _metrics(run: Run) -> dict[str, Any]:
    return {
        "rate": record.metric("fps", "higher", [[rate] for rate in run.rates]),
        "frame": record.metric("ms", "lower", run.blocks),
        "memory": record.metric("MB", "lower", [[run.memory]]),
    }


def _result(run: Run, fastest: Run, reference: Run) -> dict[str, Any]:
    times = [time for block in run.blocks for time in block]
    p50, p95, p99 = percentiles(times, (50, 95, 99))
    ratios = [ours / theirs for ours, theirs in zip(run.rates, fastest.rates, strict=True)]
    gaps = [np.abs(a.astype(int) - b) for a, b in zip(run.pictures, reference.pictures, strict=True)]
    return {
        "fps": round(1000 * len(times) / sum(times), 3),
        "fps_blocks": [round(rate, 3) for rate in run.rates],
        "ratio": round(statistics.median(ratios), 3),
        "ratio_blocks": [round(ratio, 3) for ratio in ratios],
        "frame_ms": {"p50": p50, "p95": p95, "p99": p99},
        "cpu_ms": round(run.computed / len(times), 2),  # of a frame, all threads together
        "late_frames": run.info["late"],
        "memory_mb": {"running": round(run.memory, 1), "peak": round(run.peak, 1)},
        "difference": {  # from the reference's pictures, of 255
            "mean": round(float(np.mean([gap.mean() for gap in gaps])), 4),
            "max": int(max(gap.max() for gap in gaps)),
        },
        **{key: run.info[key] for key in ("device", "versions", "load_s")},
    }


def _sections(runs: dict[str, Run], results: dict[str, Any], fastest: str) -> list[dict[str, Any]]:
    columns = ["", "fps", "ratio", "of blocks", "p50 ms", "p99 ms", "CPU ms", "frames late", "MB", "peak MB", "mean Δ"]
    rows = [
        [
            *(
                name,
                f"{r['fps']:.2f}",
                f"{r['ratio']:.2f}",
                "–".join(f"{f(r['ratio_blocks']):.2f}" for f in (min, max)),
            ),
            *(f"{r['frame_ms'][which]:.1f}" for which in ("p50", "p99")),
            *(f"{r['cpu_ms']:.1f}", r["late_frames"]),
            *(f"{r['memory_mb'][which]:.0f}" for which in ("running", "peak")),
            f"{r['difference']['mean']:.2f}",
        ]
        for name, r in results.items()
    ]
    times = {name: [time for block in run.blocks for time in block] for name, run in runs.items()}
    return [
        {
            "kind": "table",
            "title": f"ratio: fps to that of {fastest}; Δ: from {PACKAGE} {REFERENCE}, of 255",
            "note": (
                "p50 and p99: bytes in to bytes out. CPU: of a frame, all threads. "
                "Frames late: how many pictures one is behind what went in."
            ),
            "columns": columns,
            "rows": rows,
        },
        {
            "kind": "bars",
            "title": "Time of a frame, p50 and p95",
            "unit": "ms",
            "groups": [
                {
                    "label": "frame",
                    "bars": [
                        {"label": name, "value": r["frame_ms"]["p50"], "high": r["frame_ms"]["p95"]}
                        for name, r in results.items()
                    ],
                }
            ],
        },
        {
            "kind": "histogram",
            "title": "Times of frames",
            "unit": "ms",
            "series": [{"label": name, "values": values} for name, values in times.items()],
        },
    ]
