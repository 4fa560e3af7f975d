"""Which stored engines are in use, by this process or another: nothing that runs is pruned.

A holder keeps the entry's manifest open under a shared lock. The system takes the lock away when the process ends,
however it ends, so nothing stale is left and no process number is mistaken for another's, as in containers. Where
there is no such lock (Windows), the open file itself keeps the folder from being moved.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Held:
    """An entry in use, until it is closed or forgotten."""

    def __init__(self, file: int) -> None:
        self.close = weakref.finalize(self, os.close, file)


def hold(entry: Path) -> Held | None:
    """Keep the engine in this folder from being pruned for as long as what is returned lives; None = it is gone.

    >>> held = hold(root / digest)
    """
    try:
        file = os.open(entry / "manifest.json", os.O_RDONLY)
    except OSError:
        return None
    held = Held(file)
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks: it may be pruned, and is built again then
            fcntl.flock(file, fcntl.LOCK_SH)
    return held


def is_held(entry: Path) -> bool:
    """Whether anybody holds it."""
    if fcntl is None:
        return False
    try:
        with (entry / "manifest.json").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
