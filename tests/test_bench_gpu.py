"""`make gpu` where there is no GPU: what it says, how it goes on where it was, and what stands in its file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, record

ROOT = Path(__file__).parents[1]


def nothing(folder: Path) -> dict[str, Any]:
    return {"summary": "measured"}


PIECES = tuple(gpu.Piece(name, 60, nothing) for name in ("one", "two", "three"))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pieces that were run, in order; "two" fails the first time."""
    names: list[str] = []

    def play(piece: gpu.Piece, work: Path, limit_s: float) -> tuple[str, str, dict[str, Any] | None]:
        names.append(piece.name)
        if piece.name == "two" and names.count("two") == 1:
            return "failed", "an error", None
        return "done", "measured", {"summary": "measured"}

    monkeypatch.setattr(gpu, "played", play)
    monkeypatch.setattr(gpu, "device_name", lambda: "nvidia-test")
    return names


def states(path: Path) -> dict[str, str]:
    return {name: one["state"] for name, one in record.read(path)["pieces"].items()}


def test_without_a_gpu_two_lines_and_status_2() -> None:
    code = (
        "import torch; torch.cuda.is_available = lambda: False; from bench.gpu import main; raise SystemExit(main([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"]
    assert not done.stdout


def test_a_second_run_does_what_is_not_done(tmp_path, played) -> None:
    notes = gpu.run(tmp_path, tmp_path / "work", pieces=PIECES)
    assert [notes.state(piece.name) for piece in PIECES] == ["done", "failed", "done"]
    assert states(tmp_path / "gpu-nvidia-test.json") == {"one": "done", "two": "failed", "three": "done"}
    gpu.run(tmp_path, tmp_path / "work", pieces=PIECES)
    assert played == ["one", "two", "three", "two"]
    assert set(states(tmp_path / "gpu-nvidia-test.json").values()) == {"done"}


def test_a_piece_that_no_time_is_left_for_is_noted_as_not_run(tmp_path, played) -> None:
    notes = gpu.run(tmp_path, tmp_path / "work", budget_s=1.0, pieces=PIECES)
    assert played == []
    assert {notes.state(piece.name) for piece in PIECES} == {"not run"}
    found = record.read(tmp_path / "gpu-nvidia-test.json")
    (table,) = found["sections"]
    assert [row[:2] for row in table["rows"]] == [["one", "not run"], ["two", "not run"], ["three", "not run"]]
    assert "no time" in table["rows"][0][2]


def test_what_another_commit_did_is_done_again(tmp_path, played, monkeypatch) -> None:
    gpu.run(tmp_path, tmp_path / "work", pieces=PIECES)
    monkeypatch.setattr(record, "checkout", lambda: ("another", False))
    gpu.run(tmp_path, tmp_path / "work", pieces=PIECES)
    assert played == ["one", "two", "three"] * 2


def test_a_piece_that_takes_too_long_is_ended_and_its_log_named(tmp_path) -> None:
    state, why, found = gpu.played(gpu.PIECES[0], tmp_path, limit_s=0.05)
    assert (state, found) == ("failed", None)
    assert "tests.log" in why


def test_every_piece_has_its_limit_and_a_folder_that_can_be_made() -> None:
    from scripts import random_folder

    assert all(piece.limit_s < 600 for piece in gpu.PIECES)
    assert all(not piece.folder or piece.folder in random_folder.MODELS for piece in gpu.PIECES)
    assert len({piece.name for piece in gpu.PIECES}) == len(gpu.PIECES)


def test_a_piece_writes_what_it_found(tmp_path) -> None:
    gpu.play(PIECES[0], tmp_path)
    assert json.loads((tmp_path / "one.json").read_text()) == {"summary": "measured"}


def test_the_lane_is_measured_with_a_flow_of_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import latency
    from models.flow import flow_estimator

    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path))
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(latency, "measure", lambda **given: asked.append(given) or {})
    gpu.lane(tmp_path)
    assert asked[0]["settings"] == ("temporal.mode=reproject", "temporal.refiner=analytic", "temporal.flow=raft")
    assert flow_estimator("raft")
