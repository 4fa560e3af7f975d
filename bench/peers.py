"""livestyle beside StreamDiffusion: the same networks, pictures, steps, noise, prompt and threads, in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accel.errors import UserError
from accel.machine import physical_cores
from bench import record
from bench.peer_lanes import FORMS, Work
from bench.peer_process import Lane
from bench.peer_report import BLOCKS, REFERENCE, Run, report
from bench.peer_streamdiffusion import PACKAGE, check, missing_peer
from bench.pictures import first_pictures

CLIP_FRAMES = 32  # of the source, shown over and over
COMPARED = 4  # frames whose pictures are compared
SEED = 5


def measure(
    source: str = "demo",
    model: str | None = None,
    engines: tuple[str, ...] = (),
    forms: tuple[str, ...] = (),
    size: tuple[int, int] = (256, 256),
    steps: int = 1,
    strength: float = 0.5,
    prompt: str = "oil painting",
    frames: int = 40,
    batch: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the same `frames` on each of our engines and each form of the peer, in interleaved blocks, and report.

    Every one has a process of its own; a frame is timed from its bytes to those of the picture. Without a `model` the
    networks are small and random; `batch` is for ours. `ratio` refers to the peer's fastest form. Raises UserError.
    """
    if lack := missing_peer():
        raise lack
    started = record.start()
    with ExitStack() as stack:
        device = _device()
        folder, environment = stack.enter_context(_folder(model))
        work = Work(folder, size, prompt, steps, strength, SEED, physical_cores(), device, batch)
        names = _lanes(engines, forms, device)
        images = first_pictures(source, size, CLIP_FRAMES, "crop")
        log(f"{', '.join(names)}: {size[0]}x{size[1]}, {steps} steps at strength {strength:g}, {work.threads} threads")
        lanes = {
            name: stack.enter_context(Lane(kind, which, work, images, environment))
            for name, (kind, which) in names.items()
        }  # the libraries are loaded side by side, the networks one after the other
        runs = {}
        for name, lane in lanes.items():
            log(f"building {name}")
            runs[name] = Run(lane, lane.ask("build"), lane.ask("pictures", COMPARED))
        _play(runs, max(1, -(-frames // BLOCKS)), log)
        log("comparing the pictures in float32")
        equal = lanes[f"{PACKAGE} {REFERENCE}"].ask("difference", COMPARED)
        told = record.model_of(str(folder)) | {"model": record.place_free(model) if model else "small random networks"}
    return report(runs, work, told | record.source_of(source), started, equal)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _folder(model: str | None) -> Iterator[tuple[Path, dict[str, str]]]:
    """The model's folder, checked, and what goes into the lanes' environment."""
    from models.load import folder_of, quiet_libraries

    quiet_libraries()
    if model is not None:
        found = folder_of(model)
        check(found)
        yield found.path, {}
        return
    from bench.peer_folder import random_folder

    with tempfile.TemporaryDirectory(prefix="livestyle-peers-") as scratch:
        folder = random_folder(Path(scratch) / "small")
        yield folder, {"LIVESTYLE_CACHE": scratch}  # engines of random weights are nobody's later


def _lanes(engines: Sequence[str], forms: Sequence[str], device: str) -> dict[str, tuple[str, str]]:
    """Name → kind of runner and which: ours, then the peer's forms, float32 always among them."""
    from accel.select import NAMES, ORDER, missing

    if not engines:
        here = [name for name in ORDER if missing(name) is None]
        engines = [here[0], "torch" if device == "cpu" else "torch-cuda"]
    if not forms:
        forms = ["bfloat16" if device == "cpu" else "float16", "tuned"]
    for given, known, what in ((engines, NAMES, "engine"), (forms, FORMS, "form")):
        if unknown := [name for name in given if name not in known]:
            raise UserError(f"unknown {what}: {unknown[0]}", hint=f"choose of {', '.join(known)}")
    if lacks := [lack for engine in engines if (lack := missing(engine))]:
        raise lacks[0]
    ours = {f"livestyle {engine}": ("livestyle", engine) for engine in engines}
    return ours | {f"{PACKAGE} {form}": (PACKAGE, form) for form in (REFERENCE, *forms)}


def _play(runs: dict[str, Run], per_block: int, log: Callable[[str], None]) -> None:
    for block in range(BLOCKS):
        log(f"block {block + 1} of {BLOCKS}")
        for run in list(runs.values())[:: 1 if block % 2 == 0 else -1]:
            times, computed, memory = run.lane.ask("run", per_block)
            run.blocks.append(times)
            run.computed += computed
            run.memory = max(run.memory, memory)
    for run in runs.values():
        run.peak = run.lane.ask("peak")
