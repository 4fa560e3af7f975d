"""How the first connection of a sink with a network went; later ones are made again by themselves."""

from __future__ import annotations

import threading

from accel.errors import UserError

FIRST_S = 15.0  # how long the first connection is waited for


class FirstConnection:
    """Made, failed with a reason, or not known yet. Only what comes first counts; from any thread."""

    def __init__(self) -> None:
        self._known = threading.Event()
        self._why = ""

    def made(self) -> None:
        """There is a connection."""
        self._known.set()

    def failed(self, why: str) -> None:
        """An attempt ended without one."""
        if not self._known.is_set():
            self._why = why
            self._known.set()

    def check(self, name: str, hint: str, timeout: float) -> None:
        """Wait for it; raises UserError when it failed or takes longer."""
        if not self._known.wait(timeout) or self._why:
            raise UserError(f"cannot publish to {name}: {self._why or 'no answer in time'}", hint=hint)
