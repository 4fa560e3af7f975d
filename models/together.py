"""Frames of several streams in one launch: the same networks for more rows, and each stream's call in a row of its own.

At 512×512 one frame fills a fraction of a modern card: its kernels run in less than one wave, so that more rows cost
little more time. What a stream remembers, and what is shown to it, stays in its own `Calls`; only the tensors that an
engine takes are put side by side, and what it gives is handed back row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from accel.engine import Engine, EngineSpec, Pending, TensorSpec, check
from accel.transfer import Enqueued
from models.calls import Calls
from models.denoise import Asking, Rows
from models.launched import Stages
from models.networks import Graph

R = TypeVar("R")
Tensors = tuple[Tensor, ...]

# Streams whose frames one launch takes where nobody says another number, by kind of device. One frame keeps a CPU busy:
# on two cores launches of four gained `mini` 1.15 times the frames at 512×288, on OpenVINO as on torch (at 256×144 1.25
# and 1.65), and each was three times as long on its way: 97 ms for 28. So there nothing is shared unless asked for.
PAYS = {"cuda": 4}


def widths(count: int) -> list[int]:
    """Of which widths engines are made for launches of up to so many frames, beside those for one.

    >>> widths(4)
    [2, 4]
    """
    return [*(width for width in (2, 4, 8) if width < count), *([count] if count > 1 else [])]


def widened(graph: Graph, width: int) -> Graph:
    """An autoencoder's network for so many pictures at once."""
    spec = graph.spec

    def wide(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(one, shape=(width * one.shape[0], *one.shape[1:])) for one in specs)

    return Graph(
        lambda: Side(graph.build(), spec, width),
        replace(spec, inputs=wide(spec.inputs), outputs=wide(spec.outputs)),
    )


class Side(nn.Module):
    """A network for several pictures at once; its samples are those for one, each in every row."""

    def __init__(self, net: Any, spec: EngineSpec, width: int) -> None:
        super().__init__()
        self.net, self.spec, self.width = net, spec, width

    def forward(self, *tensors: Tensor) -> Any:
        return self.net(*tensors)

    def samples(self, inputs: tuple[TensorSpec, ...]) -> Iterator[Tensors]:
        for sample in self.net.samples(self.spec.inputs):
            yield tuple(torch.cat([tensor] * self.width) for tensor in sample)


class Widths:
    """One network as engines for one stream's frame and for several: the smallest that holds those that come.

    Inputs that have rows are put side by side; one that has none, such as a room for LoRAs, is the first frame's, so
    whoever calls brings together only frames that have it in common. Rows that nobody fills repeat the first frame's,
    and nobody looks at them. Outputs are valid until the next launch.

    >>> (one,), (other,) = Widths((single, double))([(picture,), (another,)])
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = tuple(engines)  # the first is one stream's, then by width
        self._single = engines[0].spec

    @property
    def most(self) -> int:
        """Frames that one launch takes."""
        return self._width(self.engines[-1])

    def __call__(self, calls: Sequence[Tensors]) -> list[Tensors]:
        """Each stream's outputs; on a GPU they are still being computed, and nothing is waited for."""
        if len(calls) == 1:
            return [self.engines[0](*calls[0])]
        engine, tensors = self._joined(calls)
        outputs = engine(*tensors)
        return [self._part(outputs, place) for place in range(len(calls))]

    def launch(self, calls: Sequence[Tensors]) -> list[Pending]:
        """The same, each stream with something to wait for."""
        if len(calls) == 1:
            return [self.engines[0].launch(*calls[0])]
        engine, tensors = self._joined(calls)
        pending = engine.launch(*tensors)
        if isinstance(pending, Enqueued):  # as a whole, so that it can be fetched behind the launch
            return [replace(pending, outputs=self._part(pending.outputs, place)) for place in range(len(calls))]
        return [Part(pending, self._part, place) for place in range(len(calls))]

    def _joined(self, calls: Sequence[Tensors]) -> tuple[Engine, Tensors]:
        engine = next(engine for engine in self.engines if self._width(engine) >= len(calls))
        filled = [*calls, *[calls[0]] * (self._width(engine) - len(calls))]
        rows = [a.shape != b.shape for a, b in zip(engine.spec.inputs, self._single.inputs, strict=True)]
        columns = zip(rows, *filled, strict=True)
        return engine, tuple(torch.cat(column) if apart else column[0] for apart, *column in columns)

    def _width(self, engine: Engine) -> int:
        return engine.spec.inputs[0].shape[0] // self._single.inputs[0].shape[0]

    def _part(self, outputs: Tensors, place: int) -> Tensors:
        sizes = (spec.shape[0] for spec in self._single.outputs)
        return tuple(tensor[place * n : (place + 1) * n] for tensor, n in zip(outputs, sizes, strict=True))


@dataclass(frozen=True, slots=True)
class Part:
    """One stream's part of a launch that others share."""

    pending: Pending
    part: Callable[[Tensors, int], Tensors]
    place: int

    def done(self) -> bool:
        return self.pending.done()

    def wait(self) -> Tensors:
        return self.part(self.pending.wait(), self.place)


def attempt(function: Callable[..., R], *arguments: Any) -> R | Exception:
    """What it returns, or what it raises: one stream's failure must leave the others of its launch alone."""
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001 not swallowed: its stream gets it in place of its picture
        return error


def side_by_side(unet: Widths, streams: Sequence[tuple[Calls, Asking[R]]], stages: Stages) -> list[R | Exception]:
    """Each stream's work to its end, one call of each in every launch of the UNet; what fails leaves the others alone.

    Frames may differ in everything that comes in rows: prompts, noise levels, numbers of steps and passes.
    """
    found: dict[int, R | Exception] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(streams)))
    while answers:
        asked: dict[int, Rows] = {}
        for place, answer in answers.items():
            asking = streams[place][1]
            try:
                asked[place] = asking.throw(answer) if isinstance(answer, Exception) else asking.send(answer)
            except StopIteration as done:
                found[place] = done.value
            except Exception as error:  # noqa: BLE001 as in `attempt`
                found[place] = error
        with stages("unet"):
            answers = dict(zip(asked, _round(unet, [(streams[i][0], rows) for i, rows in asked.items()]), strict=True))
    return [found[place] for place in range(len(streams))]


def _round(unet: Widths, asked: Sequence[tuple[Calls, Rows]]) -> list[Tensor | Exception]:
    """One call of several streams: the output of each, in memory of its own."""

    def begun(calls: Calls, rows: Rows) -> tuple[Any, Tensors]:
        call, given = calls.begin(rows)
        if len(asked) > 1:
            check(given, unet.engines[0].spec.inputs, "unet")  # what is wrong is its stream's, not that of the launch
        return call, given

    calls = [attempt(begun, *one) for one in asked]
    sound = [call for call in calls if not isinstance(call, Exception)]
    outputs = iter(unet([given for _, given in sound]) if sound else ())
    return [
        call if isinstance(call, Exception) else attempt(mine.keep, call[0], next(outputs))
        for (mine, _), call in zip(asked, calls, strict=True)
    ]
