"""Two results beside each other: what is refused, what is said, and when a difference is one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from accel.errors import UserError
from bench import record
from bench.compare import compare, ratio
from bench.latency import text
from bench.report import html
from stream.cli import main

GENERATOR = np.random.default_rng(0)
WORK = {"model": "mini", "model_digest": "abc", "size": "512x288", "frames": 160, "settings": {}}
MACHINE = {"device": "a CPU", "CPU": "a CPU", "torch": "2.13.0", "load average": "1"}


def blocks(middle: float, spread: float = 0.05, drift: float = 0.0, count: int = 4) -> list[list[float]]:
    """`count` blocks of 50 samples about a middle that drifts from block to block."""
    return [list(middle * (1 + drift * i) * GENERATOR.normal(1, spread, 50)) for i in np.linspace(-1, 1, count)]


def written(path: Path, lanes: dict[str, Any], **changes: Any) -> Path:
    """A result file; `changes` are merged into its parts."""
    run = {"started": "2026-11-20T10:00:00Z", "seconds": 9.0, "commit": "abc", "dirty": False, "command": "livestyle"}
    whole: dict[str, Any] = {"format": record.FORMAT, "benchmark": "latency", "title": "T", "summary": "", "work": WORK}
    whole |= {"run": run, "machine": MACHINE, "lanes": lanes, "sections": []}
    for key, value in changes.items():
        whole[key] = {**whole[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(whole))
    return path


def lane(middle: float, **how: float) -> dict[str, Any]:
    return {"latency": record.metric("ms", "lower", blocks(middle, **how))}


def verdicts(report: dict[str, Any]) -> list[str]:
    return [row["verdict"] for row in report["rows"]]


def test_a_third_less_time_is_better_and_its_ratio_is_told_with_its_interval(tmp_path: Path) -> None:
    a, b = (written(tmp_path / n, {"torch": lane(ms)}) for n, ms in (("a.json", 30.0), ("b.json", 20.0)))
    report = compare([a, b])
    row = report["rows"][0]
    assert row["metric"] == "latency p50"
    assert row["ratio"] == pytest.approx(2 / 3, rel=0.05)
    assert row["low"] < row["ratio"] < row["high"] < 0.75
    assert verdicts(report) == ["better", "better"]  # the median, and the tail of as many samples
    assert "better" in text(report)


def test_more_frames_a_second_are_better_too(tmp_path: Path) -> None:
    rate = {"rate": record.metric("fps", "higher", [[30], [31], [29], [30]])}
    less = {"rate": record.metric("fps", "higher", [[20], [21], [19], [20]])}
    a, b = written(tmp_path / "a.json", {"x": rate}), written(tmp_path / "b.json", {"x": less})
    assert verdicts(compare([a, b])) == ["worse"]
    assert verdicts(compare([b, a])) == ["better"]


def test_a_machine_that_drifts_hides_a_small_difference(tmp_path: Path) -> None:
    a = written(tmp_path / "a.json", {"x": lane(20.0, drift=0.15)})
    b = written(tmp_path / "b.json", {"x": lane(20.6, drift=0.15)})
    assert verdicts(compare([a, b]))[0] == "no difference shown"


def test_turns_of_a_and_b_are_pooled(tmp_path: Path) -> None:
    files = [written(tmp_path / f"{i}.json", {"x": lane(30.0 if i % 2 == 0 else 20.0, count=1)}) for i in range(4)]
    report = compare(files)
    assert verdicts(report)[0] == "better"
    assert report["rows"][0]["a"][1] < report["rows"][0]["a"][2]  # two blocks of A
    with pytest.raises(UserError, match="3 files"):
        compare(files[:3])


def test_different_work_is_refused_in_two_lines_that_name_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = written(tmp_path / "a.json", {"x": lane(1.0)})
    other = {"model_digest": "def", "size": "640x360", "frames": 80, "settings": {"style.steps": 2}}
    b = written(tmp_path / "b.json", {"x": lane(1.0)}, work=other)
    assert main(["bench", "compare", str(a), str(b)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    for words in (
        "model_digest abc / def",
        "size 512x288 / 640x360",
        "frames 160 / 80",
        "settings none / style.steps=2",
    ):
        assert words in first
    assert second.startswith("hint: ")


def test_another_benchmark_is_different_work(tmp_path: Path) -> None:
    a = written(tmp_path / "a.json", {"x": lane(1.0)})
    b = written(tmp_path / "b.json", {"x": lane(1.0)}, benchmark="scale")
    with pytest.raises(UserError, match="benchmark latency / scale"):
        compare([a, b])


@pytest.mark.parametrize(
    ("started", "words"),
    [
        ("2026-11-20T10:20:00Z", None),
        ("2026-11-20T14:00:00Z", "measured 4 hours apart"),
        ("2026-11-25T10:00:00Z", "measured on different days, 5 days apart"),
        ("2026-11-21T09:00:00Z", "measured on different days, 23 hours apart"),
    ],
)
def test_runs_far_apart_are_said(tmp_path: Path, started: str, words: str | None) -> None:
    a = written(tmp_path / "a.json", {"x": lane(1.0)})
    b = written(tmp_path / "b.json", {"x": lane(1.0)}, run={"started": started})
    notes = compare([b, a])["notes"]
    assert not notes if words is None else words in notes[0]


def test_other_machines_versions_and_uncommitted_changes_are_said(tmp_path: Path) -> None:
    a = written(tmp_path / "a.json", {"x": lane(1.0)}, run={"dirty": True})
    b = written(tmp_path / "b.json", {"x": lane(1.0)}, machine={"device": "a GPU", "torch": "2.14"})
    said = "; ".join(compare([a, b])["notes"])
    assert "different devices: a CPU / a GPU" in said
    assert "also different: torch" in said
    assert "uncommitted" in said
    assert "load" not in said


def test_lanes_are_paired_by_name_by_being_alone_or_as_asked(tmp_path: Path) -> None:
    a = written(tmp_path / "a.json", {"torch": lane(30.0)})
    b = written(tmp_path / "b.json", {"openvino": lane(10.0)})
    both = written(tmp_path / "c.json", {"torch": lane(30.0), "openvino": lane(10.0)})
    assert compare([a, b])["rows"][0]["lane"] == "torch → openvino"
    assert {row["lane"] for row in compare([a, both])["rows"]} == {"torch"}
    assert verdicts(compare([both, both], ["torch", "openvino"]))[0] == "better"
    with pytest.raises(UserError, match="no lane null"):
        compare([a, b], ["torch", "null"])
    with pytest.raises(UserError, match="no lane that both have"):
        compare([written(tmp_path / "d.json", {"x": lane(1.0), "y": lane(1.0)}), b])


@pytest.mark.parametrize("a", [[[1.0]], [[2.0, 2.0], [2.0]]])
def test_one_value_has_no_spread(a: Sequence[Sequence[float]]) -> None:
    middle, low, high = ratio(a, a)
    assert (middle, low, high) == (1, 1, 1)


def test_a_ratio_to_nothing_is_bounded() -> None:
    assert ratio([[0.0, 0.0]], [[1.0]]) == (1000, 1000, 1000)
    assert ratio([[1.0]], [[0.0]]) == (0, 0, 0)


def test_the_interval_is_the_same_every_time_and_wider_where_blocks_differ() -> None:
    steady, drifting = blocks(10.0), blocks(10.0, drift=0.2)
    assert ratio(steady, drifting) == ratio(steady, drifting)
    widths = [high - low for _, low, high in (ratio(steady, steady), ratio(steady, drifting))]
    assert widths[1] > 2 * widths[0]


def test_the_command_prints_and_writes_json_and_a_page_whose_plots_are_xml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (written(tmp_path / n, {"torch": lane(ms)}) for n, ms in (("a.json", 30.0), ("b.json", 20.0)))
    out = [tmp_path / "c.json", tmp_path / "c.html"]
    assert main(["bench", "compare", str(a), str(b), "--json", str(out[0]), "--html", str(out[1])]) == 0
    assert "latency p99" in capsys.readouterr().out
    assert json.loads(out[0].read_text())["rows"]
    page = out[1].read_text()
    assert page == html(compare([a, b]))
    for part in page.split("<svg")[1:]:
        ElementTree.fromstring(f"<svg{part.split('</svg>')[0]}</svg>")
