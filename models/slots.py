"""Room for LoRAs in a compiled UNet: what they change comes in as a tensor, so a swap compiles nothing.

Beside a layer W x stands a branch up·(down·x) of a fixed rank R (Hu et al. 2021, arXiv 2106.09685, §4.1). The factors
of several LoRAs stand side by side along the rank, scale and alpha in `up`, zeros behind. No LoRA is all zeros, which
add nothing: the output is then the plain UNet's, bit for bit in torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from accel.engine import TensorSpec
from accel.errors import UserError
from models.lora import Update
from models.unet import Call
from models.worn import in_eights

Changes = Mapping[str, Sequence[tuple[Update, float]]]  # what each layer is changed by, and at which scale
NAME = "lora"  # of the graph's input, and of a frame's guide
VERSION = 1  # raise it when a branch changes what it computes: part of the engine's key


class Slots:
    """The `Feature` of room of rank R: beside the layers of the attention blocks, or with `everywhere` beside all.

    Attention blocks, from proj_in to proj_out, are what nearly all LoRAs change; LoCon and LCM-LoRA change the others
    too. All factors come in one tensor: to set two for each of 192 layers costs OpenVINO 4 ms per call, one costs 0.1.
    `config` is the UNet's.

    >>> slots = Slots(folder.config("unet"), rank=32)
    """

    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, config: Mapping[str, Any], rank: int, *, everywhere: bool = False) -> None:
        self.skeleton = skeleton(config)
        self.rank, self.everywhere = rank, everywhere
        self.shapes: dict[str, torch.Size] = {
            path: layer.weight.shape
            for path, layer in self.skeleton.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and (everywhere or in_attention(path, layer))
        }
        self._layers: tuple[Any, ...] = ()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(NAME, (sum(self._sizes),)),)

    @property
    def fingerprint(self) -> str:
        return f"slots {VERSION}, rank {self.rank}{', everywhere' if self.everywhere else ''};"

    def install(self, unet: Any) -> None:
        """Look up the layers; nothing is changed."""
        self._layers = tuple(unet.get_submodule(path) for path in self.shapes)

    @contextmanager
    def during(self, unet: Any, given: Mapping[str, Tensor], found: dict[str, Tensor]) -> Iterator[Mapping[str, Any]]:
        """Hooks on the layers for one pass: tracing and export follow them, and nothing of a call is left behind."""
        with ExitStack() as hooks:
            for layer, (down, up) in zip(self._layers, self._views(given[NAME]), strict=True):
                hooks.enter_context(hooked(layer, down, up))
            yield {}

    def tensors(self, changes: Changes) -> dict[str, Tensor]:
        """What the graph takes for these changes; UserError where there is no room. Reads no file, writes all anew."""
        for path, updates in changes.items():
            if updates and path not in self.shapes:
                raise UserError(
                    f"there is no room for a LoRA at {path}",
                    hint="name the LoRA in style.lora when starting: room is then made where it needs it",
                )
        factors = torch.zeros(sum(self._sizes))
        for path, (down, up) in zip(self.shapes, self._views(factors), strict=True):
            at = 0
            for update, scale in changes.get(path, ()):
                theirs, narrow = update.factors()
                rank = len(narrow)
                if at + rank > self.rank:
                    wanted = in_eights(max(sum(u.up.shape[1] for u, _ in us) for us in changes.values()))
                    raise UserError(
                        f"the LoRAs have rank {wanted} together, there is room for {self.rank}",
                        hint=f"start with style.lora_rank={wanted}, or name fewer",
                    )
                down[at : at + rank] = narrow.view(rank, *down.shape[1:])
                up[:, at : at + rank] = scale * theirs
                at += rank
        return {NAME: factors}

    @cached_property
    def nothing(self) -> dict[str, Tensor]:
        """What the graph takes for no LoRA."""
        return {NAME: torch.zeros(sum(self._sizes))}

    @cached_property
    def _sizes(self) -> list[int]:
        """Numbers in each layer's down and up, one after the other."""
        return [self.rank * n for shape in self.shapes.values() for n in (math.prod(shape[1:]), shape[0])]

    def _views(self, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each layer's down (R, in[, k, k]) and up (out, R). One split: slices compile three times as slowly."""
        parts = iter(factors.split_with_sizes(self._sizes))
        return [
            (next(parts).view(self.rank, *shape[1:]), next(parts).view(shape[0], self.rank))
            for shape in self.shapes.values()
        ]


class WornSlots:
    """A stream's side of `Slots`: the tensors that its newest frame was prepared with, under the guide "lora".

    A call has one set of weights, so frames of a stream batch already under way go on under the newest frame's.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._placed: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None  # what was worn, on the device

    def inputs(self, call: Call) -> Mapping[str, Tensor]:
        newest = min(zip(call.steps, call.frames, strict=True), key=lambda pair: pair[0])[1]
        found: Mapping[str, Tensor] | None = newest.guides.get(NAME)
        worn = self._slots.nothing if found is None else found
        if call.z.device.type == "cpu":
            return worn
        if self._placed is None or self._placed[0] is not worn:  # many megabytes: once per change, not per call
            self._placed = worn, {name: tensor.to(call.z.device) for name, tensor in worn.items()}
        return self._placed[1]

    def keep(self, call: Call, found: Mapping[str, Tensor]) -> None:
        """Nothing comes back."""

    def reset(self, row: int | None = None) -> None:
        """LoRAs are no memory of a scene."""


def skeleton(config: Mapping[str, Any]) -> Any:
    """A UNet without weights, for names and shapes."""
    from diffusers import UNet2DConditionModel

    make: Any = UNet2DConditionModel.from_config
    with torch.device("meta"):
        return make(dict(config))


def in_attention(path: str, layer: nn.Module) -> bool:
    """Whether a layer is a linear one, or a 1×1 convolution as good as one, of a UNet's attention blocks."""
    pointwise = not isinstance(layer, nn.Conv2d) or layer.kernel_size == (1, 1)
    return ".attentions." in f".{path}" and pointwise


@contextmanager
def hooked(layer: Any, down: Tensor, up: Tensor) -> Iterator[None]:
    """A layer with a narrow branch beside it: y + up·(down·x)."""
    handle = layer.register_forward_hook(partial(beside, down=down, up=up))
    try:
        yield
    finally:
        handle.remove()


def beside(layer: nn.Module, x: tuple[Tensor, ...], y: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """y of a layer and what factors down (R, in[, k, k]) and up (out, R) make of its input."""
    if not isinstance(layer, nn.Conv2d):
        return y + functional.linear(functional.linear(x[0], down), up)
    if layer.kernel_size == (1, 1) and layer.stride == (1, 1):
        narrow = down.flatten(1) @ x[0].flatten(2)  # (n, R, hw)
    else:
        narrow = functional.conv2d(x[0], down, None, layer.stride, layer.padding, layer.dilation).flatten(2)
    return y + (up @ narrow).view(y.shape)
