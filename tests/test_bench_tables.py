"""The measured tables of README.md and docs are those of bench/results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from accel.errors import UserError
from bench import tables

RUN = {"command": "livestyle bench latency", "started": "2026-11-20T10:00:00Z", "commit": "abc", "dirty": True}
TIMES = {"p50": 20.0, "p95": 30.0, "p99": 40.0}
RESULT = {"fps": 30.0, "latency_ms": TIMES, "outside_networks": 0.031, "dropped_share": 0.0}


def latency(**machine: str) -> dict[str, Any]:
    """As much of a record as its tables read."""
    work = {"model": "mini", "size": "512x288"}
    told = {"CPU": "a CPU", "cores": "2 physical usable, 4 logical", **machine}
    return {
        "benchmark": "latency",
        "work": work,
        "run": RUN,
        "machine": told,
        "engines": {"torch": RESULT},
        "beside_load": {},
    }


def test_pages_are_in_step_with_the_results() -> None:
    assert tables.renew(write=False) == [], "run `livestyle bench tables`"


def test_every_page_that_is_renewed_has_a_table() -> None:
    for page in tables.PAGES:
        assert tables.BLOCK.search((tables.ROOT / page).read_text(encoding="utf-8")), page


def test_a_table_tells_figures_device_command_and_what_was_not_run() -> None:
    text = tables.table("latency", {"l.json": latency()}, "../")
    assert "| a CPU, 2 cores | mini 512×288 | torch | 30.0 | 20 / 30 / 40 | 3.1% |" in text
    assert "| an NVIDIA GPU | not run; `make gpu` does |" in text
    assert "a CPU alone" not in text
    assert "`livestyle bench latency`, 2026-11-20, at abc with changes ([all figures](../bench/results/l.json))" in text


def test_a_gpus_record_takes_the_place_of_not_run() -> None:
    text = tables.table("latency", {"c.json": latency(), "g.json": latency(GPU="a card")})
    assert "| a card | mini 512×288 |" in text
    assert "not run" not in text


def test_without_any_record_only_the_head_and_what_was_not_run_are_there() -> None:
    for name in tables.TABLES:
        assert tables.table(name, {}).count("| not run;") == 2


def test_only_what_stands_between_the_marks_is_written(tmp_path: Path) -> None:
    text = "before\n<!-- table: latency -->\nold\n<!-- /table -->\nafter\n"
    filled = tables.filled(text, {})
    assert filled.startswith("before\n<!-- table: latency -->\n| device")
    assert filled.endswith("|\n<!-- /table -->\nafter\n")
    assert "old" not in filled
    assert tables.filled(filled, {}) == filled
    with pytest.raises(UserError, match="no such table: speed"):
        tables.filled("<!-- table: speed -->\n<!-- /table -->", {})
    with pytest.raises(UserError, match=r"README\.md"):
        tables.renew(tmp_path)
