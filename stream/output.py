"""One output of a live stream: its sink, in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from accel.errors import UserError
from stream.frame import Frame
from stream.mailbox import Mailbox
from stream.sink import Sink, SinkClosed
from stream.sound import Sound

log = logging.getLogger(__name__)


class Attached(threading.Thread):
    """Writes what its mailbox gets; closes the sink whatever happens. `say` is told when the sink broke.

    `ears` has the sound for a sink that can `hear`.
    """

    def __init__(
        self,
        name: str,
        sink: Sink,
        box: Mailbox[Frame],
        say: Callable[[str], None],
        ears: Mailbox[Sound] | None = None,
    ) -> None:
        super().__init__(name=f"output-{name}", daemon=True)
        self.sink = sink
        self.box = box
        self.error: Exception | None = None
        self._say = say
        self._ears = ears

    def run(self) -> None:
        """Write until stopped, or until the sink breaks: that ends this output alone."""
        for part in (self._write, self.sink.close):
            try:
                part()
            except SinkClosed:
                pass
            except Exception as error:  # noqa: BLE001 the isolation point of an output: the stream goes on
                self.error = self.error or error
            self.box.close(discard=True)
        if self._ears:
            self._ears.close(discard=True)
        if self.error is not None:
            if not isinstance(self.error, UserError):
                log.error("%s broke", self.name, exc_info=self.error)
            self._say(f"an output ended: {self.error}")

    def stop(self) -> None:
        """Take in nothing more; what is there is still written."""
        self.box.close()

    def _write(self) -> None:
        hear: Callable[[Sound], None] = getattr(self.sink, "hear", lambda sound: None)
        for frame in self.box:
            while self._ears and (sound := self._ears.poll()) is not None:
                hear(sound)
            self.sink.write(frame)
