"""Where frames go: the protocol and the scheme table."""

from __future__ import annotations

from typing import Protocol

from stream.frame import Frame


class Sink(Protocol):
    """An open receiver of frames, used by one writer thread."""

    def write(self, frame: Frame) -> None: ...
    def close(self) -> None: ...
