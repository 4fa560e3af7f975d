"""The command line as scripts see it: every test is a process of its own, with the fake stylizer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fakes import PATIENCE

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "av", "cv2", "diffusers", "transformers", "openvino", "tensorrt", "onnx")


def command(*arguments: object, step_s: float = 0.0) -> list[str]:
    code = (
        f"import sys; from tests import fakes; fakes.install({step_s}); from stream.cli import main; sys.exit(main())"
    )
    return [sys.executable, "-c", code, *map(str, arguments)]


def environment() -> dict[str, str]:
    hidden = ("DISPLAY", "WAYLAND_DISPLAY")
    return {**{k: v for k, v in os.environ.items() if k not in hidden}, "PYTHONPATH": str(ROOT)}


def livestyle(cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=30)


def assert_users_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    lines = result.stderr.splitlines()
    assert result.returncode == 2, result.stderr
    assert [line.partition(": ")[0] for line in lines] == ["error", "hint"], result.stderr
    for word in words:
        assert word in result.stderr


def count_frames(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_help_and_version_load_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from stream.cli import main; status = main(sys.argv[1:]);"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); sys.exit(status)"
    )
    for flag in ("--help", "--version"):
        done = subprocess.run(
            [sys.executable, "-c", code, flag], cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "[]\n")
        assert "livestyle" in done.stdout


def test_a_run_writes_the_file_and_the_measurements(tmp_path: Path) -> None:
    done = livestyle(
        tmp_path, "run", "test", "--to", "out.mp4", "--frames", 12, "--size", "128x72", "--stats", "s.json"
    )
    assert done.returncode == 0, done.stderr
    stats = json.loads((tmp_path / "s.json").read_text())
    assert count_frames(tmp_path / "out.mp4") == 12 == stats["frames_out"] == stats["frames_in"]
    assert stats["model"] == "fake"
    assert {"source", "encode", "unet", "handover", "write"} <= set(stats["stages_ms"])
    assert "\x1b" not in done.stderr  # no terminal, no escape codes


def test_the_result_goes_to_every_sink_and_through_again(tmp_path: Path) -> None:
    first = livestyle(tmp_path, "run", "test", "--to", "a.mp4", "--to", "b.mkv", "--frames", 5, "--size", "128x72")
    assert first.returncode == 0, first.stderr
    assert count_frames(tmp_path / "b.mkv") == 5
    second = livestyle(tmp_path, "run", "a.mp4", "--size", "64x64", "--quiet")
    assert second.returncode == 0
    assert second.stderr == ""
    assert count_frames(tmp_path / "a-livestyle.mp4") == 5  # no display: a file named after the source


def test_the_default_sink_an_adjusted_size_and_advice_are_each_said_in_one_line(tmp_path: Path) -> None:
    done = livestyle(tmp_path, "run", "test", "--frames", 2, "--size", "129x77", "--prompt", "zorp")
    assert done.returncode == 0, done.stderr
    for words in ("writing to test-livestyle.mp4", "size 129x77 → 128x80", "does not know: zorp"):
        assert sum(words in line for line in done.stderr.splitlines()) == 1


def test_the_demo_needs_no_arguments(tmp_path: Path) -> None:
    done = livestyle(tmp_path, "demo", "--frames", 8)
    assert done.returncode == 0, done.stderr
    assert "livestyle-demo.mp4" in done.stdout
    assert "fps" in done.stdout
    assert count_frames(tmp_path / "livestyle-demo.mp4") == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "missing.mp4", "--to", "null"], ["missing.mp4"]),
        (["run", "test", "--to", "no/such/place/out.mp4"], ["no/such/place"]),
        (["run", "test", "--to", "null", "--stats", "no/where/s.json"], ["no/where"]),
        (["run", "test", "--to", "null", "--set", "style.promt=x"], ["style.promt", "style.prompt"]),
        (["run", "test", "--to", "null", "--set", "style.steps=lots"], ["style.steps"]),
        (["run", "test", "--to", "null", "--size", "big"], ["big", "512x288"]),
        (["run", "test", "--to", "null", "--fit", "squash"], ["frame.fit"]),
        (["run", "test", "--to", "null", "--preset", "best"], ["best", "quality"]),
        (["run", "test", "--to", "null", "--config", "nope.toml"], ["nope.toml"]),
        (["run", "test", "--to", "a.mp4", "--to", "./a.mp4"], ["a.mp4"]),
        (["run", "gopher://x", "--to", "null"], ["gopher"]),
        (["run", "", "--to", "null"], ["no source"]),
        (["run", "http://[::1/x", "--to", "null"], ["no host"]),
        (["run", "test", "--to", ""], ["no sink"]),
        (["run", "test", "--to", "rtmp://"], ["no host"]),
        (["run", "test", "--to", "whip+https://[::1/x"], ["no host"]),
        (["run", "test", "--to", "null", "--stats", "/proc/s.json"], ["/proc/s.json"]),
        (["run"], ["SOURCE"]),
        (["run", "test", "--frames", "0"], ["frames"]),
        (["nonsense"], ["nonsense"]),
        (["run", "test", "--wrong"], ["--wrong"]),
    ],
)
def test_what_the_user_can_mend_is_said_in_two_lines(
    tmp_path: Path,
    arguments: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from stream.cli import main

    monkeypatch.chdir(tmp_path)
    status = main(arguments)  # in this process: fifteen interpreters take long
    assert_users_error(subprocess.CompletedProcess(arguments, status, "", capfd.readouterr().err), *words)
    assert list(tmp_path.iterdir()) == []


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    assert livestyle(tmp_path, "run", "test", "--to", "in.mp4", "--frames", 3, "--size", "64x64").returncode == 0
    (tmp_path / "link.mp4").hardlink_to(tmp_path / "in.mp4")
    before = (tmp_path / "in.mp4").read_bytes()
    for target in ("in.mp4", "link.mp4"):
        assert_users_error(livestyle(tmp_path, "run", "in.mp4", "--to", target), target)
    assert (tmp_path / "in.mp4").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_playable_file_and_the_measurements(tmp_path: Path, number: int) -> None:
    arguments = command("run", "test", "--to", "out.mp4", "--size", "64x64", "--stats", "s.json", step_s=0.005)
    process = subprocess.Popen(arguments, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    out = tmp_path / "out.mp4"
    deadline = time.monotonic() + PATIENCE
    while not (out.exists() and out.stat().st_size > 1000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    stats = json.loads((tmp_path / "s.json").read_text())
    assert count_frames(out) == stats["frames_out"] > 0


def test_a_bug_is_a_traceback_after_the_files_are_closed(tmp_path: Path) -> None:
    done = livestyle(tmp_path, "run", "test", "--to", "null", "--prompt", "boom", "--stats", "s.json", "--frames", 3)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ArithmeticError: boom" in done.stderr
    assert (tmp_path / "s.json").exists()


def test_lists_come_as_text_and_as_json(tmp_path: Path) -> None:
    os.environ["LIVESTYLE_CACHE"] = str(tmp_path / "cache")
    try:
        assert isinstance(json.loads(livestyle(tmp_path, "models", "--json").stdout), list)
        assert "mini" in livestyle(tmp_path, "models").stdout
        assert json.loads(livestyle(tmp_path, "engines", "list", "--json").stdout) == []
        assert livestyle(tmp_path, "engines", "verify").returncode == 0
    finally:
        del os.environ["LIVESTYLE_CACHE"]
