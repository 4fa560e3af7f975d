"""To the device and back: page-locked buffers, events, and the stream of the frame lane, which goes first.

Everything here works on a CPU too, where nothing is copied, recorded or waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from accel.engine import Pending, Ready
from accel.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEPTH = 2  # buffers of a ring: one on its way while the other is being filled or read
FIRST = -1  # CUDA's priority: lower goes first; the default stream has 0, the least


class Event(Protocol):
    """A place in a stream's work, as `torch.cuda.Event`."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class Passed:
    """The event of a device that computes while it is called."""

    def record(self) -> None:
        return None

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


def event(device: torch.device) -> Event:
    """A fresh event; its `record` is of the current stream."""
    import torch

    if device.type != "cuda":
        return Passed()
    made: Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return made


@dataclass(frozen=True, slots=True)
class Enqueued:
    """Outputs that a stream is computing, and the event behind them."""

    outputs: tuple[Tensor, ...]
    event: Event

    def done(self) -> bool:
        with device_errors():
            return self.event.query()

    def wait(self) -> tuple[Tensor, ...]:
        with device_errors():
            self.event.synchronize()
        return self.outputs


def enqueued(outputs: tuple[Tensor, ...], device: torch.device) -> Enqueued | Ready:
    """Outputs of work that was put on the device's current stream just now."""
    if device.type != "cuda":
        return Ready(outputs)
    behind = event(device)
    behind.record()
    return Enqueued(outputs, behind)


class Ring:
    """Host buffers of one shape, page-locked where the device is a GPU, each with the event of its last copy."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, depth: int = DEPTH) -> None:
        import torch

        locked = device.type == "cuda"  # only from and to locked pages does a copy run beside the CPU
        self._slots = [(torch.empty(shape, dtype=dtype, pin_memory=locked), event(device)) for _ in range(depth)]
        self._next = 0

    def take(self) -> tuple[Tensor, Event]:
        """The buffer whose copy is longest ago, once that is over: as a rule it long is."""
        host, copied = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        copied.synchronize()
        return host, copied


class Upload:
    """Copies host tensors of one shape into device tensors without waiting for the device.

    >>> upload = Upload((1, 288, 512, 3), torch.uint8, device)
    >>> upload(torch.from_numpy(image)[None], static)  # the image may be written to at once
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._ring = Ring(shape, dtype, device)

    def __call__(self, tensor: Tensor, target: Tensor) -> None:
        """Through a buffer of our own, on the current stream."""
        host, copied = self._ring.take()
        host.copy_(tensor)
        target.copy_(host, non_blocking=True)
        copied.record()


class Download:
    """Fetches one output of launches to the host, behind them on their stream; one stream's own.

    What was fetched stays valid until `DEPTH` fetches later. Of an engine that computes on the CPU nothing is copied.

    >>> pending = download(decode.launch(latents))
    >>> pending.wait()[0].numpy()
    """

    def __init__(self) -> None:
        self._ring: Ring | None = None

    def __call__(self, pending: Pending) -> Pending:
        if not isinstance(pending, Enqueued):
            return pending
        (found,) = pending.outputs
        if self._ring is None:
            self._ring = Ring(tuple(found.shape), found.dtype, found.device)
        host, copied = self._ring.take()
        host.copy_(found, non_blocking=True)
        copied.record()
        return Enqueued((host,), copied)


class Verdict:
    """A yes or no that the device works out, read without waiting for it: as a rule with the next question.

    >>> if verdict.refused(tensor.isfinite().all()):
    ...     forget()
    """

    def __init__(self) -> None:
        self._download = Download()
        self._asked: deque[Pending] = deque()

    def refused(self, answer: Tensor) -> bool:
        """Whether this one is no; on a GPU, whether one of those before is that was not read yet."""
        if answer.device.type == "cpu":
            return not bool(answer)
        refused = False
        while self._asked and (self._asked[0].done() or len(self._asked) == DEPTH):
            refused |= not bool(self._asked.popleft().wait()[0])
        self._asked.append(self._download(enqueued((answer,), answer.device)))
        return refused


def brought(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor's copy on the device, on the current stream; the host's may be written to at once.

    Page-locked memory comes from PyTorch's own store of it, which gives none out again before its copy is over.
    """
    if tensor.device.type == device.type:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def fetched(tensor: Tensor) -> Pending:
    """A copy in the host's memory, behind what the current stream does; the caller's own."""
    import torch

    if tensor.device.type != "cuda":
        return Ready((tensor,))
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return enqueued((host,), tensor.device)


def frame_stream(device: torch.device) -> AbstractContextManager[object]:
    """Put the block's work on the device's stream that goes first: the frame lanes', in whichever thread.

    Everything else is on the default stream. What one makes for the other is `handed` over.
    """
    import torch

    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(_first(device.index or 0))


def handed(tensor: Tensor) -> Tensor:
    """A tensor of the frame stream's for the current one, which waits for it on the device.

    Its memory is not used anew before that is through with it.
    """
    import torch

    if tensor.device.type == "cuda":
        here = torch.cuda.current_stream(tensor.device)
        here.wait_stream(_first(tensor.device.index))
        tensor.record_stream(here)
    return tensor


@lru_cache(maxsize=8)
def _first(card: int) -> torch.cuda.Stream:
    import torch

    return torch.cuda.Stream(card, priority=FIRST)  # type: ignore[no-untyped-call]


@contextmanager
def device_errors(name: str = "frame") -> Iterator[None]:
    """CUDA's errors as the user's: its memory is full, or the card is gone."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()  # of what this attempt took: other sessions go on
        raise UserError(
            f"{name}: the GPU's memory is full ({first_line(error)})",
            hint="a smaller --size or --model, fewer sessions, or other programs off the GPU",
        ) from error
    except torch.AcceleratorError as error:
        raise UserError(
            f"{name}: the GPU stopped working ({first_line(error)})",
            hint="start livestyle again; if it comes back, look for Xid in the system's log (dmesg)",
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, of its many lines the first, and the next where that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
