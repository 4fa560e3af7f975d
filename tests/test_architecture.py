"""Who may import whom: accel ← models ← stream ← bench; and what must not be loaded to print help."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "accel": {"accel"},
    "models": {"accel", "models"},
    "stream": {"accel", "models", "stream"},
    "bench": {"accel", "models", "stream", "bench"},
}
HEAVY_IN_STREAM = {"torch", "tensorrt", "openvino", "diffusers", "transformers"}


def imported(path: Path) -> set[str]:
    """The top-level packages a file imports anywhere, type-checking blocks included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        ours = imported(path) & (set(MAY_IMPORT) | {"tests"})
        # `livestyle bench` is the composition root's one call upward
        allowed = MAY_IMPORT[package] | ({"bench"} if path == ROOT / "stream" / "cli.py" else set())
        assert ours <= allowed, f"{path.relative_to(ROOT)} imports {ours - allowed}"


def test_stream_imports_no_deep_learning_library() -> None:
    for path in sorted((ROOT / "stream").rglob("*.py")):
        assert not imported(path) & HEAVY_IN_STREAM, path


def test_help_is_quick_and_light() -> None:
    code = "import sys, stream.cli; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    for heavy in ("torch", "diffusers", "transformers", "cv2", "av", "numpy", "openvino"):
        assert f"'{heavy}'" not in modules, heavy


@pytest.mark.parametrize("folder", ["accel", "models", "stream", "bench", "docs", "scripts"])
def test_nothing_names_a_path_of_the_machine_it_was_built_on(folder: str) -> None:
    for path in (
        p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".md", ".json", ".toml", ""} and p.is_file()
    ):
        text = path.read_text(errors="replace")
        assert "/work/" not in text, path
        assert "_name_or_path" not in text or path.suffix != ".json", path
