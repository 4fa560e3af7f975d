"""Where else streams go: virtual cameras and publishers that clients start and end."""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from stream.frame import VideoSpec
from stream.live import Stream
from stream.output import Attached
from stream.server.errors import Refused
from stream.server.reach import Reach
from stream.sink import open_sink

END_S = 10.0  # s an output may take to finish
KEPT = 16  # outputs of a stream that are remembered


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a stream."""

    id: str
    url: str  # as it may be shown
    started: float  # time.time(), s
    attached: Attached

    def record(self) -> dict[str, Any]:
        """What there is to say about it, ready for JSON."""
        attached = self.attached
        state = getattr(attached.sink, "state", "live")  # a publisher tells whether it is connected
        if not attached.is_alive():
            state = "failed" if attached.error else "ended"
        return {
            "id": self.id,
            "url": self.url,
            "state": state,
            "started": round(self.started, 3),
            "frames": attached.sink.written,
            "warnings": list(attached.sink.warnings),
            "error": str(attached.error) if attached.error else None,
        }


class Outputs:
    """The outputs of every stream; its methods may wait for a device or a network: call them in a thread."""

    def __init__(self, reach: Reach, limit: int) -> None:
        self._reach, self._limit = reach, limit
        self._started: WeakKeyDictionary[Stream, dict[str, Output]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def start(self, stream: Stream, url: str) -> Output:
        """Open an output; raises Refused 403 or 409, UserError when it cannot be opened."""
        shown = self._reach.output(url)
        with self._lock:
            running = sum(o.attached.is_alive() for of in self._started.values() for o in of.values())
        if running >= self._limit:
            raise Refused(409, f"{self._limit} outputs are running", "end one first")
        spec = VideoSpec(*stream.size, stream.fps, live=True)
        sink = open_sink(url, spec)
        output = Output(secrets.token_hex(4), shown, time.time(), stream.attach(sink))
        with self._lock:
            of = self._started.setdefault(stream, {})
            of[output.id] = output
            for id in list(of)[:-KEPT]:
                if not of[id].attached.is_alive():
                    del of[id]
        return output

    def of(self, stream: Stream) -> list[dict[str, Any]]:
        """Every output of a stream, oldest first."""
        with self._lock:
            return [output.record() for output in self._started.get(stream, {}).values()]

    def stop(self, stream: Stream, id: str) -> None:
        """End an output and forget it; raises Refused 404."""
        with self._lock:
            output = self._started.get(stream, {}).pop(id, None)
        if output is None:
            raise Refused(404, "no such output of this stream")
        output.attached.stop()
        output.attached.join(END_S)
