"""The machine we run on: its processor, and what we ask of its memory and its scheduler."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

R = TypeVar("R")

M_ARENA_MAX = -8  # of glibc's malloc.h
NICE = 4  # of 20; see `give_way`


def physical_cores() -> int:
    """Count the physical cores this process may run on, bounded by its container's CPU quota; at least 1."""
    logical = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = {_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in logical}
    # Where the system does not tell which logical CPUs share a core, each counts as one.
    cores = len(logical) if "" in siblings else len(siblings)
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, int(quota) // int(period))
    return max(cores, 1)


def cpu_name() -> str:
    """Return the processor's model name, or its architecture where the system does not tell."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def limit_arenas(count: int = 2) -> None:
    """Let glibc keep its free memory in few places instead of eight per core; before threads start, or it is late.

    Pictures are made in one thread and freed in another, and with an arena per thread that scatters what is free: over
    10,000 frames resident memory grew by 25 to 29 MB with glibc's default and by 3 to 17 MB with two arenas.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return  # the user's own choice
    _glibc("mallopt", M_ARENA_MAX, count)


def trim_memory() -> None:
    """Give free memory back to the system, where the C library can: what a closed stream leaves behind is scattered."""
    _glibc("malloc_trim", 0)


def giving_way(function: Callable[[], R]) -> R:
    """Call `function` in a thread that is in no hurry, and return its result.

    On Linux the threads that it starts inherit that: a library's workers then let threads that must not wait go first.
    """
    if sys.platform != "linux":
        return function()
    with ThreadPoolExecutor(1, initializer=give_way) as thread:
        return thread.submit(function).result()


def give_way() -> None:
    """Be in no hurry beside this process's other threads for good, by scheduling policy and a little nice (Linux).

    A nice value counts against every process of the machine: with 7 alone a frame beside a busy process per core took
    three times as long. With the policy alone a model that never rests halves the frame lane's rate.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):  # a container may forbid it
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_BATCH, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


def _glibc(function: str, *arguments: int) -> None:
    """Call a function of the C library; nothing happens where another one has no such."""
    with contextlib.suppress(AttributeError, OSError):
        getattr(ctypes.CDLL(None), function)(*arguments)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
