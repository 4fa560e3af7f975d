"""The machine a measurement was made on, as a table for its report."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from accel.machine import cpu_name, physical_cores

PACKAGES = ("torch", "openvino", "diffusers", "transformers", "numpy")


def describe() -> dict[str, str]:
    """Return name → value: processor, cores, load, GPU, system and the versions of what computes."""
    import torch

    found = {"CPU": cpu_name(), "cores": f"{physical_cores()} physical usable, {os.cpu_count()} logical"}
    found["torch threads"] = str(torch.get_num_threads())
    if hasattr(os, "getloadavg"):
        # A reader must be able to see that something else was running.
        found["load average"] = f"{os.getloadavg()[0]:.2f} over the last minute, at the start"
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    found["Python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
