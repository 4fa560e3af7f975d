"""LoRAs in a network's weights: merged once, or worn and changed between two frames."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from accel.errors import UserError
from models.lora import Update, fitted, weight_of

T = TypeVar("T")
LoraSet = tuple[tuple[str, float], ...]  # names and scales; they add up


def merge_lora(network: nn.Module, lora: Mapping[str, Tensor], scale: float = 1.0, part: str = "unet") -> int:
    """Add a LoRA to a network's weights in place, the number of layers changed; minus the scale takes it out again.

    The network may be a UNet, a text model, or a `MotionAdapter` (for motion LoRAs). UserError changes nothing.
    """
    updates = fitted(network, lora, part)
    for path, update in updates.items() if scale else ():
        weight = weight_of(network, path).data
        weight.copy_(summed(weight, [(update, scale)]))
    return len(updates)


def summed(weight: Tensor, changes: Sequence[tuple[Update, float]]) -> Tensor:
    """A weight and what each LoRA at its scale adds to it: a new tensor, float32."""
    found = weight.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    for update, scale in changes:
        update.add_to(found, scale)
    return found


def apply_lora(
    unet: nn.Module,
    text_encoder: nn.Module | None,
    lora: Mapping[str, Tensor],
    scale: float = 1.0,
    text_encoder_2: nn.Module | None = None,
) -> int:
    """`merge_lora` over a pipeline's networks; what a LoRA has for one that is not given is left out.

    >>> apply_lora(unet, text_model, read_lora(Path("lcm-lora.safetensors")))
    """
    parts = {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    present = {part: network for part, network in parts.items() if network is not None}
    if not sum(len(fitted(network, lora, part)) for part, network in present.items()):  # all of it, before any merging
        raise UserError("the LoRA changes nothing here", hint=f"it has no layers of: {', '.join(present)}")
    return sum(merge_lora(network, lora, scale, part) for part, network in present.items())


class Adapted:
    """A network that wears LoRAs: the changed layers' own weights are kept, so scale 0 gives back their bits.

    `learn` and `weights` may run in another thread, one at a time; `wear` belongs between two frames. It writes into
    the parameters where they lie, so eager, compiled and captured networks go on as they are. An engine that has
    copied the weights (OpenVINO, TensorRT without refit) does not notice: it must be built anew, see `Swap`.
    """

    def __init__(self, network: nn.Module, part: str = "unet") -> None:
        self.network = network
        self.part = part
        self._known: dict[str, dict[str, Update]] = {}
        self._digests: dict[str, str] = {}
        self._base: dict[str, Tensor] = {}
        self._worn: dict[str, Tensor] = {}

    def learn(self, name: str, lora: Mapping[str, Tensor]) -> int:
        """Fit a LoRA without wearing it, the number of layers it changes; UserError as `fitted`."""
        updates = fitted(self.network, lora, self.part)
        for path in updates:
            if path not in self._base:
                self._base[path] = weight_of(self.network, path).detach().clone()
        self._known[name] = updates
        self._digests[name] = digest(lora)
        return len(updates)

    def weights(self, worn: LoraSet) -> dict[str, Tensor]:
        """Each known layer's weight under these LoRAs; the base itself where none has a say. Changes nothing."""
        if unknown := next((name for name, _ in worn if name not in self._known), None):
            raise UserError(f"no such LoRA: {unknown}", hint=f"known: {', '.join(self._known) or 'none'}")
        found = {}
        for path, base in self._base.items():
            known = ((self._known[name].get(path), scale) for name, scale in worn if scale)
            changes = [(update, scale) for update, scale in known if update]
            found[path] = summed(base, changes).to(base.dtype) if changes else base
        return found

    def wear(self, weights: Mapping[str, Tensor]) -> None:
        """Take what `weights` worked out; layers that stay the same are not touched."""
        wanted = {**self._base, **weights}
        with torch.no_grad():
            for path, tensor in wanted.items():
                if self._worn.get(path) is not tensor:
                    weight_of(self.network, path).copy_(tensor)
        self._worn = wanted

    def fingerprint(self, worn: LoraSet) -> str:
        """What must join the key of a cached engine that is built with these LoRAs; "" for none."""
        return "".join(f"{self._digests[name]}:{scale!r};" for name, scale in sorted(worn) if scale)


def digest(lora: Mapping[str, Tensor]) -> str:
    """A LoRA's content in sixteen hexadecimal digits, whatever its file is called."""
    found = hashlib.sha256()
    for key in sorted(lora):
        found.update(key.encode())
        found.update(lora[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


class Swap(Generic[T]):
    """Something made in a thread of its own and taken between two frames: weights to wear, or a second engine.

    Frames go on with the old one meanwhile (and share the machine with the making). The newest request wins.

    >>> swap.ask(partial(adapted.weights, (("ink", 0.8),)))
    >>> if (weights := swap.take()) is not None: adapted.wear(weights)
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "swap")
        self._asked: Future[T] | None = None

    def ask(self, make: Callable[[], T]) -> None:
        """Begin; what was asked for before and not taken is forgotten."""
        if self._asked:
            self._asked.cancel()
        self._asked = self._pool.submit(make)

    def take(self) -> T | None:
        """What was asked for, once it is there, and then None again; never waits. Raises what making it raised."""
        if self._asked is None or not self._asked.done():
            return None
        asked, self._asked = self._asked, None
        return asked.result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
