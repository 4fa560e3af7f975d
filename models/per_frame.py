"""What a stream works out once per frame: a frame is in several calls of the network, and a call has several frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from models.unet import Call, Seen

T = TypeVar("T")


class PerFrame(Generic[T]):
    """What `make` says of each frame, asked once and in the order in which frames come, as long as they are under way.

    >>> shown = PerFrame(lambda frame: next(fade))
    >>> shown(call)  # of each of its rows
    """

    def __init__(self, make: Callable[[Seen], T]) -> None:
        self._make = make
        self._made: list[tuple[Seen, T]] = []  # oldest first

    def __call__(self, call: Call) -> list[T]:
        self._made = self._made[-call.of :]  # no more are under way than there are steps
        for frame in (call.frames[row] for row in sorted(range(len(call.frames)), key=lambda row: -call.steps[row])):
            if not any(known is frame for known, _ in self._made):
                self._made.append((frame, self._make(frame)))
        return [next(made for known, made in self._made if known is frame) for frame in call.frames]
