"""Two records of the same work beside each other: the ratio of every metric, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.errors import UserError
from bench.record import read
from bench.report import number

DRAWN = 1000  # bootstrap resamples
SEED = 0  # the same two files give the same interval
TAIL = 100  # samples from which on the 99th percentile is compared too
TINY, HIGHEST = 1e-12, 1000.0  # a ratio to next to nothing is told as this
SURE = (2.5, 97.5)  # percentiles of the resampled ratios: 95 % of them lie between
APART_H = 1.0  # of two runs on one machine, from which on its drift is worth a note
LOAD = "load average"  # told for a reader; differs always


def compare(files: Sequence[Path], lanes: Sequence[str] = ()) -> dict[str, Any]:
    """A report with the ratio of B to A for every metric of the lanes that both have; see `bench.report`.

    `files` are A, B, or A, B, A, B, … of runs that took turns, whose blocks are pooled. `lanes`: one of A and one of
    B to be compared under different names (the two may be of one file). Raises UserError where the work differs.

    >>> compare([Path("before.json"), Path("after.json")])["rows"]
    """
    if len(files) < 2 or len(files) % 2:
        raise UserError(f"{len(files)} files to compare", hint="name A B, or A B A B … where runs took turns")
    records = [read(path) for path in files]
    first, second = records[0], records[1]
    for other, path in zip(records[1:], files[1:], strict=True):
        if differing := _differing(first, other):
            raise UserError(
                f"different work in {files[0].name} and {path.name}: {'; '.join(differing)}",
                hint="measure both with the same model, size, steps, frames and settings",
            )
    rows = []
    for a, b in _paired(first, second, lanes):
        every_a, every_b = ([r["lanes"].get(lane, {}) for r in records[i::2]] for i, lane in enumerate((a, b)))
        rows += _rows(a if a == b else f"{a} → {b}", every_a, every_b)
    notes = _notes(first, second, records)
    return {
        "title": f"{first['title']}: A and B",
        "summary": " ".join(f"{note[0].upper()}{note[1:]}." for note in notes),
        "notes": notes,
        "rows": rows,
        "machine": _machines(first, second),
        "sections": _sections(first, second, rows, len(files) // 2),
    }


def ratio(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], percent: float = 50) -> tuple[float, ...]:
    """The percentile of B over that of A, and the bounds of its 95 % interval.

    Blocks are drawn with replacement, then samples within each, so that what drifts from block to block widens the
    interval. One block of one sample has no spread: the bounds are the ratio itself.

    >>> ratio([[10.0, 11.0], [10.5]], [[5.0, 5.5], [5.2]])
    (0.5, …, …)
    """
    generator = np.random.default_rng(SEED)
    drawn = _drawn(b, percent, generator) / np.maximum(_drawn(a, percent, generator), TINY)
    middle = _percentile(b, percent) / max(_percentile(a, percent), TINY)
    low, high = np.percentile(drawn, SURE)
    return (min(middle, HIGHEST), min(float(low), HIGHEST), min(float(high), HIGHEST))


def _drawn(blocks: Sequence[Sequence[float]], percent: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """The percentile of each resample, (DRAWN,)."""
    sizes = np.array([len(block) for block in blocks])
    flat, begins = np.concatenate([np.asarray(block, float) for block in blocks]), np.cumsum(sizes) - sizes
    chosen = generator.integers(len(sizes), size=(DRAWN, len(sizes), 1))
    within = generator.random((DRAWN, len(sizes), round(sizes.mean()))) * sizes[chosen]
    samples = flat[begins[chosen] + within.astype(int)].reshape(DRAWN, -1)
    return np.asarray(np.percentile(samples, percent, axis=1))


def _percentile(blocks: Sequence[Sequence[float]], percent: float) -> float:
    return float(np.percentile(np.concatenate([np.asarray(block, float) for block in blocks]), percent))


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What of the work differs, in words."""
    works = [{"benchmark": r["benchmark"], **r["work"]} for r in (a, b)]
    names = dict.fromkeys(name for work in works for name in work)
    return [
        f"{n} {_said(works[0].get(n))} / {_said(works[1].get(n))}" for n in names if works[0].get(n) != works[1].get(n)
    ]


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={each}" for key, each in value.items()) or "none"
    return "unknown" if value is None else str(value)


def _paired(a: Mapping[str, Any], b: Mapping[str, Any], lanes: Sequence[str]) -> list[tuple[str, str]]:
    """The lanes that are compared: those named, those that both have, or the only one of each."""
    own = [list(r["lanes"]) for r in (a, b)]
    if lanes:
        if len(lanes) != 2:
            raise UserError("--lane is given once for A and once for B", hint="--lane openvino --lane torch")
        for lane, known in zip(lanes, own, strict=True):
            if lane not in known:
                raise UserError(f"no lane {lane} here", hint=f"there are: {', '.join(known) or 'none'}")
        return [(lanes[0], lanes[1])]
    if both := [lane for lane in own[0] if lane in own[1]]:
        return [(lane, lane) for lane in both]
    if len(own[0]) == len(own[1]) == 1:
        return [(own[0][0], own[1][0])]
    told = " and ".join(", ".join(known) or "none" for known in own)
    raise UserError(f"no lane that both have: {told}", hint="name one of each: --lane A --lane B")


