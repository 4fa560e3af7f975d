"""What happens to one frame: pixels → latents → noise → few denoising steps → pixels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.denoise import Conditioning, Prompt, denoise, start
from models.filters import sample
from models.flow import compose
from models.params import Params, Style
from models.prompt import parse
from models.reproject import scaled
from models.schedule import Schedule, consistency_schedule
from models.text import TextEncoder, Transition, unknown_words
from models.text_xl import DoubleTextEncoder
from models.unet import Call, Companion, Seen

if TYPE_CHECKING:
    from accel.engine import Engine, Pending
    from models.parts import Part

PROMPTS = ("prompt", "negative")
SHOT = ("strength", "guidance", "image_guidance", "seed")  # changed, frames before mislead; so do `PROMPTS` at once


class Launched(Protocol):
    """A frame on its way through the device."""

    stages_ms: dict[str, float]  # time per stage of this frame

    def done(self) -> bool: ...
    def wait(self) -> None: ...
    def image(self) -> NDArray[np.uint8]:
        """The stylized picture, (H, W, 3) RGB, the caller's own; waits for it."""
        ...


class Stylizer(Protocol):
    """A loaded model for one picture size. All memory of a stream is in its `State`; weights are shared."""

    size: tuple[int, int]  # (width, height)

    def open(self, params: Params) -> State: ...
    def step(self, state: State, image: NDArray[np.uint8], params: Params) -> Launched: ...
    def prepare(self, params: Params) -> None:
        """Work ahead for these settings, in any thread, so that the frame path need not; UserError for bad ones."""
        ...

    def forget(self, state: State) -> None:
        """Take the next frame as the first of a shot; the stream's settings and noise stay."""
        ...

    def moved(self, state: State, flow: Tensor) -> None:
        """The next frame's scene has moved since the last one stepped: backward flow (1, 2, h, w) of any size."""
        ...

    def advice(self, params: Params) -> str:
        """One line on what the model will not understand of these settings, or ""."""
        ...


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
    generator: torch.Generator = field(default_factory=torch.Generator)
    noises: tuple[Tensor, ...] = ()  # the start's and those between steps
    travel: Tensor | None = None  # latent pixels back to where the shot's noise lies, (1, 2, H/8, W/8)
    moved: Tensor | None = None  # the same back to the last frame
    latents: Tensor | None = None  # what became of the last frame, (1, C, H/8, W/8)
    transition: Transition | None = None  # of the prompts, from a live change on until it is complete
    since: int = 0  # frames of it
    companions: tuple[Companion, ...] = ()  # of the model's parts, from the first frame on
    rows: int = 0  # of their memory: a row per call of the UNet


class Stages:
    """Adds up the time of named stages of one frame, ms."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.ms[name] = self.ms.get(name, 0.0) + (time.perf_counter() - started) * 1e3


class Decoding:
    """A `Launched` whose last network is still running. Its stream's next step must come after `wait`."""

    def __init__(self, pending: Pending, stages: Stages) -> None:
        self.stages_ms = stages.ms
        self._pending = pending
        self._stages = stages
        self._pixels: NDArray[np.uint8] | None = None

    def done(self) -> bool:
        return self._pixels is not None or self._pending.done()

    def wait(self) -> None:
        if self._pixels is None:
            with self._stages("decode"):
                (picture,) = self._pending.wait()
            with self._stages("pixels"):  # out of the engine's memory, and off the device
                self._pixels = picture[0].cpu().numpy().copy()

    def image(self) -> NDArray[np.uint8]:
        self.wait()
        assert self._pixels is not None
        return self._pixels


@dataclass(frozen=True, slots=True)
class Networks:
    """The compiled networks of one model at one size, and the numbers that go with them."""

    encode: Engine
    unet: Engine
    decode: Engine
    text: TextEncoder | DoubleTextEncoder
    tables: Any  # an `LCMScheduler`
    scaling: float = 1.0  # latents = scaling · (encoder output - shift)
    shift: float = 0.0
    guidance_width: int = 0  # of the UNet's guidance embedding, 0 = it has none
    style_words: frozenset[str] = frozenset()  # what a small vocabulary knows; empty = anything goes
    parts: tuple[Part, ...] = ()  # what the UNet is widened by
    time_ids: Tensor | None = None  # (1, 6), where the UNet takes them beside pooled words, as SDXL's does

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.encode.spec.outputs[0].shape

    @property
    def concatenates(self) -> bool:
        """Whether the UNet takes the source latent beside the noisy one (InstructPix2Pix's form)."""
        return self.unet.spec.inputs[0].shape[1] == 2 * self.latent_shape[1]


