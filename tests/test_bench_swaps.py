from __future__ import annotations

import pytest

from accel.errors import UserError
from bench import swaps
from bench.record import fault


def test_a_change_while_frames_run_is_measured() -> None:
    changes = ["style.prompt=ink", "style.strength=0.5"]
    report = swaps.measure("demo", "mini", "torch", (64, 64), changes, seconds=0.5)
    assert not fault(report)
    assert [row["change"] for row in report["rows"]] == changes
    assert all(row[swaps.BUILT] == 0 and row["gap_after_ms"] > 0 for row in report["rows"])


def test_results_name_files_and_not_where_they_are() -> None:
    assert swaps.bare("style.lora=/home/me/ink.safetensors:0.5, a/b.safetensors") == (
        "style.lora=ink.safetensors:0.5, b.safetensors"
    )


def test_what_cannot_be_changed_is_the_users_error() -> None:
    with pytest.raises(UserError, match="nothing to change"):
        swaps.measure("demo", "mini", "torch", (64, 64), [])
    with pytest.raises(UserError, match=r"style\.promt"):
        swaps.measure("demo", "mini", "torch", (64, 64), ["style.promt=ink"], seconds=0.2)