def _rows(lane: str, a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name, metric in a[0].items():
        if name not in b[0] or metric["unit"] != b[0][name]["unit"]:
            continue
        blocks_a, blocks_b = ([block for r in side for block in r.get(name, {}).get("blocks", ())] for side in (a, b))
        if not blocks_a or not blocks_b:
            continue
        count = min(sum(map(len, blocks)) for blocks in (blocks_a, blocks_b))
        for percent in (50, 99) if count >= TAIL else (50,):
            middle, low, high = ratio(blocks_a, blocks_b, percent)
            rows.append(
                {
                    "lane": lane,
                    "metric": f"{name} p{percent}" if count >= TAIL else name,
                    "unit": metric["unit"],
                    "a": _spread(blocks_a, percent),
                    "b": _spread(blocks_b, percent),
                    "ratio": middle,
                    "low": low,
                    "high": high,
                    "verdict": _verdict(low, high, metric["better"]),
                }
            )
    return rows


def _spread(blocks: Sequence[Sequence[float]], percent: float) -> tuple[float, float, float]:
    """The percentile of all samples, and the least and the greatest of a block."""
    each = [_percentile([block], percent) for block in blocks]
    return (_percentile(blocks, percent), min(each), max(each))


def _verdict(low: float, high: float, better: str) -> str:
    if low == high:
        return "the same" if low == 1 else "one sample each"
    if low <= 1 <= high:
        return "no difference shown"
    return "better" if (high < 1) == (better == "lower") else "worse"


def _notes(a: Mapping[str, Any], b: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader has to know before the figures are believed."""
    notes = []
    for name, what in (
        ("device", "different devices"),
        ("CPU", "different processors"),
        ("driver", "different drivers"),
    ):
        if a["machine"].get(name) != b["machine"].get(name):
            notes.append(f"{what}: {a['machine'].get(name, 'none')} / {b['machine'].get(name, 'none')}")
    told = {"device", "CPU", "GPU", "driver", LOAD}
    names = dict.fromkeys([*a["machine"], *b["machine"]])
    if others := [n for n in names if n not in told and a["machine"].get(n) != b["machine"].get(n)]:
        notes.append(f"also different: {', '.join(others)}")
    if len(records) == 2 and a is not b and a["run"] != b["run"]:
        started, later = sorted(datetime.fromisoformat(r["run"]["started"]) for r in (a, b))
        hours = (later - started).total_seconds() / 3600
        when = f"{hours / 24:.0f} days" if hours >= 48 else f"{hours:.0f} hours"
        if started.date() != later.date():
            notes.append(
                f"measured on different days, {when} apart: take turns (A B A B) to see past a machine's drift"
            )
        elif hours >= APART_H:
            notes.append(f"measured {when} apart: take turns (A B A B) to see past a machine's drift")
    if any(r["run"]["dirty"] for r in records):
        notes.append("some of it was measured with uncommitted changes (+)")
    return notes


def _machines(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in dict.fromkeys([*a["machine"], *b["machine"]]):
        one, other = (r["machine"].get(name, "–") for r in (a, b))
        found[name] = one if one == other else f"A: {one} · B: {other}"
    return found


def _sections(
    a: Mapping[str, Any], b: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], turns: int
) -> list[dict[str, Any]]:
    runs = [
        [name, r["run"]["started"], r["run"]["commit"] + "+" * bool(r["run"]["dirty"]), r["run"]["command"]]
        for name, r in (("A", a), ("B", b))
    ]
    table = [
        [
            *(r["lane"], r["metric"], r["unit"], _told(r["a"]), _told(r["b"])),
            *(f"{r['ratio']:.3f}", f"{r['low']:.3f}–{r['high']:.3f}", r["verdict"]),
        ]
        for r in rows
    ]
    one = len({r["lane"] for r in rows}) == 1
    plotted = [
        {
            "label": r["metric"] if one else f"{r['lane']}: {r['metric']}",
            "value": r["ratio"],
            "low": r["low"],
            "high": r["high"],
        }
        for r in rows
    ]
    again = f", the first of {turns} each" if turns > 1 else ""
    return [
        {
            "kind": "table",
            "title": f"Runs{again}",
            "columns": ["", "started", "commit", "command"],
            "rows": runs,
        },
        {
            "kind": "table",
            "title": "B ÷ A",
            "note": "In brackets: the least and the greatest block. 95 %: of ratios, blocks and samples drawn anew.",
            "columns": ["lane", "metric", "unit", "A", "B", "B ÷ A", "95 %", "B is"],
            "rows": table,
        },
        {"kind": "intervals", "title": "B ÷ A with 95 % intervals", "unit": "", "one": 1.0, "rows": plotted},
    ]


def _told(spread: tuple[float, float, float]) -> str:
    middle, low, high = map(number, spread)
    return middle if low == high else f"{middle} ({low}–{high})"
