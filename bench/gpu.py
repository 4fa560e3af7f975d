"""Everything that needs a GPU in pieces of minutes, into records: what `make gpu` runs.

A piece is a process of its own with a time limit. What came of it is noted at once in `gpu-DEVICE.json`, so that a run
that was broken off goes on where it was, and a piece that did not run is noted too, with the reason. Its record, where
it made one, lies beside that file as `BENCHMARK-DEVICE.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.errors import UserError
from bench import record

ROOT = Path(__file__).parents[1]
SIZE = (512, 512)
BUDGET_S = 25 * 60.0
LEAST_S = 30.0  # left over for a piece to be begun at all
SHOWN = 200  # characters of a failure's last line


@dataclass(frozen=True, slots=True)
class Piece:
    """One part of the run: the model folder that it needs, and what it measures there."""

    name: str
    limit_s: float
    measure: Callable[[Path], dict[str, Any]]
    folder: str = ""  # a name that scripts/random_folder.py knows


def tests(folder: Path) -> dict[str, Any]:
    """The tests that are marked gpu; files without any may need packages that are not here."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = (done.stdout + done.stderr).strip().splitlines() or ["pytest said nothing"]
    if done.returncode:
        raise UserError(f"tests failed: {lines[-1]}", hint="\n".join(lines[-40:]))
    return {"summary": lines[-1]}


def build(folder: Path) -> dict[str, Any]:
    """Compile every network, into the cache: later pieces find it there."""
    from models.load import load

    begun = time.perf_counter()
    load(str(folder), SIZE, "torch-cuda", print)
    return {"summary": f"compiled in {time.perf_counter() - begun:.0f} s"}


def build_batch(folder: Path) -> dict[str, Any]:
    """The same for frames of several sessions in one launch."""
    from bench.scale import BATCH
    from models.load import load

    begun = time.perf_counter()
    stylizer = load(str(folder), SIZE, "torch-cuda", print)
    stylizer.widen(BATCH)
    return {"summary": f"up to {stylizer.width} frames a launch: compiled in {time.perf_counter() - begun:.0f} s"}


def engines(folder: Path) -> dict[str, Any]:
    """Every network eager, recorded, and compiled and recorded, against float32 on the CPU."""
    from accel.cache import default_root
    from accel.cuda_backend import CudaBackend

    backends = [CudaBackend(mode=None, record=None), CudaBackend(mode=None), CudaBackend()]
    return _networks(folder, backends, 50, default_root())


def engines_uncompiled(folder: Path) -> dict[str, Any]:
    """The same without the compiler, for networks that take it too long here."""
    from accel.cuda_backend import CudaBackend

    return _networks(folder, [CudaBackend(mode=None, record=None), CudaBackend(mode=None)], 30, None)


def _networks(folder: Path, backends: Sequence[Any], n: int, cache: Path | None) -> dict[str, Any]:
    from accel.export import example
    from bench.engines import Network, measure
    from bench.record import model_of
    from models.load import compiled_graphs

    networks = {
        name: Network(graph.build, graph.spec, example(graph.spec))
        for name, graph in compiled_graphs(str(folder), SIZE).items()
    }
    return measure(networks, backends, n, cache, {**model_of(str(folder)), "size": f"{SIZE[0]}x{SIZE[1]}"})


def latency(folder: Path) -> dict[str, Any]:
    """Rate, capture-to-sink latency and the share outside the networks."""
    from bench import latency

    return latency.measure(model=str(folder), engines=("torch-cuda",), size=SIZE, frames=400, log=print)


def lane(folder: Path) -> dict[str, Any]:
    """The frame lane while the style lane is never idle. RAFT's weights are random, and take the time of real ones."""
    from safetensors.torch import save_file

    from bench import latency
    from models.addons import ADDONS
    from models.raft import RaftNet

    weights = ADDONS["raft-small"].folder  # among this run's own models
    weights.mkdir(parents=True, exist_ok=True)
    save_file(RaftNet().state_dict(), weights / "raft.safetensors")
    settings = ("temporal.mode=reproject", "temporal.refiner=analytic", "temporal.flow=raft")
    return latency.measure(
        model=str(folder), engines=("torch-cuda",), size=SIZE, frames=600, settings=settings, log=print
    )


def frame(folder: Path) -> dict[str, Any]:
    """One stream's frame, its networks alone, and a trace."""
    from accel.cache import default_root
    from bench import frame

    return frame.measure(str(folder), SIZE, trace=default_root().parent.parent / "frame-trace.json", log=print)


def peers(folder: Path) -> dict[str, Any]:
    """StreamDiffusion on the same folder, frames and steps."""
    from bench import peers

    return peers.measure(model=str(folder), engines=("torch-cuda",), size=SIZE, steps=1, frames=200, log=print)


def scale(folder: Path) -> dict[str, Any]:
    """So many sessions at once."""
    from bench import scale

    return scale.measure(model=str(folder), engine="torch-cuda", size=SIZE, counts=(1, 2, 4, 8), log=print, batch=1)


def scale_batch(folder: Path) -> dict[str, Any]:
    """Four sessions whose frames share launches, against one."""
    from bench import scale

    return scale.measure(model=str(folder), engine="torch-cuda", size=SIZE, counts=(1, 4), log=print)


