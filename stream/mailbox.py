"""The only places frames wait: one bounded mailbox, and a fan-out that gives every subscriber its own."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class MailboxClosed(Exception):
    """The mailbox is closed and everything that was in it has been taken."""


class Mailbox(Generic[T]):
    """A bounded, thread-safe queue with one of two policies for a full box.

    Live (the default): the newest item wins and the oldest is dropped and counted. Lossless: `put` blocks until there
    is room. `held`: an item that was taken keeps its place until `release`, so that a producer which waits for room
    makes the next one when it is about to be wanted, and it does not grow old here. `notify` is called without the lock
    after every change, `on_drop` with the number of items dropped.

    >>> box = Mailbox[int](); box.put(1), box.put(2), box.get(), box.dropped
    (True, True, 2, 1)
    """

    def __init__(
        self,
        capacity: int = 1,
        *,
        lossless: bool = False,
        held: bool = False,
        notify: Callable[[], None] | None = None,
        on_drop: Callable[[int], None] | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError("a mailbox needs room for one item")
        self.capacity = capacity
        self.lossless = lossless
        self.held = held
        self.dropped = 0
        self._notify = notify
        self._on_drop = on_drop
        self._items: deque[T] = deque()
        self._out = 0  # taken and not released
        self._closed = False
        self._changed = threading.Condition()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def closed(self) -> bool:
        """No item comes in any more; some may still be inside."""
        return self._closed

    @property
    def drained(self) -> bool:
        """Closed and empty."""
        with self._changed:
            return self._closed and not self._items

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> bool:
        """Leave an item; False when the mailbox is closed. A full lossless box blocks, a live one drops its oldest."""
        lost = 0
        with self._changed:
            if self.lossless:
                self._changed.wait_for(self._has_room_or_closed)
            if self._closed:
                return False
            if len(self._items) == self.capacity:
                self._items.popleft()
                lost = 1
                self.dropped += 1
            self._items.append(item)
            self._wake()
        if lost and self._on_drop:
            self._on_drop(lost)
        self._announce()
        return True

    def poll(self) -> T | None:
        """Take the oldest item, or None at once when there is none."""
        with self._changed:
            item = self._take() if self._items else None
        if item is not None:
            self._announce()
        return item

    def get(self, timeout: float | None = None) -> T:
        """Take the oldest item; raises `TimeoutError` after `timeout` seconds, `MailboxClosed` when drained."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._items or self._closed, timeout):
                raise TimeoutError(f"no item within {timeout} s")
            if not self._items:
                raise MailboxClosed
            item = self._take()
        self._announce()
        return item

    async def aget(self) -> T:
        """`get` for an event loop: no thread is blocked, and a cancelled call takes nothing."""
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if self._items:
                    item = self._take()
                    break
                if self._closed:
                    raise MailboxClosed
                waiter = (loop, loop.create_future())
                self._waiters.append(waiter)
            try:
                await waiter[1]
            finally:
                with self._changed, suppress(ValueError):
                    self._waiters.remove(waiter)
        self._announce()
        return item

    def __iter__(self) -> Iterator[T]:
        """Every item until the mailbox is drained; asking for the next releases the one before."""
        with suppress(MailboxClosed):
            while True:
                yield self.get()
                self.release()

    def release(self) -> None:
        """Give back the places of what was taken from a `held` mailbox; of no effect on any other."""
        with self._changed:
            self._out = 0
            self._changed.notify_all()

    def has_room(self) -> bool:
        """Whether `put` would return at once: always when live or closed."""
        with self._changed:
            return not self.lossless or self._has_room_or_closed()

    def wait_room(self, timeout: float | None = None) -> bool:
        """Block until an item would fit; False when the mailbox is closed or after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(self._has_room_or_closed, timeout) and not self._closed

    def close(self, discard: bool = False) -> None:
        """Take in nothing more and wake everyone; what is inside can still be taken, or is dropped and counted."""
        lost = 0
        with self._changed:
            self._closed = True
            if discard:
                lost = len(self._items)
                self.dropped += lost
                self._items.clear()
            self._wake()
        if lost and self._on_drop:
            self._on_drop(lost)
        self._announce()

    def _has_room_or_closed(self) -> bool:
        return self._closed or len(self._items) + self._out < self.capacity

    def _take(self) -> T:
        item = self._items.popleft()
        self._out += self.held
        self._changed.notify_all()
        return item

    def _wake(self) -> None:
        self._changed.notify_all()
        waiters, self._waiters = self._waiters, []
        for loop, waiter in waiters:
            with suppress(RuntimeError):  # that loop is closed: nobody waits there any more
                loop.call_soon_threadsafe(_resolve, waiter)

    def _announce(self) -> None:
        if self._notify:
            self._notify()


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Fanout(Generic[T]):
    """Hands every item to every subscriber's own mailbox.

    A slow live subscriber loses items and holds nobody up; a full lossless one blocks `put` (ask `has_room` first).
    `notify` is called whenever a subscriber takes something.
    """

    def __init__(self, notify: Callable[[], None] | None = None) -> None:
        self._notify = notify
        self._boxes: tuple[Mailbox[T], ...] = ()
        self._closed = False
        self._lock = threading.Lock()

    def subscribe(
        self, capacity: int = 1, *, lossless: bool = False, on_drop: Callable[[int], None] | None = None
    ) -> Mailbox[T]:
        """A new mailbox that gets every item from now on; close it to unsubscribe."""
        box = Mailbox[T](capacity, lossless=lossless, notify=self._notify, on_drop=on_drop)
        with self._lock:
            closed = self._closed
            if not closed:
                # Live ones first, so that blocking on a file never delays a viewer.
                self._boxes = tuple(sorted((*self._boxes, box), key=lambda b: b.lossless))
        if closed:
            box.close()
        return box

    def __len__(self) -> int:
        return sum(not box.closed for box in self._boxes)

    def put(self, item: T) -> None:
        """Give the item to everyone; blocks while a lossless subscriber is full, nobody's lock held."""
        boxes = self._boxes
        kept = [box.put(item) for box in boxes]
        if not all(kept):
            with self._lock:
                self._boxes = tuple(box for box in self._boxes if not box.closed)

    def has_room(self) -> bool:
        """Whether `put` would return at once."""
        return all(box.has_room() for box in self._boxes)

    def close(self) -> None:
        """Close every subscriber's mailbox; what they have not taken yet stays theirs."""
        with self._lock:
            self._closed = True
            boxes = self._boxes
        for box in boxes:
            box.close()
