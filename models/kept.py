"""What was worked out lately, by what it was made of: prompts, style pictures, LoRAs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(Generic[K, V]):
    """What was made lately, up to a size in all, each of size 1 unless told. The least recently used go first.

    The newest always stays. Any thread may ask. What is there is given at once, also while something else is being
    made: one thing at a time, and making it may ask for others. So a frame whose prompt has been read never waits for
    another prompt.

    >>> prompts = Kept[str, Tensor](128)
    >>> words = prompts.get("a cat", lambda: read("a cat"))
    """

    def __init__(self, most: float, size: Callable[[V], float] = lambda value: 1) -> None:
        self._most, self._size = most, size
        self._known: OrderedDict[K, V] = OrderedDict()
        self._looking = threading.Lock()  # held for moments
        self.making = threading.RLock()  # held while something is made; several may share one

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: K, make: Callable[[], V]) -> V:
        """What is known under the key, else what is made now; what fails is not kept."""
        if (found := self.known(key)) is not None:
            return found
        with self.making:
            if (found := self.known(key)) is not None:  # made by another thread in the meantime
                return found
            made = make()
            self.put(key, made)
            return made

    def known(self, key: K) -> V | None:
        """The same, None where it would have to be made."""
        with self._looking:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def put(self, key: K, value: V) -> None:
        """Keep what was made elsewhere, in place of what was there."""
        with self._looking:
            self._known[key] = value
            self._known.move_to_end(key)
            total = sum(map(self._size, self._known.values()))
            while total > self._most and len(self._known) > 1:
                total -= self._size(self._known.popitem(last=False)[1])
