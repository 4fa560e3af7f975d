"""Many kernels in one launch: a function of tensors recorded as a CUDA graph, and called plainly where it cannot be.

The CPU's work per frame then no longer depends on how many kernels there are. Rules, each learnt by somebody's crash:
record after three plain calls, so that nothing is compiled, tuned or allocated meanwhile; on a stream of its own; with
other threads' calls allowed; inputs and outputs in tensors that are allocated once and never move.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from accel.transfer import Event, Upload, event

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

WARM_UPS = 3

Call = Callable[[], tuple["Tensor", ...]]


class Recording(Protocol):
    """Work that can be launched again, as `torch.cuda.CUDAGraph`."""

    def replay(self) -> None: ...


Recorder = Callable[[Call, "torch.device"], tuple[tuple["Tensor", ...], Recording]]


@runtime_checkable
class Recordable(Protocol):
    """An engine that becomes part of a larger graph when it is launched while that is being recorded."""

    device: torch.device
    record: Recorder | None  # how; None: it is not to be recorded


def recorded(call: Call, device: torch.device) -> tuple[tuple[Tensor, ...], Recording]:
    """Record a call, warmed up before, as a CUDA graph; its outputs are filled by each replay, on whichever stream."""
    import torch

    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        outputs = call()
    return outputs, graph


def recording(device: torch.device) -> bool:
    """Whether the current stream is being recorded: what is called now becomes part of a larger graph."""
    import torch

    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Replay:
    """A function of tensors of fixed shapes on one device, with inputs and, once recorded, outputs of its own.

    `example` has the inputs; `record=None` never records. A failed recording or replay costs one line in the log and
    the speed, not the stream. Not thread-safe. Outputs are valid until the next call.

    >>> frame = Replay(lambda picture: (decode(denoise(encode(picture))),), (picture,), "frame", device, recorded)
    >>> (stylized,) = frame(picture)  # enqueued on the current stream
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        example: Sequence[Tensor],
        name: str,
        device: torch.device,
        record: Recorder | None,
    ) -> None:
        self._function, self._name, self._device = function, name, device
        self._inputs = tuple(tensor.to(device, copy=True) for tensor in example)
        self._uploads: dict[int, Upload] = {}
        self._last: Event = event(device)
        self._recording: Recording | None = None
        self._outputs: tuple[Tensor, ...] = ()
        self._warm_up()
        if record:
            self._record(record)

    @property
    def is_recorded(self) -> bool:
        return self._recording is not None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Enqueue it on the current stream, behind the call before; nothing is waited for."""
        if recording(self._device):  # into our inputs too: compiled code knows their layout, another compiles anew
            for own, given in zip(self._inputs, tensors, strict=True):
                own.copy_(given, non_blocking=True)
            return self._function(*self._inputs)
        self._behind_the_last()
        for index, (own, given) in enumerate(zip(self._inputs, tensors, strict=True)):
            self._take(index, own, given)
        outputs = self._replayed()
        self._last.record()
        return outputs

    def again(self) -> tuple[Tensor, ...]:
        """Enqueue it with the inputs it has, of the last call."""
        return self._replayed()

    def _take(self, index: int, own: Tensor, given: Tensor) -> None:
        if given is own:
            return
        if given.device.type == "cpu" and own.device.type != "cpu":
            if index not in self._uploads:
                self._uploads[index] = Upload(tuple(own.shape), own.dtype, self._device)
            self._uploads[index](given, own)
            return
        own.copy_(given, non_blocking=True)

    def _replayed(self) -> tuple[Tensor, ...]:
        if self._recording:
            try:
                self._recording.replay()
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self._give_up("replayed", error)
            else:
                return self._outputs
        return self._function(*self._inputs)

    def _warm_up(self) -> None:
        """On a stream of its own: what is allocated here is not in the way of the recording."""
        import torch

        if self._device.type != "cuda":
            for _ in range(WARM_UPS):
                self._function(*self._inputs)
            return
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._function(*self._inputs)
        stream.synchronize()

    def _record(self, record: Recorder) -> None:
        try:
            self._outputs, self._recording = record(lambda: self._function(*self._inputs), self._device)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._give_up("recorded", error)

    def _give_up(self, what: str, error: RuntimeError) -> None:
        self._recording, self._outputs = None, ()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        text = "%s cannot be %s as one CUDA graph (%s): its kernels are launched one by one"
        log.warning(text, self._name, what, reason)

    def _behind_the_last(self) -> None:
        """Wait, on the device, for the call before: that may have been on another lane's stream."""
        import torch

        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).wait_event(self._last)  # type: ignore[arg-type]


def is_out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)
