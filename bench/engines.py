"""How fast each engine runs each network, how far it is from the torch reference, and from what the machine can do."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from accel.engine import Backend, Engine, EngineSpec
from bench import record
from bench.engine_report import metrics, sections
from bench.machine import Ceilings, ceilings

if TYPE_CHECKING:
    from torch import Tensor, nn

WARMUP = 3  # launches before the clock counts
REFERENCES = ("torch", "torch-cuda-eager")  # whose times the others' are told as a ratio of
OF_FLOAT32 = {"fp32": 1.0, "fast": 0.5, "int8": 0.25, "fp8": 0.25}  # bytes of a weight, by precision
MB = 1e6


class Network(NamedTuple):
    """What is measured: a factory of fresh modules, the shapes, and inputs that look like the real ones."""

    factory: Callable[[], nn.Module]
    spec: EngineSpec
    example: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one launch of a network needs at least, whichever engine runs it."""

    gflop: float | None  # 10⁹ operations, a multiplication and an addition being two; None where they cannot be counted
    weights_mb: float  # in float32


@dataclass(slots=True)
class Run:
    """One network on one backend, and its times in ms."""

    label: str
    backend: Backend
    engine: Engine
    inputs: tuple[Tensor, ...]
    load_s: float
    memory_mb: float  # the process, or the device, took more of after loading
    times: list[float] = field(default_factory=list)


Measured = tuple[Run, dict[str, Any]]  # and its row of the results


def measure(
    networks: Mapping[str, Network | tuple[Callable[[], nn.Module], EngineSpec, tuple[Tensor, ...]]],
    backends: Sequence[Backend],
    n: int = 30,
    cache: Path | None = None,
    work: Mapping[str, Any] | None = None,
    limits: Mapping[str, Ceilings] | None = None,
) -> dict[str, Any]:
    """Time every network on every backend, `n` launches each, and return a record.

    The backends take turns within each round, and the ratio to torch is the median over rounds of the two times
    of one round, so that a machine that slows down meanwhile slows all alike. Differences are against the
    network in fp32 on the CPU by PyTorch. Times are wall milliseconds from launch until the outputs are there,
    inputs on the backend's own device. `limits` are measured here, by kind of device, unless given; `work` tells the
    networks in the record, which takes their fingerprints otherwise.

    >>> measure({"decode": (factory, spec, (latents,))}, [TorchBackend(), OpenVINOBackend()], n=50)["results"]
    """
    if n < 1:
        raise ValueError(f"n is at least 1, not {n}")
    started = record.start()
    kinds = dict.fromkeys(map(_kind, backends))
    highest = dict(limits or {kind: ceilings(kind) for kind in kinds})
    measured = {}
    for name, network in networks.items():
        measured[name] = _measured(name, Network(*network), backends, n, cache)
        if not limits:  # again: what was disturbed then may not be now
            highest = {kind: at.or_better(ceilings(kind)) for kind, at in highest.items()}
    results = [row for rows in measured.values() for _, row in rows]
    for row in results:
        row |= _shares(row, highest[row["kind"]])
    prints = {name: Network(*network).spec.fingerprint[:12] for name, network in networks.items()}
    report = {
        "title": "Engines",
        "summary": f"{n} launches each, backends taking turns; networks at batch and size of their row.",
        "ceilings": {kind: {"gflops": at.gflops, "gbytes": at.gbytes} for kind, at in highest.items()},
        "results": results,
        "sections": sections(measured, highest),
    }
    told = {**(work or {"networks": prints}), "launches": n}
    return record.record("engines", started, told, metrics(measured), report)


def _measured(
    name: str,
    network: Network,
    backends: Sequence[Backend],
    n: int,
    cache: Path | None,
) -> list[Measured]:
    from accel.torch_backend import TorchBackend

    exact = TorchBackend().load(network.factory, replace(network.spec, precision="fp32"))(*network.example)
    cost = counted(network)
    runs: list[Run] = []
    for backend in backends:
        runs.append(_loaded(network, backend, cache, _label(backend, [run.label for run in runs])))
    for run in runs:
        for _ in range(WARMUP):
            run.engine(*run.inputs)
    for turn in range(n):
        for offset in range(len(runs)):
            run = runs[(turn + offset) % len(runs)]  # each goes first equally often: caches are warm for the second
            begun = time.perf_counter()
            run.engine.launch(*run.inputs).wait()
            run.times.append((time.perf_counter() - begun) * 1e3)
    reference = next((run for run in runs if run.backend.name in REFERENCES), None)
    rows: list[Measured] = []
    for run in runs:
        found = run.engine(*run.inputs)
        rows.append((run, _row(name, network, run, reference, cost) | _difference(run, found, exact)))
    return rows


