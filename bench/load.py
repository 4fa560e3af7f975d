"""Other work on the same machine: one busy process per core, as a game or a compiler beside the stream would be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

BUSY = "import os, sys\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(i * i for i in range(200_000))"


def cores() -> int:
    """Logical processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def beside(count: int) -> Iterator[None]:
    """Keep `count` processes at work, each at ordinary priority; they end with this one whatever comes."""
    busy = [subprocess.Popen([sys.executable, "-S", "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
        for process in busy:
            process.wait()
