"""Which engine is chosen, and what is said when it cannot be."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from accel import machine, select
from accel.errors import UserError


def test_importing_accel_loads_no_engine_library() -> None:
    code = "import accel, sys; print([m for m in ('torch', 'openvino', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_openvino_reports_no_usage_and_writes_nothing_to_the_home_folder(tmp_path) -> None:
    code = (
        "import sys; from accel.openvino_backend import library; library()\n"
        "print([m for m in sys.modules if m.startswith('openvino_telemetry.')])"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_auto_takes_openvino_where_there_is_no_cuda_and_says_why(monkeypatch) -> None:
    monkeypatch.setattr(select, "_has_cuda", lambda: False)
    choice = select.choose("auto", threads=1)
    assert choice.backend.name == "openvino"
    assert "openvino" in choice.reason
    assert "no CUDA device" in choice.reason
    assert "\n" not in choice.reason


def test_auto_falls_to_torch_without_openvino_and_an_explicit_engine_does_not(monkeypatch) -> None:
    monkeypatch.setattr(select, "_has_cuda", lambda: False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert select.choose("auto").backend.name == "torch"
    with pytest.raises(UserError) as caught:
        select.choose("openvino")
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_auto_prefers_cuda(monkeypatch) -> None:
    monkeypatch.setattr(select, "_has_cuda", lambda: True)
    monkeypatch.setattr(select, "_make", lambda name, threads: select_fake(name))
    assert select.choose("auto").backend.name == "torch-cuda"


def select_fake(name: str) -> object:
    return type("Fake", (), {"name": name, "device": "cuda"})()


def test_tensorrt_says_what_it_lacks(monkeypatch) -> None:  # more of it in test_tensorrt.py
    monkeypatch.setattr(select, "_has_cuda", lambda: False)
    with pytest.raises(UserError, match="no CUDA device") as caught:
        select.choose("tensorrt")
    assert caught.value.hint


@pytest.mark.parametrize("name", ["torch", "null", "openvino"])
def test_named_engine_is_taken(name: str) -> None:
    assert select.choose(name, threads=1).backend.name == name


def test_unknown_engine_lists_the_known() -> None:
    with pytest.raises(UserError, match="unknown engine: onnx") as caught:
        select.choose("onnx")
    assert "openvino" in caught.value.hint


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("", 2)])
def test_cores_are_physical_and_bounded_by_the_containers_quota(monkeypatch, quota: str, cores: int) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(machine, "_read", lambda path: quota if "cgroup" in path else f"{int(path[27]) % 2}")
    assert machine.physical_cores() == cores
