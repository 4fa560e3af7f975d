"""The measured tables of README.md and docs, written from the records in bench/results.

A table stands between two comments, and everything between them is written anew:

    <!-- table: latency -->
    <!-- /table -->

`livestyle bench tables` writes them; a test says that they are in step. A device that nothing was measured on has a row
that says so: no figure is carried over from elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accel.errors import UserError
from bench.record import read

ROOT = Path(__file__).parents[1]
RESULTS = "bench/results"
PAGES = ("README.md", "docs/measured.md")
BLOCK = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
NOT_RUN = {  # whether on a GPU → the row of what nothing was measured on
    False: ("a CPU alone", "not run; `livestyle bench` does"),
    True: ("an NVIDIA GPU", "not run; `make gpu` does"),
}

Record = Mapping[str, Any]
Rows = Iterator[Sequence[object]]


def renew(root: Path = ROOT, *, write: bool = True) -> list[str]:
    """Write the tables of every page; returns the pages that differed. Raises UserError outside a checkout.

    >>> renew(write=False)
    []
    """
    records = results(root)
    changed = []
    for page in PAGES:
        path = root / page
        try:
            before = path.read_text(encoding="utf-8")
        except OSError:
            raise UserError(f"no {page} here", hint="the tables are those of a checkout of livestyle") from None
        after = filled(before, records, "../" * page.count("/"))
        if after != before:
            changed.append(page)
            if write:
                path.write_text(after, encoding="utf-8")
    return changed


def results(root: Path = ROOT) -> dict[str, Record]:
    """Every record in bench/results, by file name. Raises UserError for a file that is none."""
    return {path.name: read(path) for path in sorted((root / RESULTS).glob("*.json"))}


def filled(text: str, records: Mapping[str, Record], up: str = "") -> str:
    """A page's text with its tables written from records; `up` leads from the page's folder to the root."""

    def one(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise UserError(f"no such table: {found[2]}", hint=f"there are: {', '.join(TABLES)}")
        return f"{found[1]}{table(found[2], records, up)}{found[3]}"

    return BLOCK.sub(one, text)


def table(name: str, records: Mapping[str, Record], up: str = "") -> str:
    """One table in Markdown with a line on each of its records: when, at which commit, by which command."""
    benchmark, columns, rows = TABLES[name]
    lines = [_line(columns), _line(["---"] * len(columns))]
    mine = {}
    for file, record in records.items():
        if record["benchmark"] == benchmark and (found := list(rows(record))):
            mine[file] = record
            lines += [_line([_device(record), *row]) for row in found]
    measured = {"GPU" in record["machine"] for record in mine.values()}
    lines += [_line([*row, *[""] * (len(columns) - 2)]) for gpu, row in NOT_RUN.items() if gpu not in measured]
    told = [
        f"`{record['run']['command']}`, {record['run']['started'][:10]}, {_commit(record)}"
        f"{_load(record)} ([all figures]({up}{RESULTS}/{file}))"
        for file, record in mine.items()
    ]
    return "\n".join(lines) + "\n" + ("\n" + "  \n".join(told) + "\n" if told else "")


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _device(record: Record) -> str:
    machine = record["machine"]
    if "GPU" in machine:
        return str(machine["GPU"])
    return f"{machine.get('CPU', machine.get('device', 'unknown'))}, {machine.get('cores', '?').split()[0]} cores"


def _commit(record: Record) -> str:
    run = record["run"]
    return f"at {run['commit'] or 'an unknown commit'}{' with changes' if run['dirty'] else ''}"


def _load(record: Record) -> str:
    """A machine that others use too says so."""
    load = record["machine"].get("load average", "").partition(" ")[0]
    return f", beside a load of {load}" if load and float(load) >= 1 else ""


def _what(record: Record) -> str:
    work = record["work"]
    return f"{work.get('model', '')} {str(work.get('size', '')).replace('x', '×')}".strip()


def _latency(record: Record) -> Rows:
    if record["beside_load"]:
        return  # these have a table of their own
    for engine, r in record["engines"].items():
        yield (
            *(_what(record), engine, f"{r['fps']:.1f}"),
            " / ".join(f"{r['latency_ms'][percent]:.0f}" for percent in ("p50", "p95", "p99")),
            f"{r['outside_networks']:.1%}",
        )


def _busy(record: Record) -> Rows:
    for engine, loaded in record["beside_load"].items():
        for name, r in (("alone", record["engines"][engine]), ("every core kept busy", loaded)):
            times = (f"{r['latency_ms'][percent]:.0f}" for percent in ("p50", "p99"))
            yield (_what(record), engine, name, f"{r['fps']:.1f}", *times, f"{r['dropped_share']:.0%}")


def _scale(record: Record) -> Rows:
    for count, r in record["sessions"].items():
        each = "–".join(dict.fromkeys(f"{r['fps_of_a_session'][which]:.1f}" for which in ("least", "most")))
        times = " / ".join(f"{r['latency_ms'][percent]:.0f}" for percent in ("p50", "p99"))
        yield (
            *(_what(record), record["engine"], count, f"{r['fps']:.1f}", each, f"{r['ratio']:.2f}", times),
            f"{r['memory_mb']:.0f}",
        )


def _engines(record: Record) -> Rows:
    for r in record["results"]:
        yield (
            *(_what(record), r["network"], r["backend"], f"{r['quickest_ms']:.2f}", f"{r['median_ms']:.2f}"),
            _short(r["ratio_of_quickest"]),
            *(_short(r["relative_l2"]), _share(r["of_matmul"]), _share(r["of_copy"]), f"{r['memory_mb']:.0f}"),
        )


def _peers(record: Record) -> Rows:
    for name, r in record["results"].items():
        blocks = r["ratio_blocks"]
        yield (
            *(_what(record), name, f"{r['fps']:.1f}", f"{r['ratio']:.2f} ({min(blocks):.2f}–{max(blocks):.2f})"),
            " / ".join(f"{r['frame_ms'][percent]:.0f}" for percent in ("p50", "p99")),
            f"{r['memory_mb']['running']:.0f}",
            f"{r['difference']['mean']:.2f}",
        )


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


# name → benchmark, columns, rows of a record
TABLES: dict[str, tuple[str, tuple[str, ...], Callable[[Record], Rows]]] = {
    "latency": (
        "latency",
        ("device", "model", "engine", "fps", "latency p50 / p95 / p99, ms", "outside the networks"),
        _latency,
    ),
    "busy": ("latency", ("device", "model", "engine", "machine", "fps", "p50, ms", "p99, ms", "dropped"), _busy),
    "scale": (
        "scale",
        ("device", "model", "engine", "sessions", "fps in all", "of each", "× one", "p50 / p99, ms", "MB"),
        _scale,
    ),
    "engines": (
        "engines",
        (
            *(
                "device",
                "model",
                "network",
                "engine",
                "quickest, ms",
                "median, ms",
                "quickest ÷ torch's",
                "relative L2",
            ),
            *("of matmul", "of copy", "MB"),
        ),
        _engines,
    ),
    "peers": (
        "peers",
        ("device", "model", "", "fps", "ratio (blocks)", "frame p50 / p99, ms", "MB", "mean Δ of 255"),
        _peers,
    ),
}
