"""One stream's calls of the UNet, with the memory of everything that widens it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.denoise import Pass, Rows
from models.launched import Stages
from models.unet import Call, Companion, Seen

if TYPE_CHECKING:
    from accel.engine import Engine
    from models.parts import Part


class Calls:
    """The UNet's engine with the companions of one stream; `models.denoise.Network` is a call of it."""

    def __init__(self, engine: Engine, parts: Sequence[Part], time_ids: Tensor | None = None) -> None:
        self.companions: tuple[Companion, ...] = ()
        self.stages = Stages()  # of the present frame; whoever begins one puts its own here
        self._engine, self._parts, self._time_ids = engine, parts, time_ids
        self._rows = 0
        self._given = [spec.name for spec in engine.spec.inputs]
        self._found = [spec.name for spec in engine.spec.outputs]

    def remember(self, rows: int) -> None:
        """See to it that there is memory for rows 0 … rows - 1: denoising steps by guidance passes."""
        if self._rows != rows:
            self.companions, self._rows = tuple(part.companion(rows) for part in self._parts), rows

    def reset(self) -> None:
        """Forget every frame."""
        for companion in self.companions:
            companion.reset()

    def __call__(self, rows: Rows) -> Tensor:
        """The outputs (n, C, h, w) of one call, in memory of their own."""
        with self.stages("unet"):
            call, given = self.begin(rows)
            return self.keep(call, self._engine(*given))

    def begin(self, rows: Rows) -> tuple[Call, tuple[Tensor, ...]]:
        """A call as companions see it, and what the engine takes for it."""
        call = called(rows)
        for companion in self.companions:
            for row, fresh in zip(rows.rows, rows.fresh, strict=True):
                if fresh:
                    companion.reset(row)
        given = self._inputs(rows, call)
        return call, tuple(given[name] for name in self._given)

    def keep(self, call: Call, outputs: Sequence[Tensor]) -> Tensor:
        """Remember what the engine gave for it; the newest frames' outputs (n, C, h, w), in memory of their own."""
        output, *rest = outputs
        found = dict(zip(self._found[1:], rest, strict=True))
        for companion in self.companions:
            companion.keep(call, found)
        newest = output.view(len(call.rows), -1, *output.shape[1:])[:, -1]  # of a row's block of frames
        return newest.clone()

    def _inputs(self, rows: Rows, call: Call) -> Mapping[str, Tensor]:
        given: dict[str, Any] = {"z": call.z, "t": call.t, "words": call.words}
        if len(rows.prompt) > 1:
            given["pooled"] = rows.prompt[1]
        if self._time_ids is not None:
            given["time_ids"] = self._time_ids.expand(len(rows.rows), -1)
        if "guidance" in self._given:
            given["guidance"] = torch.cat([seen.guides["guidance"] for seen in call.frames])
        for companion in self.companions:
            given |= companion.inputs(call)
        return given


def called(rows: Rows) -> Call:
    """The same as companions see it."""
    frames: tuple[Seen, ...] = rows.frames
    return Call(
        z=rows.z.contiguous(),
        t=rows.t,
        words=rows.prompt[0],
        rows=rows.rows,
        steps=rows.steps,
        of=rows.of,
        frames=frames,
        pooled=rows.prompt[1] if len(rows.prompt) > 1 else None,
        live=rows.live,
        masked=tuple(kind is Pass.MASKED for kind in rows.kinds),
    )