def _label(backend: Backend, taken: Sequence[str]) -> str:
    """The backend's name, with a number where another of that name takes turns with it."""
    count = sum(label.partition(" ")[0] == backend.name for label in taken)
    return f"{backend.name} {count + 1}" if count else backend.name


def _loaded(network: Network, backend: Backend, cache: Path | None, label: str) -> Run:
    before, begun = _held(backend), time.perf_counter()
    engine = backend.load(network.factory, network.spec, cache)
    inputs = tuple(t.to(_torch_device(backend)) for t in network.example)
    load_s = time.perf_counter() - begun
    engine(*inputs)  # what is allocated at the first launch counts too
    return Run(label, backend, engine, inputs, load_s, max(0.0, _held(backend) - before) / MB)


def _held(backend: Backend) -> float:
    """Bytes taken of the device's memory, or by this process where the device is the CPU."""
    if _torch_device(backend).startswith("cuda"):
        import torch

        free, total = torch.cuda.mem_get_info()
        return float(total - free)
    return float(psutil.Process(os.getpid()).memory_info().rss)


def counted(network: Network) -> Cost:
    """Operations and weights of a network, from its shapes alone: nothing is computed."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    module = network.factory().eval().to("meta")
    weights = sum(p.numel() for p in module.parameters()) * 4 / MB
    inputs = [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in network.example]
    counter = FlopCounterMode(display=False)
    try:
        with torch.inference_mode(), counter:
            module(*inputs)
    except (RuntimeError, NotImplementedError):  # a network that looks at its numbers, or holds some outside buffers
        return Cost(None, weights)
    return Cost(counter.get_total_flops() / 1e9, weights)


def _row(name: str, network: Network, run: Run, reference: Run | None, cost: Cost) -> dict[str, Any]:
    spec = network.spec
    ratio = reference and statistics.median(a / b for a, b in zip(run.times, reference.times, strict=True))
    return {
        "network": name,
        "backend": run.label,
        "kind": _kind(run.backend),
        "device": run.backend.device,
        "fingerprint": run.backend.fingerprint,  # says the engine's own thread count
        "precision": spec.precision,
        "shape": " ".join("×".join(map(str, s.shape)) or "scalar" for s in spec.inputs),
        "load_s": run.load_s,
        "memory_mb": round(run.memory_mb, 1),
        "weights_mb": round(cost.weights_mb, 2),
        "moved_mb": round(_moved_mb(network, cost), 6),
        "gflop": cost.gflop,
        "quickest_ms": min(run.times),
        "median_ms": statistics.median(run.times),
        "p95_ms": percentile(run.times, 95),
        "ratio_to_torch": ratio,  # below 1 is faster than torch as it is; None without it among the backends
        "ratio_of_quickest": reference and min(run.times) / min(reference.times),
    }


def _shares(row: Mapping[str, Any], limit: Ceilings) -> dict[str, float | None]:
    """Of the ceilings, by the quickest launch, as they are of the quickest run; MB a millisecond are GB a second."""
    gflops = None if row["gflop"] is None else row["gflop"] / row["quickest_ms"] * 1e3
    return {
        "of_matmul": None if gflops is None else gflops / limit.compute(row["precision"]),
        "of_copy": row["moved_mb"] / row["quickest_ms"] / limit.gbytes,
    }


def _moved_mb(network: Network, cost: Cost) -> float:
    """What has to be read and written once by a launch that keeps everything between in caches, in the format used."""
    import torch

    tensors = (*network.spec.inputs, *network.spec.outputs)
    given: float = sum(torch.Size(s.shape).numel() * getattr(torch, s.dtype).itemsize for s in tensors) / MB
    return given + cost.weights_mb * OF_FLOAT32[network.spec.precision]


def percentile(samples: Sequence[float], q: float) -> float:
    """Return the q-th percentile (0–100), between the two nearest samples."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * q / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _torch_device(backend: Backend) -> str:
    """Where a backend's inputs are: engines on GPUs take tensors that are there."""
    return backend.device if backend.device.startswith("cuda") else "cpu"


def _kind(backend: Backend) -> str:
    return _torch_device(backend).partition(":")[0]


def _difference(run: Run, found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float | None]:
    if run.backend.name == "null":  # zeros: a difference would say nothing
        return {"max_abs": None, "relative_l2": None}
    largest, relative = 0.0, 0.0
    for a, b in zip(found, exact, strict=True):
        a, b = a.cpu().double(), b.cpu().double()
        largest = max(largest, float((a - b).abs().max()))
        relative = max(relative, float((a - b).norm() / b.norm().clamp_min(1e-12)))
    return {"max_abs": largest, "relative_l2": relative}  # of the worst output
