"""How fast each engine runs each network, and how far it is from the torch reference."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from accel.engine import Backend, Engine, EngineSpec
from bench.machine import describe

if TYPE_CHECKING:
    from torch import Tensor, nn

WARMUP = 3  # launches before the clock counts


class Network(NamedTuple):
    """What is measured: a factory of fresh modules, the shapes, and inputs that look like the real ones."""

    factory: Callable[[], nn.Module]
    spec: EngineSpec
    example: tuple[Tensor, ...]


def measure(
    networks: Mapping[str, Network | tuple[Callable[[], nn.Module], EngineSpec, tuple[Tensor, ...]]],
    backends: Sequence[Backend],
    n: int = 30,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Time every network on every backend, `n` launches each, and return a JSON-able report for `report.html`.

    The backends take turns within each round, and the ratio to torch is the median over rounds of the two times
    of one round, so that a machine that slows down meanwhile slows all alike. Differences are against the
    network in fp32 on the CPU by PyTorch. Times are wall milliseconds from launch until the outputs are there,
    inputs on the backend's own device.

    >>> measure({"decode": (factory, spec, (latents,))}, [TorchBackend(), OpenVINOBackend()], n=50)["results"]
    """
    if n < 1:
        raise ValueError(f"n is at least 1, not {n}")
    machine = describe()
    results: list[dict[str, Any]] = []
    for name, network in networks.items():
        results += _measured(name, Network(*network), backends, n, cache)
    return {
        "title": "Engines",
        "summary": f"{n} launches each, backends taking turns; networks at batch and size of their row.",
        "machine": machine,
        "results": results,
        "sections": _sections(results),
    }


def _measured(
    name: str, network: Network, backends: Sequence[Backend], n: int, cache: Path | None
) -> list[dict[str, Any]]:
    from accel.torch_backend import TorchBackend

    exact = TorchBackend().load(network.factory, replace(network.spec, precision="fp32"))(*network.example)
    runs: list[tuple[Backend, Engine, tuple[Tensor, ...], float]] = []
    for backend in backends:
        started = time.perf_counter()
        engine = backend.load(network.factory, network.spec, cache)
        load_s = time.perf_counter() - started
        runs.append((backend, engine, tuple(t.to(_torch_device(backend)) for t in network.example), load_s))
    for _, engine, inputs, _ in runs:
        for _ in range(WARMUP):
            engine(*inputs)

    times: list[list[float]] = [[] for _ in runs]  # ms
    for turn in range(n):
        for offset in range(len(runs)):
            index = (turn + offset) % len(runs)  # each goes first equally often: caches are warm for the second
            _, engine, inputs, _ = runs[index]
            started = time.perf_counter()
            engine.launch(*inputs).wait()
            times[index].append((time.perf_counter() - started) * 1e3)

    torch_times = next((t for (b, *_), t in zip(runs, times, strict=True) if b.name == "torch"), None)
    rows = []
    for (backend, engine, inputs, load_s), samples in zip(runs, times, strict=True):
        ratio = torch_times and statistics.median(a / b for a, b in zip(samples, torch_times, strict=True))
        rows.append(
            {
                "network": name,
                "backend": backend.name,
                "device": backend.device,
                "fingerprint": backend.fingerprint,  # says the engine's own thread count
                "precision": network.spec.precision,
                "shape": " ".join("×".join(map(str, s.shape)) or "scalar" for s in network.spec.inputs),
                "load_s": load_s,
                "median_ms": statistics.median(samples),
                "p95_ms": percentile(samples, 95),
                "ratio_to_torch": ratio,  # below 1 is faster than torch; None without the torch backend
                "samples_ms": samples,
                **_difference(backend, engine(*inputs), exact),
            }
        )
    return rows


def percentile(samples: Sequence[float], q: float) -> float:
    """Return the q-th percentile (0–100), between the two nearest samples."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * q / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _torch_device(backend: Backend) -> str:
    return backend.device if backend.name.startswith("torch") else "cpu"


def _difference(backend: Backend, found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float | None]:
    if backend.name == "null":  # zeros: a difference would say nothing
        return {"max_abs": None, "relative_l2": None}
    largest, relative = 0.0, 0.0
    for a, b in zip(found, exact, strict=True):
        a, b = a.cpu().double(), b.cpu().double()
        largest = max(largest, float((a - b).abs().max()))
        relative = max(relative, float((a - b).norm() / b.norm().clamp_min(1e-12)))
    return {"max_abs": largest, "relative_l2": relative}  # of the worst output


def _sections(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(r["network"] for r in results))
    columns = ["network", "inputs", "engine", "median ms", "p95 ms", "time ÷ torch", "max |Δ|", "relative L2", "load s"]
    table = [
        [
            r["network"],
            r["shape"],
            r["backend"],
            round(r["median_ms"], 3),
            round(r["p95_ms"], 3),
            _short(r["ratio_to_torch"]),
            _short(r["max_abs"]),
            _short(r["relative_l2"]),
            round(r["load_s"], 2),
        ]
        for r in results
    ]
    per_network = {name: [r for r in results if r["network"] == name] for name in names}
    return [
        {
            "kind": "bars",
            "title": "Median time",
            "unit": "ms",
            "note": "The whisker reaches the 95th percentile.",
            "groups": [
                {
                    "label": name,
                    "bars": [
                        {"label": r["backend"], "value": r["median_ms"], "high": r["p95_ms"]} for r in per_network[name]
                    ],
                }
                for name in names
            ],
        },
        {"kind": "table", "title": "All numbers", "columns": columns, "rows": table},
        *(
            {
                "kind": "histogram",
                "title": f"{name}: distribution of times",
                "unit": "ms",
                "series": [{"label": r["backend"], "values": r["samples_ms"]} for r in per_network[name]],
            }
            for name in names
        ),
    ]


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"
