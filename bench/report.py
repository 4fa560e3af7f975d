"""One page of HTML from a report: no scripts, no files beside it, plots drawn as SVG.

A report is a JSON-able dict:

    {"title": str, "summary": str, "machine": {name: value}, "sections": [section, …]}

and a section is one of these, each with a "title" and, where wanted, a "note":

    {"kind": "table", "columns": [str, …], "rows": [[str | number | None, …], …]}
    {"kind": "bars", "unit": str, "groups": [{"label", "bars": [{"label", "value", "high"?}, …]}, …]}
    {"kind": "lines", "x": str, "y": str, "series": [{"label", "x": [number, …], "y": [number, …]}, …]}
    {"kind": "intervals", "one": number, "rows": [{"label", "value", "low", "high"}, …]}    about a line at `one`
    {"kind": "pictures", "rows": [{"label": str, "image": base64 of a JPEG}, …]}
    {"kind": "histogram", "unit": str, "series": [{"label", "values": [number, …]}, …], "bins"?: int}

One label has one colour throughout the page. Of a record (see `bench.record`) the work and the run are shown too; other
keys of the report are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 760, 240  # of a plot, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 38
COLOURS = 6  # --s0 … --s5 in the template; further labels begin again
ROW, GAP, LABEL = 22, 14, 190  # of a bar chart
RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)  # ticks of ratios that lie far apart
WIDE = 3.0  # the greatest to the least, from which on they do: their axis is logarithmic, and ends at the last of these
CHARACTER = 6.4  # width of a letter of a label, about


def html(report: dict[str, Any]) -> str:
    """Return the page. Raises ValueError for a section of an unknown kind.

    >>> Path("engines.html").write_text(html(measure(networks, backends)), encoding="utf-8")
    """
    from jinja2 import Environment, FileSystemLoader

    colours = _colours(report["sections"])
    draw = {"table": _table, "pictures": _table, "bars": _bars, "lines": _lines, "histogram": _histogram}
    draw |= {"intervals": _intervals}
    sections = []
    for section in report["sections"]:
        if section["kind"] not in draw:
            raise ValueError(f"no such kind of section: {section['kind']!r}")
        sections.append(
            {**section, "plot": draw[section["kind"]](section, colours), "legend": _legend(section, colours)}
        )
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    return environment.get_template("report.html.j2").render(report=report, sections=sections, number=number)


def number(value: float) -> str:
    """Write a number as a person would: about three digits, no exponent where it fits.

    >>> number(0.01234), number(1234.5)
    ('0.0123', '1234')
    """
    if value == 0:
        return "0"
    if not math.isfinite(value) or not 1e-4 <= abs(value) < 1e7:
        return f"{value:.2g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _table(section: dict[str, Any], colours: dict[str, int]) -> dict[str, Any]:
    return {}


def _bars(section: dict[str, Any], colours: dict[str, int]) -> dict[str, Any]:
    bars = [bar for group in section["groups"] for bar in group["bars"]]
    top = max((bar.get("high", bar["value"]) for bar in bars), default=1.0) or 1.0
    ticks = _ticks(0.0, top)
    room = WIDTH - LABEL - 70  # the value is written behind its bar
    scale = room / ticks[-1]
    y = 8.0
    groups = []
    for group in section["groups"]:
        rows = []
        for bar in group["bars"]:
            length, high = bar["value"] * scale, bar.get("high", bar["value"]) * scale
            rows.append({**bar, "y": y, "length": length, "high_x": LABEL + high, "colour": colours[bar["label"]]})
            y += ROW
        groups.append({"label": group["label"], "rows": rows, "middle": y - ROW * len(rows) / 2})
        y += GAP
    axis = [{"x": LABEL + t * scale, "text": number(t)} for t in ticks]
    return {"groups": groups, "axis": axis, "left": LABEL, "row": ROW, "bottom": y - GAP + 4, "width": WIDTH}


def _intervals(section: dict[str, Any], colours: dict[str, int]) -> dict[str, Any]:
    rows, one = section["rows"], float(section["one"])
    left = max([LABEL, *(CHARACTER * len(row["label"]) + 16 for row in rows)])
    low, high = (bound([one, *(row[which] for row in rows)]) for bound, which in ((min, "low"), (max, "high")))
    wide = high > WIDE * low
    ticks = [t * one for t in RATIOS] if wide else _ticks(low, high)
    if wide:  # from the last tick below all to the first above
        low, high = max(low, ticks[0]), min(high, ticks[-1])
        ticks = ticks[sum(t <= low for t in ticks) - 1 : len(ticks) - sum(t >= high for t in ticks) + 1]

    def px(value: float) -> float:
        value = min(max(value, ticks[0]), ticks[-1])
        begin, end, at = (math.log(v) if wide else v for v in (ticks[0], ticks[-1], value))
        return left + (at - begin) / (end - begin) * (WIDTH - left - 60)

    placed = [
        {**row, "y": 8.0 + (i + 0.5) * ROW, "x": px(row["value"]), "x0": px(row["low"]), "x1": px(row["high"])}
        for i, row in enumerate(rows)
    ]
    axis = [{"x": px(t), "text": number(t)} for t in ticks]
    bottom = 12.0 + ROW * len(rows)
    return {"rows": placed, "axis": axis, "left": left, "one": px(one), "bottom": bottom, "width": WIDTH}


def _lines(section: dict[str, Any], colours: dict[str, int]) -> dict[str, Any]:
    series = section["series"]
    frame = _frame([x for s in series for x in s["x"]], [0.0, *(y for s in series for y in s["y"])])
    paths = [
        {
            "label": s["label"],
            "colour": colours[s["label"]],
            "points": [(frame["px"](x), frame["py"](y)) for x, y in zip(s["x"], s["y"], strict=True)],
        }
        for s in series
    ]
    return {**frame, "paths": paths, "x_label": section["x"], "y_label": section["y"]}


def _histogram(section: dict[str, Any], colours: dict[str, int]) -> dict[str, Any]:
    values = sorted(v for s in section["series"] for v in s["values"])
    # A few stalls would squeeze everything else into one bin: what lies beyond the 98th percentile goes to the last.
    low, high = (values[0], values[int((len(values) - 1) * 0.98)]) if values else (0.0, 1.0)
    bins = section.get("bins", 40)
    width = (high - low) / bins or max(abs(low), 1.0) / bins
    counted = []
    for s in section["series"]:
        counts = [0] * bins
        for value in s["values"]:
            counts[min(int((value - low) / width), bins - 1)] += 1
        counted.append((s["label"], counts))
    frame = _frame([low, low + width * bins], [0.0, *(float(c) for _, counts in counted for c in counts)])
    px, py = frame["px"], frame["py"]
    areas = []
    for label, counts in counted:
        steps = [(px(low), py(0.0))]
        for index, count in enumerate(counts):
            steps += [(px(low + index * width), py(count)), (px(low + (index + 1) * width), py(count))]
        areas.append({"label": label, "colour": colours[label], "points": [*steps, (px(low + bins * width), py(0.0))]})
    over = bool(values) and values[-1] > low + width * bins
    x_label = section["unit"] + (f" (slower ones, up to {number(values[-1])}, counted in the last bin)" if over else "")
    return {**frame, "areas": areas, "x_label": x_label, "y_label": "count"}


def _frame(xs: Sequence[float], ys: Sequence[float]) -> dict[str, Any]:
    x0, x1 = (min(xs), max(xs)) if xs else (0.0, 1.0)
    x1 = x1 if x1 > x0 else x0 + 1.0
    y_ticks = _ticks(min(ys), max(ys))
    y0, y1 = y_ticks[0], y_ticks[-1]

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    return {
        "px": px,
        "py": py,
        "x_ticks": [{"x": px(t), "text": number(t)} for t in _ticks(x0, x1) if x0 <= t <= x1],
        "y_ticks": [{"y": py(t), "text": number(t)} for t in y_ticks],
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "base": HEIGHT - BOTTOM,
        "width": WIDTH,
        "height": HEIGHT,
    }


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, about five, from at or below `low` to at or above `high`."""
    span = high - low if high > low else 1.0
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _labels(section: dict[str, Any]) -> list[str]:
    groups = section.get("groups", ())
    found = [bar["label"] for group in groups for bar in group["bars"]] + [
        s["label"] for s in section.get("series", ())
    ]
    return list(dict.fromkeys(found))


def _colours(sections: Sequence[dict[str, Any]]) -> dict[str, int]:
    labels = dict.fromkeys(label for section in sections for label in _labels(section))
    return {label: index % COLOURS for index, label in enumerate(labels)}


def _legend(section: dict[str, Any], colours: dict[str, int]) -> list[dict[str, Any]]:
    labels = _labels(section)
    return [{"label": label, "colour": colours[label]} for label in labels] if len(labels) > 1 else []
