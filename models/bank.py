"""The bank: keys, values and outputs of self-attention from frames before, which the present one may look at.

Extended attention O = softmax(Q [K_t, K_bank]ᵀ / √d) [V_t, V_bank] and feature fusion of StreamV2V (Liang et al. 2024,
arXiv 2405.15757), written from the paper. It needs no training and no motion modules. Unlike the paper's bank, which
merges frames at random, this one holds whole frames in slots behind a mask: the graph takes the bank and gives the
present frame's share alone, and what a slot holds stays bit for bit until it is overwritten.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accel.engine import TensorSpec
from accel.errors import UserError
from accel.transfer import Verdict
from models.rolling import HIDDEN
from models.self_attention import Only, Past, SelfAttention, self_attentions, take_over
from models.unet import Call

FUSED = ("mid_block", "up_blocks.0", "up_blocks.1")  # where features are fused, as in the paper: deep ones
ALIKE = 0.98  # cosine from which on two features are taken for the same place


@dataclass(frozen=True, slots=True)
class Layer:
    """What one self-attention stores per frame: keys and values (S, C), and outputs if it is fused."""

    path: str
    places: int  # S
    width: int  # C
    fused: bool


def bank_layers(
    config: Mapping[str, Any], size: tuple[int, int], only: Only = None, fused: Collection[str] = FUSED
) -> tuple[Layer, ...]:
    """The layers of a UNet's configuration for latents of (height, width); weights are not needed.

    `only` names levels (0 = full size) or blocks; level 0 has most of the memory and time.

    >>> bank_layers(folder.config("unet"), (64, 64), only=(1, 2, 3))  # Stable Diffusion without its largest level
    """
    from diffusers import UNet2DConditionModel

    make: Any = UNet2DConditionModel.from_config
    with torch.device("meta"):
        unet = make({key: value for key, value in config.items() if not key.startswith("_")})  # no notes of diffusers'
    layers = []
    for place in self_attentions(unet, only):
        height, width = (-(-side // 2**place.level) for side in size)  # each downsampler rounds up
        merges = any(f"{place.path}.".startswith(f"{block}.") for block in fused)
        layers.append(Layer(place.path, height * width, place.width, merges))
    return tuple(layers)


class Bank:
    """The feature: `slots` frames for each of the `rows` latents of a call, stored in `dtype`.

    Inputs are bank_mask (n, slots), added to the scores; with fused layers bank_fusion and bank_alike (n,); and for
    each layer i bank_k{i}, bank_v{i} and, if it is fused, bank_o{i}, (n, slots, S, C). Outputs are the present frame's,
    new_bank_k{i} … (n, S, C). That layout makes a stored frame one piece of memory, rows a view, and heads a reshape.

    >>> bank = Bank(bank_layers(config, (64, 64)), slots=2)
    >>> denoise = Denoise(unet, names, [bank])
    """

    def __init__(self, layers: tuple[Layer, ...], slots: int, rows: int = 1, dtype: str = "float32") -> None:
        if slots < 1 or rows < 1:
            raise ValueError(f"a bank needs slots and rows ≥ 1, not {slots} and {rows}")
        self.layers, self.slots, self.rows, self.dtype = layers, slots, rows, dtype
        self._processors: dict[str, SelfAttention] = {}

    @property
    def stored(self) -> tuple[tuple[str, Layer], ...]:
        """Each stored tensor's name and layer."""
        kinds = ((kind, i, layer) for i, layer in enumerate(self.layers) for kind in "kvo")
        return tuple((f"bank_{kind}{i}", layer) for kind, i, layer in kinds if kind != "o" or layer.fused)

    @property
    def fuses(self) -> bool:
        return any(layer.fused for layer in self.layers)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        numbers = [TensorSpec("bank_mask", (self.rows, self.slots))]
        if self.fuses:
            numbers += [TensorSpec(name, (self.rows,)) for name in ("bank_fusion", "bank_alike")]
        shapes = ((name, (self.rows, self.slots, layer.places, layer.width)) for name, layer in self.stored)
        return (*numbers, *(TensorSpec(name, shape, self.dtype) for name, shape in shapes))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        shapes = ((name, (self.rows, layer.places, layer.width)) for name, layer in self.stored)
        return tuple(TensorSpec(f"new_{name}", shape, self.dtype) for name, shape in shapes)

    @property
    def fingerprint(self) -> str:
        paths = " ".join(f"{layer.path}{'+' * layer.fused}" for layer in self.layers)
        return f"bank {self.slots} {self.dtype} {paths};"

    def install(self, unet: Any) -> nn.Module | None:
        """Take over the layers' processors; UserError where the UNet is another one than the configuration's."""
        widths = {place.path: place.width for place in self_attentions(unet)}
        for layer in self.layers:
            if widths.get(layer.path) != layer.width:
                raise UserError(f"the bank does not fit this UNet's {layer.path}", hint="fetch the model again")
        self._processors = take_over(unet, [layer.path for layer in self.layers])
        return None

    @contextmanager
    def during(self, unet: Any, given: Mapping[str, Tensor], found: dict[str, Tensor]) -> Iterator[Mapping[str, Any]]:
        """Around one forward pass: every layer gets its share of the bank, and leaves its new one."""
        with ExitStack() as stack:
            for i, layer in enumerate(self.layers):
                stack.callback(setattr, self._processors[layer.path], "past", None)
                fused = (given[f"bank_o{i}"], given["bank_fusion"], given["bank_alike"]) if layer.fused else ()
                past = Past(given[f"bank_k{i}"], given[f"bank_v{i}"], given["bank_mask"], *fused)
                self._processors[layer.path].past = past
            yield {}
            for i, layer in enumerate(self.layers):
                processor = self._processors[layer.path]
                for kind, tensor in zip("kvo", processor.new, strict=True):
                    if (name := f"bank_{kind}{i}") in given:
                        frames = tensor.shape[0] // self.rows  # of a window whose newest are computed again
                        found[f"new_{name}"] = tensor[frames - 1 :: frames].to(given[name].dtype)
                processor.new = ()


