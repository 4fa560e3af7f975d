"""LoRAs in networks: merged into weights for good, or worn by a stream without anything being changed.

What the image model wears goes into its graph through `models.slots`. A text model is copied without its weights, which
both share, and the copy has the LoRAs' branches beside its layers: streams with other LoRAs go on with theirs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from copy import deepcopy
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from accel.errors import UserError
from models.lora import Update, fitted, read_lora, weight_of
from models.slots import Changes, Slots, beside
from models.worn import LoraSet, rank_of

K = TypeVar("K", bound=Hashable)
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


class Kept(Generic[K, V]):
    """What was made lately, by key, up to a size; the newest always. Any thread may ask.

    What is there is given at once, also while something else is being made, which happens one at a time.
    """

    def __init__(self, most: float, size: Callable[[V], float]) -> None:
        self._most, self._size = most, size
        self._known: OrderedDict[K, V] = OrderedDict()
        self._looking, self._making = Lock(), Lock()

    def get(self, key: K, make: Callable[[], V]) -> V:
        if (found := self._find(key)) is not None:
            return found
        with self._making:
            if (found := self._find(key)) is not None:
                return found
            made = make()
            with self._looking:
                self._known[key] = made
                total = sum(map(self._size, self._known.values()))
                while total > self._most and len(self._known) > 1:
                    total -= self._size(self._known.popitem(last=False)[1])
            return made

    def _find(self, key: K) -> V | None:
        with self._looking:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)


class Loras(Generic[V]):
    """The LoRAs that a model's streams wear: each file is read and fitted once. Any thread may ask.

    `slots` is the room in the UNet's graph, None = none; `texts` are the text models by their names in a pipeline, and
    `reader` makes of them, or of their dressed copies, what reads prompts; `device` is where the graph's engine takes
    its inputs from.

    >>> loras = Loras(slots, folder.text_models(), folder.reader)
    >>> worn = lora_set("ink.safetensors:0.8")
    >>> loras.tensors(worn), loras.reader(worn).embed("a cat")
    """

    def __init__(
        self,
        slots: Slots | None,
        texts: Mapping[str, nn.Module],
        reader: Callable[[Mapping[str, nn.Module]], V],
        device: str = "cpu",
    ) -> None:
        self._slots, self._texts, self._read_with, self._device = slots, texts, reader, device
        self._plain = reader(texts)
        self._files: Kept[Path, Fitted] = Kept(FILES_MB, megabytes_of_updates)
        self._tensors: Kept[LoraSet, dict[str, Tensor]] = Kept(SETS_MB, lambda found: megabytes(found.values()))
        self._readers: Kept[LoraSet, V] = Kept(READERS, lambda reader: 1)

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
            return {name: tensor.to(self._device) for name, tensor in self._slots.tensors(changes).items()}

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
        for path, scale in worn:
            for layer, update in self._fitted(path).get(part, {}).items():
                if scale:
                    found.setdefault(layer, []).append((update, scale))
        return found

    def _fitted(self, path: Path) -> Fitted:
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

        return self._files.get(path, read)


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
