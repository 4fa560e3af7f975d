"""A sink that only counts."""

from __future__ import annotations

from stream.frame import Frame, VideoSpec


def check(url: str, codec: str, origin: str | None) -> None:
    """Nothing can be wrong."""


def open_sink(url: str, spec: VideoSpec, codec: str, crf: int) -> NullSink:
    """A sink for measuring."""
    return NullSink()


class NullSink:
    """Counts frames and drops them."""

    def __init__(self) -> None:
        self.written = 0
        self.warnings: list[str] = []

    def write(self, frame: Frame) -> None:
        """Count one."""
        self.written += 1

    def close(self) -> None:
        """Nothing to close."""