class BankMemory:
    """One stream's bank, allocated once: a ring of frames for each of `rows` (denoising step by guidance pass).

    A row's own frames only, so that what is attended to has the same noise level. The first frame of a shot is stored
    at once, then one in `bank_every` diffused frames; the newest overwrites the oldest, and with `sink` the shot's
    first stays. `guides` of each frame say `bank_every` and `fusion`; from the cosine `alike` on, features are fused.
    Not thread-safe, like the engine it feeds.
    """

    def __init__(
        self, bank: Bank, rows: int = 1, *, alike: float = ALIKE, sink: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        self.bank, self.rows, self.alike = bank, range(rows), alike
        self.sinks = 1 if sink and bank.slots > 1 else 0
        self.stored = [0] * rows  # frames so far
        self.since = [0] * rows  # diffused frames since the last one was stored
        self._verdicts = [Verdict() for _ in range(rows)]
        dtype: torch.dtype = getattr(torch, bank.dtype)
        with torch.inference_mode(False):  # or, made while a frame is computed, nothing else could write to them
            self.tensors = {
                name: torch.zeros(rows, bank.slots, layer.places, layer.width, dtype=dtype, device=device)
                for name, layer in bank.stored
            }

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def inputs(self, call: Call) -> Mapping[str, Tensor]:
        """The bank of the call's rows: views, not copies."""
        if next(iter(self.tensors.values())).device != call.z.device:  # only the first time
            with torch.inference_mode(False):
                self.tensors = {name: tensor.to(call.z.device) for name, tensor in self.tensors.items()}
        filled = torch.tensor([[slot < self.stored[row] for slot in range(self.bank.slots)] for row in call.rows])
        given = {name: tensor[call.rows.start : call.rows.stop] for name, tensor in self.tensors.items()}
        if self.bank.fuses:
            given["bank_fusion"] = torch.tensor([float(frame.guides["fusion"]) for frame in call.frames])
            given["bank_alike"] = torch.full((len(call.rows),), float(self.alike))
        return {"bank_mask": torch.where(filled, 0.0, HIDDEN), **given}  # (n, slots)

    def keep(self, call: Call, found: Mapping[str, Tensor]) -> None:
        """Store the new frame in the rows where one is due.

        What is not finite, after an overflow in half precision, is not stored: it would reach every later frame. The
        row forgets all instead.
        """
        live = [i for i in range(len(call.rows)) if not call.live or call.live[i]]
        for i in live:
            row = call.rows[i]
            self.since[row] += 1
            if not self.stored[row] or self.since[row] >= call.frames[i].guides["bank_every"]:
                self._store(row, {name: found[f"new_{name}"][i] for name in self.tensors})

    def _store(self, row: int, new: Mapping[str, Tensor]) -> None:
        """Put a frame, (S, C) of each tensor, into the row's next slot."""
        sound = torch.stack([tensor.sum(dtype=torch.float32) for tensor in new.values()]).isfinite().all()
        if self._verdicts[row].refused(sound):
            self.reset(row)
            return
        if sound.device.type != "cpu":  # what is not will be known a frame later; until then it must not be in there
            new = {name: torch.where(sound, tensor, 0) for name, tensor in new.items()}
        slot = self.stored[row]
        if slot >= self.sinks:
            slot = self.sinks + (slot - self.sinks) % (self.bank.slots - self.sinks)
        for name, tensor in new.items():
            self.tensors[name][row, slot] = tensor
        self.stored[row] += 1
        self.since[row] = 0

    def reset(self, row: int | None = None) -> None:
        """Forget all rows, or one, at a cut or another prompt. What is behind the mask is finite and weighs nothing."""
        for mine in self.rows if row is None else (row,):
            self.stored[mine] = self.since[mine] = 0
