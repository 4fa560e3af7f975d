"""LoRAs in networks: merged into weights for good, or worn by a stream without anything being changed.

What the image model wears goes into its graph through `models.slots`. A text model is copied without its weights, which
both share, and the copy has the LoRAs' branches beside its layers: streams with other LoRAs go on with theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from accel.errors import UserError
from models.kept import Kept
from models.lora import Update, fitted, read_lora, weight_of
from models.slots import Changes, Slots, beside
from models.worn import LoraSet, Stamp, rank_of

V = TypeVar("V")
Fitted = Mapping[str, Mapping[str, Update]]  # what a file does to each network's layers

FILES_MB, SETS_MB = 2048, 1024  # kept of what was read, and of what was made of it
READERS = 8  # kept, each with its embeddings


def merge_lora(network: nn.Module, lora: Mapping[str, Tensor], scale: float = 1.0, part: str = "unet") -> int:
    """Add a LoRA to a network's weights in place, the number of layers changed; minus the scale takes it out again.

    The network may be a UNet, a text model, or a `MotionAdapter` (for motion LoRAs). UserError changes nothing.
    """
    updates = fitted(network, lora, part)
    for path, update in updates.items() if scale else ():
        weight = weight_of(network, path).data
        found = weight.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        update.add_to(found, scale)
        weight.copy_(found)  # rounded once
    return len(updates)


def dressed(model: nn.Module, changes: Changes) -> nn.Module:
    """A copy of a network that shares its weights and has these LoRAs' branches beside its layers."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    found = deepcopy(model, shared)
    for path, updates in changes.items():
        for update, scale in updates:
            up, down = update.factors()
            found.get_submodule(path).register_forward_hook(partial(beside, down=down, up=scale * up))
    return found


class Loras(Generic[V]):
    """The LoRAs that a model's streams wear: each file is read and fitted once, and again when it was written over.

    Any thread may ask.

    `slots` is the room in the UNet's graph, None = none; `texts` are the text models by their names in a pipeline, and
    `reader` makes of them, or of their dressed copies, what reads prompts.

    >>> loras = Loras(slots, text.models, text.with_models)
    >>> worn = lora_set("ink.safetensors:0.8")
    >>> loras.tensors(worn), loras.reader(worn).embed("a cat")
    """

    def __init__(
        self,
        slots: Slots | None,
        texts: Mapping[str, nn.Module],
        reader: Callable[[Mapping[str, nn.Module]], V],
    ) -> None:
        self._slots, self._texts, self._read_with = slots, texts, reader
        self._plain = reader(texts)
        self._files: Kept[tuple[Path, Stamp], Fitted] = Kept(FILES_MB, megabytes_of_updates)
        self._tensors: Kept[LoraSet, dict[str, Tensor]] = Kept(SETS_MB, lambda found: megabytes(found.values()))
        self._readers: Kept[LoraSet, V] = Kept(READERS)

    def tensors(self, worn: LoraSet) -> dict[str, Tensor]:
        """What the graph takes for these LoRAs, not to be written to; nothing where it has no room.

        UserError where a file is broken or made for another family, or there is too little room.
        """

        def make() -> dict[str, Tensor]:
            changes = self._changes("unet", worn)
            if self._slots is None:
                if rank := rank_of(worn):
                    raise UserError("there is no room for LoRAs", hint=f"start with style.lora_rank={rank}")
                return {}
            return self._slots.tensors(changes)

        return self._tensors.get(worn, make)

    def reader(self, worn: LoraSet) -> V:
        """What reads prompts under these LoRAs; the plain one where they do not change text models.

        UserError as `tensors`, room apart.
        """

        def make() -> V:
            changes = {part: self._changes(part, worn) for part in self._texts}
            if not any(changes.values()):
                return self._plain
            return self._read_with({part: dressed(model, changes[part]) for part, model in self._texts.items()})

        return self._readers.get(worn, make)

    def _changes(self, part: str, worn: LoraSet) -> Changes:
        """What changes each layer of a network. Files at scale 0 are read as well: a slider will want them."""
        found: dict[str, list[tuple[Update, float]]] = {}
        for path, stamp, scale in worn:
            for layer, update in self._fitted(path, stamp).get(part, {}).items():
                if scale:
                    found.setdefault(layer, []).append((update, scale))
        return found

    def _fitted(self, path: Path, stamp: Stamp) -> Fitted:
        """UserError where a file does not fit, or does nothing here."""

        def read() -> Fitted:
            networks = ({"unet": self._slots.skeleton} if self._slots else {}) | dict(self._texts)
            try:
                lora = read_lora(path)
                found = {part: fitted(network, lora, part) for part, network in networks.items()}
            except UserError as error:
                raise UserError(f"{path.name}: {error.message}", hint=error.hint) from error
            if self._slots and not any(found.values()):
                raise UserError(f"{path.name} changes nothing here", hint=f"it has no layers of: {', '.join(networks)}")
            return found

        return self._files.get((path, stamp), read)


def megabytes(tensors: Iterable[Tensor]) -> float:
    return sum(tensor.nbytes for tensor in tensors) / 1e6


def megabytes_of_updates(found: Fitted) -> float:
    return megabytes(
        tensor
        for updates in found.values()
        for update in updates.values()
        for tensor in (update.up, update.down, update.mid)
        if tensor is not None
    )
