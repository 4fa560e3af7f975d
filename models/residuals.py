"""What ControlNets add to a UNet: the inputs of its graph, and what a stream puts there from frame to frame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from accel.engine import TensorSpec
from models.control import control_picture
from models.depth import DISTANCES, Shades
from models.per_frame import PerFrame
from models.units import Unit

if TYPE_CHECKING:
    from accel.engine import Engine
    from models.unet import Call, Seen

GUIDE = "controls"  # the name in `Seen.guides` under which a frame has its units


class Residuals:
    """A UNet's `Feature` that takes, for so many rows, what ControlNets add: residual0 …, the middle block's last.

    And where there are T2I-Adapters their hints, hint0 …. Zeros leave every value as it was. Where a row is a block of
    frames, all of them take the row's residuals.
    """

    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, unet: Mapping[str, Any], size: tuple[int, int], rows: int = 1, hints: int = 0) -> None:
        self._residuals = residual_specs(unet, size, rows)
        self._hints = hint_specs(unet, size, rows, hints)
        self.inputs = self._residuals + self._hints
        self.fingerprint = f"residuals 1, {hints} hints"

    def install(self, unet: Any) -> None:
        """Nothing: every UNet takes residuals."""

    @contextmanager
    def during(self, unet: Any, given: Mapping[str, Tensor], found: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
        def rows(spec: TensorSpec) -> Tensor:
            frames = given["z"].shape[0] // spec.shape[0]
            return given[spec.name] if frames == 1 else given[spec.name].repeat_interleave(frames, 0)

        *down, middle = (rows(spec) for spec in self._residuals)  # (n, C, h, w) each
        arguments = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}
        if self._hints:  # a list of its own each time: the UNet takes out what it has used
            arguments["down_intrablock_additional_residuals"] = [rows(spec) for spec in self._hints]
        yield arguments


def residual_specs(unet: Mapping[str, Any], size: tuple[int, int], rows: int) -> tuple[TensorSpec, ...]:
    """One for each skip connection of a UNet, then the middle block's; `size` is the latents' (h, w).

    >>> residual_specs({"block_out_channels": [32, 64], "layers_per_block": 1}, (8, 12), rows=1)[-1]
    TensorSpec(name='residual4', shape=(1, 64, 4, 6), dtype='float32')
    """
    widths: Sequence[int] = unet["block_out_channels"]
    layers: int | Sequence[int] = unet["layers_per_block"]
    (height, width), shapes = size, [(widths[0], *size)]
    for i, channels in enumerate(widths):
        shapes += [(channels, height, width)] * (layers if isinstance(layers, int) else layers[i])
        if i < len(widths) - 1:
            height, width = (height + 1) // 2, (width + 1) // 2
            shapes.append((channels, height, width))
    shapes.append((widths[-1], height, width))
    return tuple(TensorSpec(f"residual{i}", (rows, *shape)) for i, shape in enumerate(shapes))


def hint_specs(unet: Mapping[str, Any], size: tuple[int, int], rows: int, count: int) -> tuple[TensorSpec, ...]:
    """One for each block of the UNet's way down, then the middle block's; the first `count` of them."""
    if not count:
        return ()
    widths, kinds = unet["block_out_channels"], unet["down_block_types"]
    (height, width), shapes = size, []
    for i, (channels, kind) in enumerate(zip(widths, kinds, strict=True)):
        whole = height, width
        if i < len(widths) - 1:
            height, width = (height + 1) // 2, (width + 1) // 2
        shapes.append((channels, *(whole if "CrossAttn" in kind else (height, width))))  # others add behind the halving
    shapes.append((widths[-1], height, width))
    return tuple(TensorSpec(f"hint{i}", (rows, *shape)) for i, shape in enumerate(shapes[:count]))


Row = tuple[list[float], Tensor | None]  # scales, and the picture (H, W, 3); None where nothing is to be added


class Controls:
    """A stream's `Companion` of `Residuals`: the ControlNets' and adapters' engines, whose outputs it adds up.

    Each frame's units come with it, so weights count from that frame on, and frames of a stream batch keep theirs; its
    control pictures are drawn once, each kind. Engines, by the names of `controls_of`, and the one that depth pictures
    need, are shared between streams. Units without an engine here do not count.
    """

    def __init__(self, engines: Mapping[str, Engine], residuals: Residuals, time_ids: Tensor | None = None) -> None:
        self._engines = dict(engines)
        self._time_ids = time_ids  # (1, 6), where the UNet takes them
        with torch.inference_mode(False):  # or, made while a frame is computed, nothing else could write to them
            self._sums = {spec.name: torch.zeros(spec.shape) for spec in residuals.inputs}
        self._filled: set[str] = set()  # which of them are not zero
        self._hints: dict[str, tuple[list[Row], tuple[Tensor, ...]]] = {}  # of adapters: from what, and what
        self._pictures = PerFrame(self._drawn)
        self._shades = Shades(engines[DISTANCES]) if DISTANCES in engines else None

    def inputs(self, call: Call) -> dict[str, Tensor]:
        """The sums over all units that speak in this call; zeros where none does."""
        self._move(call.z.device)
        pictures, filled = self._pictures(call), set[str]()
        for name, engine in self._engines.items():
            rows = [row_of(name, len(engine.spec.outputs), call, row, pictures[row]) for row in range(len(call.steps))]
            if all(picture is None for _, picture in rows):
                continue
            found = self._run(name, call, rows)
            for spec, tensor in zip(engine.spec.outputs, found, strict=True):
                if spec.name in filled:
                    self._sums[spec.name].add_(tensor)
                else:  # copied: an engine's outputs are its own and change with its next call
                    self._sums[spec.name].copy_(tensor)
                    filled.add(spec.name)
        for name in self._filled - filled:
            self._sums[name].zero_()
        self._filled = filled
        return dict(self._sums)

    def keep(self, call: Call, found: Mapping[str, Tensor]) -> None:
        """Nothing."""

    def reset(self, row: int | None = None) -> None:
        """Only the range of distances is a shot's own. A shot begins in row 0, and comes to the others later."""
        if self._shades and not row:
            self._shades.reset()

    def _drawn(self, frame: Seen) -> dict[str, Tensor]:
        """A frame's control pictures by kind, (H, W, 3) uint8; none for units of weight 0, or without an engine."""
        units: Sequence[Unit] = frame.guides.get(GUIDE, ())
        found = {}
        for kind in dict.fromkeys(unit.kind for unit in units if unit.weight > 0 and unit.name in self._engines):
            depth = self._shades if kind == "depth" else None
            drawn = depth(frame.image) if depth else control_picture(kind, frame.image)
            found[kind] = torch.from_numpy(np.require(drawn, requirements=("C", "W")))
        return found

    def _run(self, name: str, call: Call, rows: list[Row]) -> tuple[Tensor, ...]:
        """The engine's outputs, until its next call; an adapter's, which do not change from step to step, longer."""
        engine, adapter = self._engines[name], all(spec.name != "z" for spec in self._engines[name].spec.inputs)
        if adapter and name in self._hints and same(self._hints[name][0], rows):
            return self._hints[name][1]
        blank = torch.zeros_like(next(picture for _, picture in rows if picture is not None))
        given: dict[str, Any] = {"z": call.z, "t": call.t, "words": call.words, "pooled": call.pooled}
        given["picture"] = torch.stack([blank if picture is None else picture for _, picture in rows])  # (n, H, W, 3)
        given["scales"] = torch.tensor([scales for scales, _ in rows])  # (n, outputs)
        if self._time_ids is not None:
            given["time_ids"] = self._time_ids.expand(len(rows), -1)
        found = engine(*(given[spec.name] for spec in engine.spec.inputs))
        if adapter:
            self._hints[name] = rows, tuple(tensor.clone() for tensor in found)
        return found

    def _move(self, device: torch.device) -> None:
        """To where the engines compute; only the first time."""
        if next(iter(self._sums.values())).device != device:
            with torch.inference_mode(False):
                self._sums = {name: total.to(device) for name, total in self._sums.items()}


def row_of(name: str, count: int, call: Call, row: int, pictures: Mapping[str, Tensor]) -> Row:
    """One row's scales for an engine's outputs, and its picture, where units of that name speak."""
    scales, picture = [0.0] * count, None
    if call.live and not call.live[row]:  # it repeats another
        return scales, None
    wanted = call.rows[row] < call.of  # a call may hold several passes, the wanted prompt's first
    for unit in call.frames[row].guides.get(GUIDE, ()):
        if unit.name == name and unit.speaks(call.steps[row], call.of, wanted=wanted):
            scales = [a + b for a, b in zip(scales, unit.scales(count), strict=True)]
            picture = pictures[unit.kind]
    return scales, picture


def same(before: Sequence[Row], now: Sequence[Row]) -> bool:
    """Whether these are the same pictures, not only equal ones, at the same scales."""
    return all(a[1] is b[1] and a[0] == b[0] for a, b in zip(before, now, strict=True))
