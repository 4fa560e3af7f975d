"""What a loaded model is, what one stream of it remembers, and what a set of its settings comes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.transfer import Download
from models.batch import StreamBatch
from models.calls import Calls
from models.params import Style
from models.safety import Censor, SafetyChecker
from models.schedule import Sampler, Schedule
from models.text import TextEncoder, Transition
from models.text_xl import DoubleTextEncoder

if TYPE_CHECKING:
    from accel.engine import Engine
    from models.loras import Loras
    from models.parts import Part

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What one set of style settings comes to."""

    style: Style
    schedule: Schedule
    words: Tensor  # (1, L, D)
    negative: Tensor  # (1, L, D)
    pooled: tuple[Tensor, ...] = ()  # (1, P) of both prompts, where the UNet takes it
    pooled_negative: tuple[Tensor, ...] = ()

    @property
    def embeddings(self) -> tuple[Tensor, ...]:
        """All that the prompts come to."""
        return (self.words, self.negative, *self.pooled, *self.pooled_negative)

    def with_embeddings(self, found: tuple[Tensor, ...]) -> Prepared:
        """The same with others in the order of `embeddings`."""
        words, negative, *pooled = found
        half = len(self.pooled)
        both = tuple(pooled[:half]), tuple(pooled[half:])
        return replace(self, words=words, negative=negative, pooled=both[0], pooled_negative=both[1])


@dataclass(slots=True)
class State:
    """What one stream remembers from frame to frame."""

    prepared: Prepared
    calls: Calls  # of the UNet, with the memory of what widens it
    batch: StreamBatch | None = None
    censor: Censor | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    noises: tuple[Tensor, ...] = ()  # the start's and those between steps
    travel: Tensor | None = None  # latent pixels back to where the shot's noise lies, (1, 2, H/8, W/8)
    moved: Tensor | None = None  # the same back to the last frame
    latents: Tensor | None = None  # what became of the last frame, (1, C, H/8, W/8)
    estimates: tuple[Tensor, ...] = ()  # of x0 at each of its steps
    fresh: bool = True  # the next frame is the first of a shot
    transition: Transition | None = None  # of the prompts, from a live change on until it is complete
    since: int = 0  # frames of it
    placed: tuple[Prepared, Prepared] | None = None  # what was prepared, and the same on the engines' device
    download: Download = field(default_factory=Download)

    def forget(self) -> None:
        """Start the memory of frames anew, and leave noise and results where they were."""
        if self.batch is None:  # else each row forgets when the new shot's first frame gets there
            self.calls.reset()
        self.travel = self.moved = self.latents = None
        self.estimates, self.fresh = (), True
        if self.censor:
            self.censor.reset()


@dataclass(frozen=True, slots=True)
class Networks:
    """The compiled networks of one model at one size, and the numbers that go with them."""

    encode: Engine
    unet: Engine
    decode: Engine
    text: TextEncoder | DoubleTextEncoder
    loras: Loras[Any]
    tables: Any  # an `LCMScheduler`
    scaling: float = 1.0  # latents = scaling · (encoder output - shift)
    shift: float = 0.0
    guidance_width: int = 0  # of the UNet's guidance embedding, 0 = it has none
    style_words: frozenset[str] = frozenset()  # what a small vocabulary knows; empty = anything goes
    parts: tuple[Part, ...] = ()  # what the UNet is widened by
    checker: SafetyChecker | None = None
    rows: int = 1  # denoising steps in flight: more than 1 is a stream batch
    timesteps: tuple[int, ...] | None = None  # of the model's own, noisiest first
    sampler: Sampler = "lcm"
    time_ids: Tensor | None = None  # (1, 6), where the UNet takes them beside pooled words, as SDXL's does
    device: torch.device = CPU  # where the engines' tensors live
    wider: Callable[[int], Mapping[str, Engine]] | None = None  # compiles the three for so many streams at once

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.encode.spec.outputs[0].shape

    @property
    def latents(self) -> int:
        """How many one call of the UNet takes of one stream."""
        return self.unet.spec.inputs[1].shape[0]

    @property
    def concatenates(self) -> bool:
        """Whether the UNet takes the source latent beside the noisy one (InstructPix2Pix's form)."""
        return self.unet.spec.inputs[0].shape[1] == 2 * self.latent_shape[1]
