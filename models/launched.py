"""A frame on its way through the device, and the time its stages take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from accel.engine import Pending
    from models.safety import Censor


class Launched(Protocol):
    """A frame on its way through the device."""

    stages_ms: dict[str, float]  # time per stage of this frame

    def done(self) -> bool: ...
    def wait(self) -> None: ...
    def image(self) -> NDArray[np.uint8] | None:
        """The stylized picture, (H, W, 3) RGB, the caller's own; waits for it. None while a stream batch fills."""
        ...


class Stages:
    """Adds up the time of named stages of one frame, ms."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.ms[name] = self.ms.get(name, 0.0) + (time.perf_counter() - started) * 1e3


class Decoding:
    """A `Launched` whose last network is still running. Its stream's next step must come after `wait`.

    `censor` says what is shown for the picture, once it is there.
    """

    def __init__(self, pending: Pending, stages: Stages, censor: Censor | None = None) -> None:
        self.stages_ms = stages.ms
        self._censor = censor
        self._pending = pending
        self._stages = stages
        self._pixels: NDArray[np.uint8] | None = None

    def done(self) -> bool:
        return self._pixels is not None or self._pending.done()

    def wait(self) -> None:
        if self._pixels is None:
            with self._stages("decode"):
                (picture,) = self._pending.wait()
            with self._stages("pixels"):  # out of the engine's memory, and off the device
                pixels = picture[0].cpu().numpy().copy()
            if self._censor:
                with self._stages("safety"):
                    pixels = self._censor.shown(pixels)
            self._pixels = pixels  # not before: a checker that fails must not let one pass

    def image(self) -> NDArray[np.uint8]:
        self.wait()
        assert self._pixels is not None
        return self._pixels


class Failed:
    """The `Launched` of a frame that failed in a launch that others share: to wait for it raises what it failed of."""

    def __init__(self, error: Exception, stages: Stages) -> None:
        self.error = error
        self.stages_ms = stages.ms

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        raise self.error

    def image(self) -> NDArray[np.uint8] | None:
        raise self.error


class Filling:
    """The `Launched` of a frame that only went into a stream batch."""

    def __init__(self, stages: Stages) -> None:
        self.stages_ms = stages.ms

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None

    def image(self) -> None:
        return None
