"""The one format of result files: what is in it, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from accel.errors import UserError
from bench import machine, record
from models.params import Params
from stream.config import patched

REPORT = {"title": "T", "summary": "s", "sections": [{"kind": "table", "title": "t", "columns": ["a"], "rows": [[1]]}]}


def made(**changes: Any) -> dict[str, Any]:
    """A whole record of one lane."""
    lanes = {"torch": {"latency": record.metric("ms", "lower", [[1.0, 2.0], [3.0]])}}
    return record.record("latency", record.start(), {"model": "mini", "frames": 3}, lanes, REPORT) | changes


def test_what_is_written_is_read_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    whole = made(engines={"torch": 1})
    record.write(path, whole)
    assert record.read(path) == whole
    assert "[ 1.0, 2.0 ]" in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_a_record_tells_machine_time_commit_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "latency",
        "--source",
        "/home/me/a.mp4",
        "--json",
        "/x/r.json",
        "--html=/x/r.html",
        "--set",
        "style.lora=/l/a.bin",
    ]
    monkeypatch.setattr(sys, "argv", ["/bin/livestyle", "bench", *words])
    run = made()["run"]
    assert run["command"] == "livestyle bench latency --source a.mp4 --set style.lora=a.bin"
    assert run["started"].endswith("Z")
    assert isinstance(run["dirty"], bool)
    assert {"device", "CPU", "system", "Python", "torch"} <= set(made()["machine"])


def test_a_copy_without_its_history_is_told_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "__file__", str(tmp_path / "bench" / "record.py"))
    monkeypatch.delenv("LIVESTYLE_COMMIT", raising=False)
    assert record.checkout() == ("", False)
    monkeypatch.setenv("LIVESTYLE_COMMIT", "abc123+")
    assert record.checkout() == ("abc123", True)


def test_pictures_and_histograms_stay_out_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    heavy = [{"kind": "pictures", "title": "p", "rows": []}, {"kind": "histogram", "title": "h", "series": []}]
    record.write(path, made(sections=[*heavy, *REPORT["sections"]]))
    assert [section["kind"] for section in record.read(path)["sections"]] == ["table"]


def test_many_samples_are_thinned_to_their_quantiles() -> None:
    (block,) = record.metric("ms", "lower", [list(range(100_001))])["blocks"]
    assert len(block) == record.KEPT
    assert (block[0], block[-1]) == (0, 100_000)
    assert block[record.KEPT // 2] == pytest.approx(50_000, rel=0.01)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format": 1}, "format 1"),
        ({"lanes": None}, "lanes is not a dict"),
        ({"work": "mini"}, "work is not a dict"),
        ({"run": {"started": "2026-01-01T00:00:00Z"}}, "no seconds in run"),
        ({"run": dict.fromkeys(record.RUN, "yesterday")}, "started is no time"),
        ({"lanes": {"a": {"ms": {"unit": "ms", "better": "faster", "blocks": [[1]]}}}}, "a ms is no metric"),
        ({"lanes": {"a": {"ms": {"unit": "ms", "better": "lower", "blocks": [["1"]]}}}}, "a ms is no metric"),
        ({"lanes": {"a": 7}}, "a is no metric"),
    ],
)
def test_a_bad_file_is_two_lines(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**made(), **change}))
    with pytest.raises(UserError, match=word) as refused:
        record.read(path)
    assert refused.value.hint


@pytest.mark.parametrize("text", ["", "[", "[]", "3", "{}"])
def test_a_cut_or_foreign_file_is_two_lines(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"r\.json"):
        record.read(path)
    with pytest.raises(UserError, match="cannot read"):
        record.read(tmp_path / "none.json")


def test_sources_and_models_are_told_by_name_and_content(tmp_path: Path) -> None:
    clip, same = tmp_path / "a.mp4", tmp_path / "b.mp4"
    for path in (clip, same):
        path.write_bytes(b"pictures")
    assert record.source_of("demo") == {"source": "demo"}
    assert record.source_of(str(clip))["source"] == "a.mp4"
    assert record.source_of(str(clip))["source_digest"] == record.source_of(str(same))["source_digest"]
    assert record.model_of("mini")["model"] == "mini"
    assert len(record.model_of("mini")["model_digest"]) == 12


def test_settings_are_told_where_they_are_not_the_defaults() -> None:
    params = patched(Params(), {"style.steps": "2", "style.prompt": "ink"})
    assert record.changed(params) == {"style.steps": 2, "style.prompt": "ink"}
    assert record.changed(Params()) == {}


def test_every_file_of_ours_is_of_this_format_and_free_of_this_machines_places() -> None:
    files = sorted((Path(record.__file__).parent / "results").glob("*.json"))
    assert files
    for path in files:
        record.read(path)


def test_ceilings_are_measured_in_every_format_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CEILING_S", 0.0)
    found = machine.ceilings("cpu", (32, 64), 1 << 16)
    assert set(found.gflops) == {"float32", "bfloat16"}
    assert min(*found.gflops.values(), found.gbytes) > 0
    assert found.compute("fp32") == found.gflops["float32"]
    assert found.compute("fast") == max(found.gflops.values())


def test_without_its_tool_the_drivers_version_is_unknown_or_told_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert machine.driver()
