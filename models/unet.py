"""The UNet as a graph with named tensors, and the features that widen it: one file each, in any combination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from accel.engine import TensorSpec

BASE = ("guidance", "pooled", "time_ids")  # what some UNets take behind z, t and words


class Feature(Protocol):
    """What a UNet's graph takes and gives besides. Made anew for each graph that is built."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def fingerprint(self) -> str:
        """Its weights and options, for the engine's key."""
        ...

    def install(self, unet: Any) -> nn.Module | None:
        """Change the UNet for good before it is compiled; what brings weights of its own is returned as a module.

        Raises UserError where it does not fit this UNet.
        """
        ...

    def during(
        self, unet: Any, given: Mapping[str, Tensor], found: dict[str, Tensor]
    ) -> AbstractContextManager[Mapping[str, Any]]:
        """Around one forward pass: yields keyword arguments for the UNet's forward; `found` gets its outputs by name.

        `given` has every input of the graph by name, z, t and words among them. Where two features want one argument,
        dictionaries are merged.
        """
        ...


class Denoise(nn.Module):
    """The UNet: tensors in the order of `names` → output like z, then the features' outputs in their order.

    z (n, C, h, w), or n blocks of frames in a window, t (n,) and words (n, L, D) come first; then, where the UNet's
    configuration has them, guidance embedding (n, E), pooled words (n, P) and time ids (n, 6); then the inputs of each
    feature.
    """

    def __init__(self, unet: Any, names: Sequence[str], features: Sequence[Feature] = ()) -> None:
        super().__init__()
        self.unet = unet
        self.names, self.features = tuple(names), tuple(features)
        self.brought = nn.ModuleList([module for feature in features if (module := feature.install(unet)) is not None])

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        if (frames := given["z"].shape[0] // given["t"].shape[0]) > 1:  # a row is a block of frames
            given |= {name: given[name].repeat_interleave(frames, 0) for name in ("t", "words", *BASE) if name in given}
        added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]} if "pooled" in given else None
        arguments: dict[str, Any] = {"timestep_cond": given.get("guidance"), "added_cond_kwargs": added}
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for feature in self.features:
                for name, value in stack.enter_context(feature.during(self.unet, given, found)).items():
                    before = arguments.get(name)
                    arguments[name] = {**before, **value} if isinstance(before, dict) else value
            z, t, words = given["z"], given["t"], given["words"]
            output: Tensor = self.unet(z, t, words, return_dict=False, **arguments)[0]
        return output, *(found[spec.name] for feature in self.features for spec in feature.outputs)


@dataclass(frozen=True, slots=True)
class Seen:
    """One frame as its calls of the network see it."""

    image: Any  # (H, W, 3) uint8 picture from the source
    guides: Mapping[str, Any]  # made of it and of the settings once per frame, by the features' own names


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the UNet: n latents, a row each."""

    z: Tensor  # (n, C, h, w), what is concatenated included
    t: Tensor  # (n,)
    words: Tensor  # (n, L, D)
    rows: range  # whose memory each latent belongs to: denoising step by guidance pass
    steps: tuple[int, ...]  # which denoising step each is at, 0 = the noisiest
    of: int  # denoising steps per frame
    frames: tuple[Seen, ...]  # whose frame each is
    live: tuple[bool, ...] = ()  # which rows are asked for, () = all; others must leave memory alone
    pooled: Tensor | None = None  # (n, P) words, where the UNet takes them
    masked: tuple[bool, ...] = ()  # which rows keep in self-attention only what stands out; () = none


class Companion(Protocol):
    """A stream's side of a feature: what it gives to each call, and what it keeps of it. Its memory is the stream's."""

    def inputs(self, call: Call) -> Mapping[str, Tensor]:
        """Tensors by the names of the feature's inputs, all of them."""
        ...

    def keep(self, call: Call, found: Mapping[str, Tensor]) -> None:
        """The feature's outputs of that call, valid until the engine's next one."""
        ...

    def reset(self, row: int | None = None) -> None:
        """Another scene begins, for all rows or for one."""
        ...