PIECES = (
    Piece("tests", 480, tests),
    Piece("build", 590, build, "sd-turbo"),
    Piece("engines", 400, engines, "sd-turbo"),
    Piece("latency", 240, latency, "sd-turbo"),
    Piece("latency-lane", 240, lane, "sd-turbo"),
    Piece("frame", 180, frame, "sd-turbo"),
    Piece("peers", 300, peers, "sd-turbo"),
    Piece("scale", 240, scale, "sd-turbo"),
    Piece("build-batch", 590, build_batch, "sd-turbo"),
    Piece("scale-batch", 240, scale_batch, "sd-turbo"),
    Piece("engines-xl", 400, engines_uncompiled, "sdxl-turbo"),
)


class Notes:
    """What came of each piece, kept in a file that is a record of the whole run."""

    def __init__(self, path: Path, pieces: Sequence[Piece] = PIECES) -> None:
        self.path, self._pieces = path, pieces
        self._started = record.start()
        self.found: dict[str, dict[str, Any]] = {}
        if path.exists():
            before = record.read(path)
            if before["run"]["commit"] == record.checkout()[0]:  # of another commit nothing counts
                self.found = before["pieces"]

    def state(self, name: str) -> str:
        """ "done", "failed" or "not run"."""
        return str(self.found.get(name, {}).get("state", "not run"))

    def put(self, name: str, state: str, why: str = "", seconds: float = 0.0) -> None:
        """Note it, and write the file whole."""
        self.found[name] = {"state": state, "why": why, "seconds": round(seconds, 1)}
        rows = [[piece.name, self.state(piece.name), self._why(piece.name)] for piece in self._pieces]
        report = {
            "title": "GPU",
            "summary": f"{sum(row[1] == 'done' for row in rows)} of {len(rows)} pieces",
            "pieces": self.found,
            "sections": [
                {"kind": "table", "title": "Pieces", "columns": ["piece", "state", "what came of it"], "rows": rows}
            ],
        }
        lanes = {name: {"time": record.metric("s", "lower", [[one["seconds"]]])} for name, one in self._timed()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record.write(self.path, record.record("gpu", self._started, {"pieces": len(rows)}, lanes, report))

    def _why(self, name: str) -> str:
        return str(self.found.get(name, {}).get("why", ""))

    def _timed(self) -> list[tuple[str, dict[str, Any]]]:
        return [(name, one) for name, one in self.found.items() if one["state"] == "done"]


def run(results: Path, work: Path, budget_s: float = BUDGET_S, pieces: Sequence[Piece] = PIECES) -> Notes:
    """Run what is not done yet, as far as the time goes; the state of every piece is in the notes afterwards."""
    device = device_name()
    end = time.monotonic() + budget_s
    notes = Notes(results / f"gpu-{device}.json", pieces)
    for piece in pieces:
        if notes.state(piece.name) == "done":
            print(f"{piece.name}: done before", flush=True)
            continue
        left = end - time.monotonic()
        if left < LEAST_S:
            notes.put(piece.name, "not run", "no time was left; run it again")
            continue
        print(f"{piece.name}: begun, {min(piece.limit_s, left):.0f} s at most", flush=True)
        begun = time.monotonic()
        state, why, found = played(piece, work, min(piece.limit_s, left))
        if found and "benchmark" in found:
            suffix = piece.name.partition("-")[2]
            record.write(results / f"{'-'.join(filter(None, (found['benchmark'], device, suffix)))}.json", found)
        notes.put(piece.name, state, why, time.monotonic() - begun)
        print(f"{piece.name}: {state} {why}", flush=True)
    return notes


def played(piece: Piece, work: Path, limit_s: float) -> tuple[str, str, dict[str, Any] | None]:
    """A piece in a process of its own: its state, why or what came of it, and its record, if it made one."""
    work.mkdir(parents=True, exist_ok=True)
    answer, log = work / f"{piece.name}.json", work / f"{piece.name}.log"
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.gpu", "--piece", piece.name, "--work", str(work)]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # of a checkout, not installed
    places = {"LIVESTYLE_CACHE": str(work / "cache"), "LIVESTYLE_MODELS": str(work / "models")}  # nothing of the user's
    own = os.environ | places | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as out:
        # A session of its own, so that a compiler's or a peer's processes end with it.
        child = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=own, start_new_session=True)
        try:
            status = child.wait(limit_s)
        except BaseException as error:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return "failed", f"longer than {limit_s:.0f} s; see {log.name}", None
            raise
    if status or not answer.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"exit status {status}"]
        return "failed", lines[-1][-SHOWN:], None
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return "done", str(found.get("summary", "")), found


def play(piece: Piece, work: Path) -> None:
    """The child's side: make the model's folder where it is not, measure, write the answer."""
    folder = work / "models" / piece.folder if piece.folder else work
    if piece.folder and not (folder / "model_index.json").exists():
        subprocess.run([sys.executable, "scripts/random_folder.py", piece.folder, str(folder)], cwd=ROOT, check=True)
    found = piece.measure(folder)
    (work / f"{piece.name}.json").write_text(json.dumps(found), encoding="utf-8")


def device_name() -> str:
    """The GPU's name as part of a file's, as in "nvidia-h200"; UserError where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("no CUDA device here", hint="run it on a machine with an NVIDIA GPU and its driver")
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: every piece is done; 1: some are not; 2: there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "gpu", help="models, compiled code and logs")
    parser.add_argument("--minutes", type=float, default=BUDGET_S / 60, help="for all pieces together")
    parser.add_argument("--piece", choices=[piece.name for piece in PIECES], help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    try:
        if given.piece:
            play(next(piece for piece in PIECES if piece.name == given.piece), given.work.resolve())
            return 0
        notes = run(given.results, given.work.resolve(), given.minutes * 60)
    except UserError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 2
    return 0 if all(notes.state(piece.name) == "done" for piece in PIECES) else 1


if __name__ == "__main__":
    sys.exit(main())