class LatentStylizer:
    """A Stable-Diffusion-family model as a `Stylizer`.

    Equal to diffusers' image-to-image and InstructPix2Pix pipelines on the same folder, steps and seed; see
    tests/test_parity.py. Not thread-safe: the worker thread owns it.

    >>> stylizer = load("mini", (512, 288))
    >>> state = stylizer.open(params)
    >>> picture = stylizer.step(state, image, params).image()
    """

    def __init__(self, networks: Networks, info: dict[str, object] | None = None) -> None:
        self.networks = networks
        self.info = info or {}
        _, _, rows, columns = networks.latent_shape
        self.size = (8 * columns, 8 * rows)
        self._threads = torch.get_num_threads()

    def open(self, params: Params) -> State:
        """Fresh memory for one stream, with its prompt already encoded."""
        self.prepare(params)
        state = State(self._prepare(params.style, None))
        self._draw(state, renew=True)
        return state

    def step(self, state: State, image: NDArray[np.uint8], params: Params) -> Launched:
        """Stylize one (H, W, 3) picture of this model's size, the last network still running on return.

        Raises ValueError for another size.
        """
        if image.shape != (self.size[1], self.size[0], 3):
            raise ValueError(f"picture of shape {image.shape}, model of size {self.size}")
        stages = Stages()
        if torch.get_num_threads() != self._threads:  # a thread begun while the frame lane had one only
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            latents = self._latents(state, torch.from_numpy(image)[None], params, stages)
            with stages("decode"):
                pending = self.networks.decode.launch(latents)
        return Decoding(pending, stages)

    def stylize(self, state: State, picture: Tensor, params: Params) -> Tensor:
        """The same from tensor to tensor, whichever kind of picture the networks take; see `networks.Encode`."""
        return self.networks.decode(self._latents(state, picture, params, Stages()))[0]

    def _latents(self, state: State, picture: Tensor, params: Params, stages: Stages) -> Tensor:
        """Everything before the decoder: a picture → the latents of its painting, (1, C, H/8, W/8)."""
        net = self.networks
        with stages("schedule"):
            prepared = self._follow(state, params.style)
        with stages("encode"):
            (raw,) = net.encode(picture)
        with stages("schedule"):
            style, schedule = prepared.style, prepared.schedule
            distilled = net.guidance_width > 0  # with its guidance as an input: one pass serves
            cond = Conditioning(
                words=(prepared.words, *prepared.pooled),
                negative=(prepared.negative, *prepared.pooled_negative),
                source=raw if net.concatenates else None,
                guidance=1.0 if distilled else style.guidance,
                image_guidance=style.image_guidance,
            )
            pure = net.concatenates and style.strength >= 1
            source = net.scaling * (raw - net.shift)
            if params.temporal.feedback:
                source = fed_back(source, state.latents, state.moved, params.temporal.feedback)
            noises = state.noises
            if style.seed_mode == "flow":
                noises = tuple(drifted(noise, state.travel) for noise in noises)
            z = start(source, noises[0], schedule.steps[0], pure=pure)
            embedded = guidance_embedding(style.guidance - 1, net.guidance_width) if distilled else None
            self._remember(state, len(schedule.steps) * cond.passes)
            calls = count()
            seen = self._seen(picture, params)

        def network(z: Tensor, t: float, prompt: Prompt) -> Tensor:
            row = next(calls)
            words, *pooled = prompt
            call = Call(z.contiguous(), torch.tensor([t]), words, range(row, row + 1), (0,), 1, (seen,))
            with stages("unet"):
                return self._unet(state, call, guidance=embedded, pooled=pooled[0] if pooled else None)

        unet_before = stages.ms.get("unet", 0.0)
        with stages("schedule"):
            z = denoise(network, z, schedule, cond, noises[1:])
            state.latents, state.moved = z, None
            latents = z / net.scaling + net.shift
        stages.ms["schedule"] -= stages.ms["unet"] - unet_before  # timed around the network's own time
        return latents

    def forget(self, state: State) -> None:
        """Start the stream's window of frames anew, and leave noise and results where they were."""
        for companion in state.companions:
            companion.reset()
        state.travel = state.moved = state.latents = None

    def prepare(self, params: Params) -> None:
        """Read the prompts, and let the parts work ahead; then the frame path finds all of it done. Any thread."""
        self._read(params.style)
        for part in self.networks.parts:
            part.ready(params)

    def moved(self, state: State, flow: Tensor) -> None:
        """The next frame's scene has moved since the last one stepped: backward flow (1, 2, h, w) of any size."""
        rows, columns = self.networks.latent_shape[2:]
        state.moved = scaled(flow, (columns, rows))
        state.travel = state.moved if state.travel is None else compose(state.moved, state.travel)

    def advice(self, params: Params) -> str:
        """One line on words the model does not know or cannot reach, or ""."""
        prompt = params.style.prompt
        if self.networks.style_words:
            strange = unknown_words(prompt, set(self.networks.style_words))
            if strange and len(strange) == len(unknown_words(prompt, set())):
                listed = "`livestyle models` lists its styles"
                return f"this model knows no word of the prompt ({', '.join(strange)}); {listed}"
            if strange:
                return f"words this model does not know: {', '.join(strange)}"
        if self.networks.text.is_cut(prompt):
            return "the prompt is longer than this model reads; its end is ignored"
        if note := parse(prompt).note:
            return note
        if params.temporal.feedback and self.networks.concatenates and params.style.strength >= 1:
            return "temporal.feedback does nothing at strength 1: frames start from noise alone"
        return ""

    def _follow(self, state: State, style: Style) -> Prepared:
        """Bring a stream's memory up to its settings; only what changed is worked out again."""
        before = state.prepared.style
        if before is not style:
            prepared, told = self._prepare(style, state.prepared), changed(before, style, PROMPTS)
            if told:
                last = state.transition.at(state.since) if state.transition else state.prepared.embeddings
                state.transition, state.since = Transition(last, prepared.embeddings, style.blend_frames), 0
            state.prepared = prepared
            if changed(before, style, SHOT) or (told and not style.blend_frames):
                self.forget(state)
        renew = (before.seed, before.seed_mode, before.steps) != (style.seed, style.seed_mode, style.steps)
        self._draw(state, renew)
        if state.transition is None:
            return state.prepared
        state.since += 1
        shown = state.prepared.with_embeddings(state.transition.at(state.since))
        if state.since >= state.transition.frames:
            state.transition = None
        return shown

    def _remember(self, state: State, rows: int) -> None:
        """See to it that the stream has memory for so many calls of the UNet per frame."""
        if state.rows != rows:
            state.companions, state.rows = tuple(part.companion(rows) for part in self.networks.parts), rows

    def _seen(self, picture: Tensor, params: Params) -> Seen:
        """What the parts make of one frame."""
        if not self.networks.parts:
            return Seen(None, {})
        image = pixels(picture)
        guides: dict[str, Any] = {}
        for part in self.networks.parts:
            guides |= part.guide(image, params)
        return Seen(image, guides)

    def _unet(self, state: State, call: Call, **base: Tensor | None) -> Tensor:
        """One call of the UNet with what the stream's companions give and keep, (n, C, h, w)."""
        engine = self.networks.unet
        given: dict[str, Any] = {"z": call.z, "t": call.t, "words": call.words, "time_ids": self.networks.time_ids}
        given |= base
        for companion in state.companions:
            given |= companion.inputs(call)
        output, *rest = engine(*(given[spec.name] for spec in engine.spec.inputs))
        found = dict(zip((spec.name for spec in engine.spec.outputs[1:]), rest, strict=True))
        for companion in state.companions:
            companion.keep(call, found)
        newest = output.view(len(call.rows), -1, *output.shape[1:])[:, -1]  # of a row's block of frames
        return newest.clone()

    def _prepare(self, style: Style, before: Prepared | None) -> Prepared:
        if before and (before.style.steps, before.style.strength) == (style.steps, style.strength):
            schedule = before.schedule
        else:
            schedule = consistency_schedule(self.networks.tables, style.steps, style.strength)
        return Prepared(style, schedule, *self._read(style))

    def _read(self, style: Style) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Words and negative words, and the pooled ones of both; known prompts cost nothing."""
        text = self.networks.text
        if isinstance(text, DoubleTextEncoder):
            wanted, unwanted = text.read(style.prompt), text.read_negative(style.negative)
            return wanted.words, unwanted.words, (wanted.pooled,), (unwanted.pooled,)
        return text.embed(style.prompt), text.embed(style.negative), (), ()

    def _draw(self, state: State, renew: bool) -> None:
        """Noise for the next frame: the same one, the seed's first (`renew`), or the generator's next."""
        style = state.prepared.style
        if renew:
            state.generator.manual_seed(style.seed)
        if renew or style.seed_mode == "per-frame":
            shape = self.networks.latent_shape
            state.noises = tuple(torch.randn(shape, generator=state.generator) for _ in range(style.steps))


def changed(before: Style, after: Style, names: tuple[str, ...]) -> bool:
    """Whether any of these settings differs."""
    return any(getattr(before, name) != getattr(after, name) for name in names)


def pixels(picture: Tensor) -> NDArray[np.uint8]:
    """(H, W, 3) of a picture of either kind that `networks.Encode` takes."""
    if picture.dtype != torch.uint8:
        picture = (picture * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return picture[0].cpu().numpy()


def drifted(noise: Tensor, travel: Tensor | None) -> Tensor:
    """Noise (1, C, h, w) that has gone with the scene: taken whole from where each place was when the shot began.

    Values are moved, never mixed, so they stay Gaussian; what comes into view wears noise from the other edge.
    """
    if travel is None:
        return noise
    height, width = noise.shape[2:]
    x = (torch.arange(width) + travel[0, 0]).round().long() % width
    y = (torch.arange(height)[:, None] + travel[0, 1]).round().long() % height
    return noise[:, :, y, x]


def fed_back(source: Tensor, before: Tensor | None, moved: Tensor | None, share: float) -> Tensor:
    """The source latent with a share of the last result's, carried along the motion, (1, C, h, w)."""
    if before is None or before.shape != source.shape:
        return source
    if moved is not None:
        before = sample(before, moved)
    return torch.lerp(source, before, share)


def guidance_embedding(scale: float, width: int) -> Tensor:
    """The sinusoidal embedding of a guidance scale, (1, width); Meng et al. 2023, as diffusers computes it."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -(np.log(10_000.0) / (half - 1)))
    angles = 1000.0 * scale * frequencies
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2))[None]
