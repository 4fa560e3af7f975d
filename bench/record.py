"""A record: what was measured, of what work, where, when and by which command; one format for every benchmark.

    {"format": 2, "benchmark": str, "title": str, "summary": str,
     "work": {name: value},              what has to be equal in two records that are compared
     "run": {"started", "seconds", "commit", "dirty", "command"},
     "machine": {name: text},            device, driver, versions
     "lanes": {lane: {metric: {"unit": str, "better": "lower" | "higher", "blocks": [[number, …], …]}}},
     "sections": [section, …]}           of `bench.report`

A lane is what takes turns with others: an engine, a peer, a number of sessions. A block is one turn of it: samples of
one block lie near each other in time and are more alike than those of two. Further keys belong to one benchmark.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import UserError
from bench.machine import describe

if TYPE_CHECKING:
    from models.params import Params

FORMAT = 2  # 1 told neither the work nor the commit
KEPT = 512  # samples of a block that go into the file, evenly spaced among the sorted ones
DIGITS = 6
KEYS = {
    "benchmark": str,
    "title": str,
    "work": dict,
    "run": dict,
    "machine": dict,
    "lanes": dict,
    "sections": list,
}
RUN = ("started", "seconds", "commit", "dirty", "command")
OUTPUTS = ("--json", "--html")
BETTER = ("lower", "higher")
FOR_THE_PAGE = ("pictures", "histogram")  # sections that the file does without: heavy, or the samples once more
AGAIN = "measure again with this version of livestyle"

Blocks = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Start:
    """The moment before a measurement, with the machine as it was then."""

    clock: float
    date: str
    machine: dict[str, str]


def start() -> Start:
    """Note time, load and machine; call it before anything is measured."""
    return Start(time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"), describe())


def record(
    benchmark: str,
    started: Start,
    work: Mapping[str, Any],
    lanes: Mapping[str, Mapping[str, Mapping[str, Any]]],
    report: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of a measurement that ends now; `report` has the title, the sections and whatever else.

    >>> record("latency", started, {"model": "mini"}, {"torch": {"rate": metric("fps", "higher", [[9.8]])}}, report)
    """
    commit, dirty = checkout()
    run = {
        "started": started.date,
        "seconds": round(time.monotonic() - started.clock, 1),
        "commit": commit,
        "dirty": dirty,
        "command": command(),
    }
    head = {"format": FORMAT, "benchmark": benchmark, "title": report["title"], "summary": report.get("summary", "")}
    body = {"work": dict(work), "run": run, "machine": started.machine, "lanes": lanes}
    return {**head, **body, **{key: value for key, value in report.items() if key not in head | body}}


def metric(unit: str, better: str, blocks: Blocks) -> dict[str, Any]:
    """One metric's samples; `better` is "lower" or "higher"."""
    return {"unit": unit, "better": better, "blocks": [_kept(block) for block in blocks if len(block)]}


def read(path: Path) -> dict[str, Any]:
    """The record in a file. Raises UserError for one that is missing, damaged or of another version."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", hint="name a file that --json wrote") from None
    except ValueError:
        raise UserError(f"{path} is not JSON, or not all of it", hint=AGAIN) from None
    if wrong := fault(found):
        raise UserError(f"{path} is no benchmark result: {wrong}", hint=AGAIN)
    return dict(found)


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report so that a reader sees all of it or the old one; lists of numbers take one line each."""
    sections = [section for section in report["sections"] if section["kind"] not in FOR_THE_PAGE]
    text = json.dumps({**report, "sections": sections}, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[-+\d.eE,\s]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text + "\n", encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def fault(found: Any) -> str:
    """What is wrong with a record, or ""."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        told = found.get("format", 1) if isinstance(found, dict) else "none"
        return f"format {told}, this version reads {FORMAT}"
    for key, kind in KEYS.items():
        if not isinstance(found.get(key), kind):
            return f"no {key}" if key not in found else f"{key} is not a {kind.__name__}"
    if missing := [key for key in RUN if key not in found["run"]]:
        return f"no {missing[0]} in run"
    if not isinstance(found["run"]["started"], str) or not re.match(r"\d{4}-\d\d-\d\dT.*Z$", found["run"]["started"]):
        return f"started is no time: {found['run']['started']!r}"
    for lane, metrics in found["lanes"].items():
        for name, one in metrics.items() if isinstance(metrics, dict) else [("", None)]:
            if not _is_metric(one):
                return f"{lane} {name} is no metric".replace("  ", " ")
    return ""


def _is_metric(one: Any) -> bool:
    if not isinstance(one, dict) or one.get("better") not in BETTER or not isinstance(one.get("unit"), str):
        return False
    blocks = one.get("blocks")
    return isinstance(blocks, list) and all(
        isinstance(block, list) and block and all(isinstance(value, int | float) for value in block) for block in blocks
    )


def _kept(block: Sequence[float]) -> list[float]:
    """The block's samples in order of time, or, of many, so many of the sorted ones, the extremes among them."""
    if len(block) > KEPT:
        ordered, last = sorted(block), len(block) - 1
        block = [ordered[round(i * last / (KEPT - 1))] for i in range(KEPT)]
    return [float(f"{value:.{DIGITS}g}") for value in block]


def checkout() -> tuple[str, bool]:
    """The commit that is measured, and whether files differ from it; "" where nobody knows.

    For a copy without .git, LIVESTYLE_COMMIT tells it, with a "+" behind it for changes.
    """
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # or installed into some other project's environment
        told = os.environ.get("LIVESTYLE_COMMIT", "")
        return told.rstrip("+"), told.endswith("+")
    try:
        commit = _git(root, "rev-parse", "--short=10", "HEAD")
        return commit, bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return "", False


def _git(root: Path, *words: str) -> str:
    asked = ["git", "-C", str(root), *words]
    return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def command() -> str:
    """The command line of this run without where its report went, and every file by its name alone.

    Folders are this machine's business.
    """
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word in OUTPUTS:
            next(words, None)
        elif not word.startswith(tuple(f"{option}=" for option in OUTPUTS)):
            kept.append(place_free(word))
    return " ".join([os.path.basename(sys.argv[0]), *kept])


def place_free(word: str) -> str:
    """A word of a command line without the folders of a path, of a `key=path` too; URLs stay."""
    key, equals, value = word.rpartition("=")
    return key + equals + (value if "://" in value or not os.path.isabs(value) else os.path.basename(value))


def changed(params: Params) -> dict[str, Any]:
    """What tells the settings in `work`: those that are not the defaults."""
    from stream.config import flatten

    own, plain = flatten(params.model_dump(mode="json")), flatten(type(params)().model_dump(mode="json"))
    return {
        key: place_free(value) if isinstance(value, str) else value for key, value in own.items() if value != plain[key]
    }


def source_of(url: str) -> dict[str, str]:
    """What tells a source in `work`: its name, and the digest of a file."""
    path = Path(url)
    if "://" in url or not path.is_file():
        return {"source": url}
    with path.open("rb") as file:
        return {"source": path.name, "source_digest": hashlib.file_digest(file, "sha256").hexdigest()[:12]}


def model_of(model: str) -> dict[str, str]:
    """What tells a model in `work`: its name, and a digest of its configurations and weights."""
    from models.weights import found

    root, digest = found(model), hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".json", ".safetensors", ".bin"):
            with path.open("rb") as file:
                digest.update(f"{path.relative_to(root)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return {"model": place_free(model), "model_digest": digest.hexdigest()[:12]}
