"""The machine a measurement was made on: what it is, what it carries, and how fast it can multiply and copy."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path

import psutil

from accel.machine import cpu_name, physical_cores

PACKAGES = (
    *("torch", "openvino", "nncf", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13-libs"),
    *("diffusers", "transformers", "numpy"),
)
MATMUL = {"cpu": (512, 1024), "cuda": (4096, 8192)}  # rows of the square matrices; the quicker size counts
COPIED = {"cpu": 256 << 20, "cuda": 2 << 30}  # bytes, well beyond every cache
CEILING_RUNS = 9  # at least
CEILING_S = 0.2  # of each, at least: short ones find a moment in which nothing disturbs them


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this machine reaches at best, measured by torch's own matmul and copy."""

    gflops: dict[str, float]  # by dtype, 10⁹ operations per second, a multiplication and an addition being two
    gbytes: float  # per second, read and written together

    def compute(self, precision: str) -> float:
        """The ceiling of a spec's precision: the quickest dtype for "fast"."""
        return self.gflops["float32"] if precision == "fp32" else max(self.gflops.values())

    def or_better(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements, each by itself: on a machine that others use the lower one was disturbed."""
        gflops = {name: max(value, other.gflops[name]) for name, value in self.gflops.items()}
        return Ceilings(gflops, max(self.gbytes, other.gbytes))


def describe() -> dict[str, str]:
    """Return name → value: device, processor, cores, load, GPU, driver, system and the versions of what computes."""
    import torch

    found = {"device": cpu_name(), "CPU": cpu_name()}
    found["cores"] = f"{physical_cores()} physical usable, {os.cpu_count()} logical"
    found["memory"] = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    found["torch threads"] = str(torch.get_num_threads())
    if hasattr(os, "getloadavg"):
        # A reader must be able to see that something else was running.
        found["load average"] = f"{os.getloadavg()[0]:.2f} over the last minute, at the start"
    if torch.cuda.is_available():
        at = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["device"] = found["GPU"] = at.name
        found["GPU memory"] = f"{at.total_memory / 2**30:.1f} GiB, compute capability {at.major}.{at.minor}"
        found["driver"] = driver()
        found["CUDA"] = torch.version.cuda or "unknown"
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    found["Python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def driver() -> str:
    """The version of NVIDIA's driver, or "unknown"."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.split()
    except (OSError, subprocess.SubprocessError):
        told = []
    if not told:  # a container may have the driver without its tool
        try:
            words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
        except OSError:
            words = []
        told = [word for word in words if word.count(".") in (1, 2) and word.replace(".", "").isdigit()]
    return told[0] if told else "unknown"


def ceilings(device: str = "cpu", sides: Sequence[int] = (), copied: int | None = None) -> Ceilings:
    """Measure matmul and copy on a torch device with torch's present thread count; one to two seconds.

    `sides`: rows of the square matrices; `copied`: bytes.
    """
    import torch

    kind = torch.device(device).type
    sides, copied = sides or MATMUL[kind], copied or COPIED[kind]
    names = ("float32", "bfloat16") if kind == "cpu" else ("float32", "bfloat16", "float16")
    gflops = dict.fromkeys(names, 0.0)
    with torch.inference_mode():
        for name, side in product(names, sides):
            a, b = (torch.randn(side, side, device=device).to(getattr(torch, name)) for _ in range(2))
            seconds = _seconds(partial(torch.mm, a, b, out=torch.empty_like(a)), kind)
            gflops[name] = max(gflops[name], 2 * side**3 / seconds / 1e9)
        source = torch.empty(copied, dtype=torch.uint8, device=device).fill_(1)
        target = torch.empty_like(source)
        seconds = _seconds(partial(target.copy_, source), kind)
    return Ceilings(gflops, 2 * copied / seconds / 1e9)


def _seconds(work: Callable[[], object], kind: str) -> float:
    """The quickest of some runs: a ceiling is what nothing disturbed."""
    import torch

    def settled() -> float:
        if kind == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    work()
    times: list[float] = []
    while len(times) < CEILING_RUNS or sum(times) < CEILING_S:
        begun = settled()
        work()
        times.append(settled() - begun)
    return min(times)
