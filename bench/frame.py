"""One stream's frame on a GPU, from bytes to bytes: how long it takes, how much of that the networks, what waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import record
from models.params import Params

if TYPE_CHECKING:
    from models.state import Networks, State
    from models.stylizer import LatentStylizer

BLOCKS = 4
WARM_UP = 40  # frames; by then whole frames are recorded
TRACED = 10
IMAGES = 16  # different ones, of noise: what they show does not change the time


def measure(
    model: str,
    size: tuple[int, int],
    engine: str = "torch-cuda",
    frames: int = 400,
    trace: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Frames one after the other, each waited for; `trace` is written for chrome://tracing."""
    from models.load import load

    started = record.start()
    stylizer = load(model, size, engine, log)
    params = Params.model_validate({"style": {"steps": 1, "strength": 0.5}})
    state = stylizer.open(params)
    play(stylizer, state, params, WARM_UP)
    whole = [play(stylizer, state, params, frames // BLOCKS) for _ in range(BLOCKS)]
    alone = [[networks_alone(stylizer.networks) for _ in block] for block in whole]
    waits = traced(lambda: play(stylizer, state, params, TRACED), trace) / TRACED
    frame, inside = (median(chain(*blocks)) for blocks in (whole, alone))
    row = [f"{frame:.2f}", f"{inside:.2f}", f"{max(0.0, 1 - inside / frame):.1%}", f"{waits:.1f}"]
    table = {
        "kind": "table",
        "title": "One frame",
        "note": "Medians. Waits: calls per frame that wait for the device; one is for the finished picture.",
        "columns": ["frame ms", "networks alone ms", "outside networks", "waits"],
        "rows": [row],
    }
    report = {
        "title": f"One frame at {size[0]}x{size[1]}, 1 step",
        "summary": f"{frame:.2f} ms a frame, {inside:.2f} ms of it in the networks",
        "sections": [table],
    }
    metrics = {"frame": record.metric("ms", "lower", whole), "networks": record.metric("ms", "lower", alone)}
    work = {**record.model_of(model), "size": f"{size[0]}x{size[1]}", "steps": 1}
    return record.record("frame", started, work, {engine: metrics}, report)


def play(stylizer: LatentStylizer, state: State, params: Params, count: int) -> list[float]:
    """Milliseconds of each frame, its picture in the host's memory."""
    width, height = stylizer.size
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, height, width, 3), dtype=np.uint8)
    times = []
    for i in range(count):
        begun = time.perf_counter()
        stylizer.step(state, images[i % IMAGES], params).wait()
        times.append((time.perf_counter() - begun) * 1e3)
    return times


def networks_alone(networks: Networks) -> float:
    """Milliseconds of encoder, UNet and decoder one after the other, with the inputs that they have."""
    import torch

    engines: tuple[Any, ...] = (networks.encode, networks.unet, networks.decode)
    _settle(engines[0].device)
    begun = time.perf_counter()
    with torch.inference_mode():
        for engine in engines:
            engine.replay.again()
    _settle(engines[0].device)
    return (time.perf_counter() - begun) * 1e3


def traced(work: Callable[[], object], path: Path | None) -> int:
    """How many calls waited for the device while it worked; their trace goes into the file."""
    from torch.profiler import profile

    with profile() as profiled:
        work()
    if path:
        profiled.export_chrome_trace(str(path))
    return sum("Synchronize" in event.name for event in profiled.events())


def _settle(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
