"""Where frames come from: the protocol, the scheme table and the one loop that retries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from stream.frame import Frame, VideoSpec


class Source(Protocol):
    """An open source of frames. `frames()` ends at the end of the stream and raises `SourceLost` when it breaks off."""

    spec: VideoSpec

    def frames(self) -> Iterator[Frame]: ...
    def close(self) -> None: ...
