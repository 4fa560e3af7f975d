"""A frame that needs no memory of others as one launch: encoder, noise, every step and decoder in one CUDA graph.

What differs between frames and streams comes in as tensors (the picture, the embeddings, the noise), so streams share a
recording. What is a number in Python (noise levels, guidance scales) is part of it, so other numbers are another one.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from accel.engine import Engine
from accel.graphs import Recordable, Recorder, Replay

log = logging.getLogger(__name__)

SETTLED = 8  # frames alike before one is recorded: a slider on its way is not worth it
KEPT = 4  # recordings: each has memory of its own for all that is worked out on the way
COUNTED = 64  # kinds of frames whose number is remembered

Draw = Callable[..., tuple[Tensor, ...]]


class FrameGraph:
    """The recordings of one model's frames, by what is fixed in them. Not thread-safe.

    >>> if replay := graphs.of((schedule, guidance), draw, (picture, *embeddings, *noises)):
    ...     (stylized,) = replay(picture, *embeddings, *noises)
    """

    def __init__(self, device: torch.device, record: Recorder) -> None:
        self._device, self._record = device, record
        self._replays: OrderedDict[Hashable, Replay | None] = OrderedDict()
        self._counts: OrderedDict[Hashable, int] = OrderedDict()

    def of(self, key: Hashable, draw: Draw, example: Sequence[Tensor]) -> Replay | None:
        """The recording of frames of that kind; None as long as they are few, and where there is no memory for it."""
        if key in self._replays:
            self._replays.move_to_end(key)
            return self._replays[key]
        self._counts[key] = self._counts.pop(key, 0) + 1
        if len(self._counts) > COUNTED:
            self._counts.popitem(last=False)
        if self._counts[key] < SETTLED:
            return None
        if len(self._replays) >= KEPT:
            self._replays.popitem(last=False)  # before, so that its memory is there for the new one
        try:
            replay = Replay(draw, example, "frame", self._device, self._record)
        except torch.OutOfMemoryError:
            log.warning("too little GPU memory to record whole frames: their networks are launched one by one")
            self._replays[key] = None
            return None
        self._replays[key] = replay if replay.is_recorded else None  # else the engines' own graphs are better
        return self._replays[key]


def frame_graph(engines: Sequence[Engine]) -> FrameGraph | None:
    """Room for recordings of frames that go through these engines; None where they cannot be part of one."""
    recordable = [engine for engine in engines if isinstance(engine, Recordable) and engine.record]
    if len(recordable) < len(engines):
        return None
    first = recordable[0]
    assert first.record is not None
    return FrameGraph(first.device, first.record)
