"""Stream batch: a frame per denoising step in flight, all in one call of the network per frame that comes.

Kodaira et al. 2023 (arXiv 2312.12491), §3.1. Here every frame keeps the settings it entered with until it leaves, so
pictures are those of the sequential loop, steps - 1 frames later.
"""

from __future__ import annotations

from torch import Tensor

from models.denoise import Network, Trajectory, advance, answered


class StreamBatch:
    """The frames of one stream on their way: the newest in place 0 at the noisiest step, the oldest at the last.

    `width` is how many rows one call of the network takes (`denoise.evaluated` says which), by default one per step.
    Not thread-safe.

    >>> batch = StreamBatch(steps=4)
    >>> for frame in frames:
    ...     if (finished := batch.push(network, frame)) is not None:  # None for the first three
    ...         show(finished.z)
    >>> rest = batch.drain(network)  # the last three
    """

    def __init__(self, steps: int, width: int | None = None) -> None:
        self.steps = steps
        self.width = width or steps
        self.reset()

    def __len__(self) -> int:
        """Frames inside."""
        return sum(flight is not None for flight in self._flights)

    def push(self, network: Network, frame: Trajectory) -> Trajectory | None:
        """All one step on, a new frame among them; the one that is finished with that, or None while it fills."""
        if len(frame.schedule.steps) != self.steps:
            raise ValueError(f"a frame of {len(frame.schedule.steps)} steps in a stream batch of {self.steps}")
        return self._turn(network, frame)

    def drain(self, network: Network) -> list[Trajectory]:
        """Finish the frames that are still inside, oldest first: the end of a file."""
        finished = []
        while len(self):
            if (done := self._turn(network, None)) is not None:
                finished.append(done)
        return finished

    def reset(self) -> None:
        """Throw away what is inside."""
        self._flights: list[Trajectory | None] = [None] * self.steps  # in place k the frame that has done k + 1 steps
        self._before: list[Tensor | None] = [None] * self.steps  # the newest estimate of x0 at each step

    def _turn(self, network: Network, newest: Trajectory | None) -> Trajectory | None:
        self._flights = answered(network, advance([newest, *self._flights[:-1]], self._before, self.width))
        for k, flight in enumerate(self._flights):
            if flight is not None:
                self._before[k] = flight.estimates[k]
        finished, self._flights[-1] = self._flights[-1], None
        return finished
