"""What `bench.engines` measured, as sections of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench import record
from bench.machine import Ceilings

if TYPE_CHECKING:
    from bench.engines import Measured

BLOCKS = 4  # of the launches: samples of one block lie near each other in time


def metrics(measured: Mapping[str, Sequence[Measured]]) -> dict[str, dict[str, Any]]:
    """The lanes of the record: each backend's times of every network, and how far it is from the reference."""
    lanes: dict[str, dict[str, Any]] = {}
    for name, rows in measured.items():
        for run, row in rows:
            found, n = lanes.setdefault(run.label, {}), len(run.times)
            blocks = [run.times[i * n // BLOCKS : (i + 1) * n // BLOCKS] for i in range(BLOCKS)]
            found[name] = record.metric("ms", "lower", blocks)
            if row["relative_l2"] is not None:
                found[f"{name} error"] = record.metric("relative L2", "lower", [[row["relative_l2"]]])
    return lanes


def sections(measured: Mapping[str, Sequence[Measured]], limits: Mapping[str, Ceilings]) -> list[dict[str, Any]]:
    """Plots and a table, for `bench.report`, of every network's runs and rows."""
    per_network = {name: [row for _, row in rows] for name, rows in measured.items()}
    columns = [
        "network",
        "inputs",
        "engine",
        "quickest ms",
        "median ms",
        "p95 ms",
        "time ÷ torch",
        "max |Δ|",
        "relative L2",
    ]
    columns += ["GFLOP", "of matmul", "of copy", "MB", "load s"]
    table = [
        [
            *(r["network"], r["shape"], r["backend"]),
            *(round(r[which], 3) for which in ("quickest_ms", "median_ms", "p95_ms")),
            *(_short(r["ratio_to_torch"]), _short(r["max_abs"]), _short(r["relative_l2"]), _short(r["gflop"])),
            *(_percent(r["of_matmul"]), _percent(r["of_copy"]), round(r["memory_mb"]), round(r["load_s"], 2)),
        ]
        for rows in per_network.values()
        for r in rows
    ]

    def bars(title: str, unit: str, note: str, value: str, high: str | None = None) -> dict[str, Any]:
        groups = [
            {"label": name, "bars": [_bar(r, value, high) for r in rows if r[value] is not None]}
            for name, rows in per_network.items()
        ]
        return {"kind": "bars", "title": title, "unit": unit, "note": note, "groups": groups}

    return [
        bars("Median time", "ms", "The whisker reaches the 95th percentile.", "median_ms", "p95_ms"),
        bars("Share of the matmul ceiling", "of 1", _told(limits), "of_matmul"),
        {"kind": "table", "title": "All numbers", "note": _told(limits), "columns": columns, "rows": table},
        *(
            {
                "kind": "histogram",
                "title": f"{name}: distribution of times",
                "unit": "ms",
                "series": [{"label": run.label, "values": run.times} for run, _ in rows],
            }
            for name, rows in measured.items()
        ),
    ]


def _bar(row: dict[str, Any], value: str, high: str | None) -> dict[str, Any]:
    return {"label": row["backend"], "value": row[value], **({"high": row[high]} if high else {})}


def _told(limits: Mapping[str, Ceilings]) -> str:
    """The ceilings in words, which the shares refer to."""
    told = []
    for kind, at in limits.items():
        quick = ", ".join(f"{name} {gflops:.0f}" for name, gflops in at.gflops.items())
        told.append(f"{kind}: matmul {quick} GFLOP/s, copy {at.gbytes:.1f} GB/s")
    return (
        "Ceilings measured here, by torch: "
        + "; ".join(told)
        + ". Shares are of the quickest launch; of copy: inputs, outputs and weights moved once. "
        "MB: more memory held after loading."
    )


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"
