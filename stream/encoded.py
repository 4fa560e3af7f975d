"""Where packets wait on their way from an encoder to those who send them."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from accel.errors import UserError
from stream.coder import Encoded
from stream.mailbox import MailboxClosed

CAPACITY = 32  # packets a reader may lag behind


class EncodedReader:
    """One reader's bounded queue, from an encoder's thread to an event loop.

    It starts at a keyframe; when it overflows, everything up to the next one is dropped and counted, and that one is
    asked for. `ask` and `leave` are the encoder's.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        ask: Callable[[], None],
        leave: Callable[[EncodedReader], None],
    ) -> None:
        self.dropped = 0  # packets
        self.overflows = 0
        self._loop, self._ask, self._leave = loop, ask, leave
        self._items: deque[Encoded] = deque()
        self._lock = threading.Lock()
        self._waiter: asyncio.Future[None] | None = None
        self._gap = True  # a keyframe must come next
        self._ended = False
        self._error: UserError | None = None

    def put(self, encoded: Encoded) -> None:
        """From the encoder's thread."""
        with self._lock:
            if self._ended:
                return
            if len(self._items) == CAPACITY:
                self.dropped += CAPACITY
                self.overflows += 1
                self._items.clear()
                self._gap = True
            if self._gap and not encoded.keyframe:
                self.dropped += self.overflows > 0
                self._ask()
                return
            self._gap = False
            self._items.append(encoded)
            self._wake()

    def peek(self) -> Encoded | None:
        """What `get` would give at once; None when it would wait."""
        with self._lock:
            return self._items[0] if self._items else None

    async def get(self) -> Encoded:
        """The next packet; raises `MailboxClosed` at the end, UserError when the encoder broke. One task may wait."""
        while True:
            with self._lock:
                if self._items:
                    return self._items.popleft()
                if self._error:
                    raise self._error
                if self._ended:
                    raise MailboxClosed
                waiter = self._waiter = self._loop.create_future()
            await waiter

    def end(self, error: UserError | None = None) -> None:
        """From the encoder's thread: nothing more will come."""
        with self._lock:
            self._ended, self._error = True, error
            self._wake()

    def close(self) -> None:
        """Leave; the last one to leave stops the encoder."""
        self.end()
        self._leave(self)

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter:
            with suppress(RuntimeError):  # that loop is closed: nobody waits there any more
                self._loop.call_soon_threadsafe(_resolve, waiter)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
