"""What happens to one frame: pixels → latents → noise → few denoising steps → pixels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accel.transfer import Download, device_errors, enqueued
from models.batch import StreamBatch
from models.calls import Calls
from models.denoise import Conditioning, Pass, Trajectory, start, through, timesteps
from models.filters import sample
from models.flow import compose
from models.frame_graph import frame_graph
from models.launched import Decoding, Failed, Filling, Launched, Stages
from models.noise import drifted, fed_back
from models.params import Params, Style
from models.prompt import parse
from models.reproject import scaled
from models.safety import Censor, SafetyChecker
from models.schedule import Sampler, Schedule, consistency_schedule, entered
from models.text import TextEncoder, Transition, unknown_words
from models.text_xl import DoubleTextEncoder
from models.together import PAYS, Widths, attempt, side_by_side, widths
from models.unet import Seen
from models.units import advice
from models.worn import last_set, lora_set

if TYPE_CHECKING:
    from accel.engine import Engine, Pending
    from models.adapters import Loras
    from models.parts import Part

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
PROMPTS = ("prompt", "negative", "lora")
SHOT = ("strength", "steps", "guidance", "image_guidance", "mask_guidance", "guidance_mode", "delta", "seed")
# changed, frames before mislead; so do `PROMPTS` at once

Framed = tuple["State", NDArray[np.uint8], Params]  # a stream's memory, its picture (H, W, 3), its settings


class Stylizer(Protocol):
    """A loaded model for one picture size. All memory of a stream is in its `State`; weights are shared."""

    size: tuple[int, int]  # (width, height)

    @property
    def device(self) -> str:
        """Where its tensors are, as PyTorch names it."""
        ...

    @property
    def delay(self) -> int:
        """Frames by which a step's picture is that of an earlier one, in a stream batch."""
        ...

    @property
    def width(self) -> int:
        """Frames of as many streams that one launch takes; 1 until `widen`."""
        ...

    def open(self, params: Params) -> State: ...
    def step(self, state: State, image: NDArray[np.uint8], params: Params) -> Launched: ...
    def step_together(self, frames: Sequence[Framed]) -> list[Launched]:
        """Frames of several streams in one launch: at most `width`, of equal `company`."""
        ...

    def company(self, params: Params) -> Hashable:
        """What frames must have in common to share a launch."""
        ...

    def widen(self, count: int | None = None) -> None:
        """Get ready for launches of so many streams' frames, None: of as many as pay on its device; in any thread."""
        ...

    def drain(self, state: State) -> list[NDArray[np.uint8]]:
        """The pictures of the frames that are still in a stream batch, oldest first; it is empty then."""
        ...

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


@dataclass(frozen=True, slots=True)
class Ride:
    """A stream's frame in a launch that others may share."""

    state: State
    picture: Tensor  # of either kind that `networks.Encode` takes
    params: Params
    prepared: Prepared


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
        self._frames = frame_graph((networks.encode, networks.unet, networks.decode))
        self._widths = {name: Widths((getattr(networks, name),)) for name in ("encode", "unet", "decode")}

    @property
    def device(self) -> str:
        """Where its tensors are, as PyTorch names it."""
        return str(self.networks.device)

    @property
    def delay(self) -> int:
        """Frames by which a step's picture is that of an earlier one."""
        return self.networks.rows - 1

    @property
    def width(self) -> int:
        """Frames of as many streams that one launch takes; 1 until `widen`."""
        return self._widths["unet"].most

    def widen(self, count: int | None = None) -> None:
        """Get ready for launches of so many streams' frames, None: of as many as pay on its device; in any thread.

        Engines are compiled or taken from the cache while frames go on. A stream batch fills its launches by itself.
        """
        wider = self.networks.wider
        for width in widths(PAYS.get(self.networks.device.type, 1) if count is None else count):
            if wider is not None and not self.delay and width > self.width:
                engines = wider(width)
                self._widths = {name: Widths((*of.engines, engines[name])) for name, of in self._widths.items()}

    def company(self, params: Params) -> Hashable:
        """What frames must have in common to share a launch: an engine takes it once, whatever its rows are."""
        return params.style.lora, params.temporal.motion_scale

    def open(self, params: Params) -> State:
        """Fresh memory for one stream, with its prompt already encoded."""
        self.prepare(params)
        net = self.networks
        batch = StreamBatch(net.rows, net.latents) if net.rows > 1 else None
        censor = Censor(net.checker) if net.checker else None
        state = State(self._prepare(params.style, None), Calls(net.unet, net.parts, net.time_ids), batch, censor)
        self._draw(state, renew=True)
        return state

    def step(self, state: State, image: NDArray[np.uint8], params: Params) -> Launched:
        """Stylize one (H, W, 3) picture of this model's size, the last network still running on return.

        Raises ValueError for another size.
        """
        (launched,) = self.step_together([(state, image, params)])
        if isinstance(launched, Failed):
            raise launched.error
        return launched

    def step_together(self, frames: Sequence[Framed]) -> list[Launched]:
        """The same for frames of several streams in one launch: at most `width`, of equal `company`.

        What fails of one comes with its `Launched`, and the others have theirs. Stages are those of all together, since
        each waits for all.
        """
        if len(frames) > self.width or len({self.company(params) for _, _, params in frames}) > 1:
            raise ValueError("frames that cannot share a launch")
        stages = Stages()
        if torch.get_num_threads() != self._threads:  # a thread begun while the frame lane had one only
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            begun = [attempt(self._boarded, *frame, stages) for frame in frames]
            launched = iter(self._launch([ride for ride in begun if isinstance(ride, Ride)], stages))
            return [next(launched) if isinstance(ride, Ride) else Failed(ride, stages) for ride in begun]

    def drain(self, state: State) -> list[NDArray[np.uint8]]:
        """The pictures of the frames that are still in a stream batch, oldest first; it is empty then."""
        if state.batch is None:
            return []
        with torch.inference_mode():
            finished = state.batch.drain(state.calls)
            decoded = (self._decode([state], [frame], Stages())[0].image() for frame in finished)
            return [picture for picture in decoded if picture is not None]

    def stylize(self, state: State, picture: Tensor, params: Params) -> Tensor:
        """The same from tensor to tensor, whichever kind of picture the networks take; see `networks.Encode`."""
        stages = Stages()
        (finished,) = self._advance([Ride(state, picture, params, self._begin(state, params, stages))], stages)
        if isinstance(finished, Exception):
            raise finished
        if finished is None:
            raise ValueError("a stream batch gives no picture for its first frames")
        return self.networks.decode(self._unscaled(finished))[0]

    def _boarded(self, state: State, image: NDArray[np.uint8], params: Params, stages: Stages) -> Ride:
        if image.shape != (self.size[1], self.size[0], 3):
            raise ValueError(f"picture of shape {image.shape}, model of size {self.size}")
        if state.censor:
            state.censor.instead = params.style.safety
        return Ride(state, torch.from_numpy(image)[None], params, self._begin(state, params, stages))

    def _begin(self, state: State, params: Params, stages: Stages) -> Prepared:
        """Bring a stream up to the settings of its next frame."""
        state.calls.stages = stages
        with stages("schedule"):
            return self._placed(state, self._follow(state, params.style))

    def _launch(self, rides: Sequence[Ride], stages: Stages) -> list[Launched]:
        """Everything up to the decoder's launch. A launch of several that fails as a whole is made again one by one."""
        try:
            if (whole := self._whole(rides, stages)) is None:
                return self._decode([ride.state for ride in rides], self._advance(rides, stages), stages)
            pairs = zip(rides, whole, strict=True)
            return [Decoding(ride.state.download(own), stages, ride.state.censor) for ride, own in pairs]
        except Exception as error:  # noqa: BLE001 as in `attempt`
            if len(rides) == 1:
                return [Failed(error, stages)]
            log.warning("%d streams in one launch failed, from now on each goes alone: %s", len(rides), error)
            self._widths = {name: Widths(of.engines[:1]) for name, of in self._widths.items()}
            launched: list[Launched] = []
            for ride in rides:
                (alone,) = self._launch([ride], stages)
                failure = attempt(alone.wait)  # before the next one's decoder writes where this one's picture is
                launched.append(alone if failure is None else Failed(failure, stages))
            return launched

    def _whole(self, rides: Sequence[Ride], stages: Stages) -> list[Pending] | None:
        """The frames as one launch; None where they need more than the three networks, or none was recorded yet."""
        net = self.networks
        if self._frames is None or not rides or not all(self._is_bare(ride) for ride in rides):
            return None
        steps = [step for ride in rides for step in ride.prepared.schedule.steps]
        held = [  # as long as the recording
            [self._seen(ride.picture, ride.params) for ride in rides],
            [timesteps((step.t,), net.device) for step in steps],
        ]
        taken = [(ride.picture, *ride.prepared.embeddings, *ride.state.noises) for ride in rides]

        def draw(*given: Tensor) -> tuple[Tensor, ...]:
            rest, alone = iter(given), []
            for ride, mine in zip(rides, taken, strict=True):
                picture, *more = islice(rest, len(mine))
                shown = ride.prepared.with_embeddings(tuple(more[: len(ride.prepared.embeddings)]))
                noises = tuple(more[len(ride.prepared.embeddings) :])
                state = State(shown, Calls(net.unet, (), net.time_ids), noises=noises)
                alone.append(Ride(state, picture, ride.params, shown))
            assert held
            drawn = self._advance(alone, Stages())
            for frame in drawn:
                if isinstance(frame, Exception):
                    raise frame
            pictures = self._widths["decode"]([(self._unscaled(f),) for f in drawn if isinstance(f, Trajectory)])
            return tuple(picture for (picture,) in pictures)

        numbers = [name for name in SHOT if name not in ("steps", "seed")]
        key = tuple((r.prepared.schedule, *(getattr(r.params.style, name) for name in numbers)) for r in rides)
        inputs = [tensor for mine in taken for tensor in mine]
        with stages("schedule"):
            replay = self._frames.of(key, draw, inputs)
        if replay is None:
            return None
        with stages("unet"), device_errors():
            pictures = replay(*inputs)
            launched: list[Pending] = [enqueued((picture,), net.device) for picture in pictures]
        for ride in rides:
            state = ride.state
            state.moved, state.latents, state.estimates, state.fresh = None, None, (), False
        return launched

    def _is_bare(self, ride: Ride) -> bool:
        """Whether a frame needs the three networks and nothing that its stream remembers."""
        temporal = ride.params.temporal
        remembers = temporal.feedback or temporal.smoothing or ride.params.style.seed_mode == "flow"
        return not (self.networks.parts or remembers or ride.state.batch)

    def _advance(self, rides: Sequence[Ride], stages: Stages) -> list[Trajectory | Exception | None]:
        """Everything before the decoder: of each stream a frame in, and the one that is through with its steps out."""
        if not rides:
            return []
        with stages("encode"):
            raws = [raw for (raw,) in self._widths["encode"]([(ride.picture,) for ride in rides])]
        unet_before = stages.ms.get("unet", 0.0)
        found: list[Trajectory | Exception | None]
        with stages("schedule"):
            frames = [attempt(self._entered, *pair) for pair in zip(rides, raws, strict=True)]
            going = [(r.state, f) for r, f in zip(rides, frames, strict=True) if isinstance(f, Trajectory)]
            if (batch := rides[0].state.batch) is None:
                asking = [(state.calls, through(frame, state.estimates)) for state, frame in going]
                finished = iter(side_by_side(self._widths["unet"], asking, stages))
                found = [next(finished) if isinstance(frame, Trajectory) else frame for frame in frames]
            else:  # which shares no launch with others
                found = [attempt(batch.push, state.calls, frame) for state, frame in going] or [*frames]
            for ride, frame in zip(rides, found, strict=True):
                ride.state.moved = None
                if isinstance(frame, Trajectory) and batch is None:
                    ride.state.estimates, ride.state.latents = frame.estimates, frame.z
        # timed around the network's own time
        stages.ms["schedule"] -= stages.ms.get("unet", 0.0) - unet_before
        return found

    def _entered(self, ride: Ride, raw: Tensor) -> Trajectory:
        """A frame before its first step, its stream's memory ready for it."""
        state, net = ride.state, self.networks
        if state.batch is not None and net.concatenates:
            raw = raw.clone()  # needed until the frame is through, and the engine's own only until its next call
        frame = self._entering(state, raw, ride.prepared, ride.params)
        frame = replace(frame, seen=self._seen(ride.picture, ride.params))
        state.fresh = False
        steps = len(frame.schedule.steps)
        whole = -(-len(Pass) * net.rows // net.latents) * net.latents  # every call of a stream batch finds its rows
        state.calls.remember(frame.cond.rows(steps) if state.batch is None else whole)
        return frame

    def _entering(self, state: State, raw: Tensor, prepared: Prepared, params: Params) -> Trajectory:
        """A frame before its first step, from the encoder's output (1, C, H/8, W/8)."""
        net, style, schedule = self.networks, prepared.style, prepared.schedule
        cond = Conditioning(
            words=(prepared.words, *prepared.pooled),
            negative=(prepared.negative, *prepared.pooled_negative),
            source=raw if net.concatenates else None,
            guidance=1.0 if net.guidance_width else style.guidance,  # distilled with it as an input: one pass serves
            image_guidance=style.image_guidance,
            mode=style.guidance_mode,
            delta=style.delta,
            mask_guidance=style.mask_guidance,
        )
        source = net.scaling * (raw - net.shift)
        if params.temporal.feedback:
            source = fed_back(source, state.latents, state.moved, params.temporal.feedback)
        noises = state.noises
        if style.seed_mode == "flow":
            noises = tuple(drifted(noise, state.travel) for noise in noises)
        moved = state.moved
        return Trajectory(
            z=start(source, noises[0], schedule.steps[0], pure=net.concatenates and style.strength >= 1),
            schedule=schedule,
            cond=cond,
            noises=noises[1:],
            anchor=source,
            smoothing=params.temporal.smoothing,
            carry=None if moved is None else lambda latent: sample(latent, moved),
            fresh=state.fresh,
        )

    def _decode(
        self, states: Sequence[State], frames: Sequence[Trajectory | Exception | None], stages: Stages
    ) -> list[Launched]:
        """Each stream's picture on its way, where its frame came through."""
        with stages("decode"):
            latents = [(self._unscaled(frame),) for frame in frames if isinstance(frame, Trajectory)]
            pending = iter(self._widths["decode"].launch(latents) if latents else ())
            launched: list[Launched] = []
            for state, frame in zip(states, frames, strict=True):
                if isinstance(frame, Exception):
                    launched.append(Failed(frame, stages))
                elif frame is None:
                    launched.append(Filling(stages))
                else:
                    launched.append(Decoding(state.download(next(pending)), stages, state.censor))
            return launched

    def _unscaled(self, frame: Trajectory) -> Tensor:
        return frame.z / self.networks.scaling + self.networks.shift

    def forget(self, state: State) -> None:
        """Start the stream's memory of frames anew, and leave noise and results where they were."""
        if state.batch is None:  # else each row forgets when the new shot's first frame gets there
            state.calls.reset()
        state.travel = state.moved = state.latents = None
        state.estimates, state.fresh = (), True
        if state.censor:
            state.censor.reset()

    def prepare(self, params: Params) -> None:
        """Read the prompts, and let the parts work ahead; then the frame path finds all of it done. Any thread."""
        style = params.style
        if self.networks.timesteps:
            entered(self.networks.timesteps, style.steps, style.strength)
        self.networks.loras.tensors(lora_set(style.lora))
        self._read(style)
        for part in self.networks.parts:
            part.ready(params)

    def moved(self, state: State, flow: Tensor) -> None:
        """The next frame's scene has moved since the last one stepped: backward flow (1, 2, h, w) of any size."""
        rows, columns = self.networks.latent_shape[2:]
        state.moved = scaled(flow, (columns, rows)).to(self.networks.device, non_blocking=True)
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
        if note := advice(params.style.control, params.style.steps):
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

    def _placed(self, state: State, prepared: Prepared) -> Prepared:
        """The same with its embeddings where the engines want them; once per change."""
        if self.networks.device == CPU:
            return prepared
        if state.placed is None or state.placed[0] is not prepared:
            moved = tuple(tensor.to(self.networks.device, non_blocking=True) for tensor in prepared.embeddings)
            state.placed = prepared, prepared.with_embeddings(moved)
        return state.placed[1]

    def _seen(self, picture: Tensor, params: Params) -> Seen:
        """What the UNet's calls want to know of one frame."""
        net, guides = self.networks, dict[str, Any]()
        if net.guidance_width:
            guides["guidance"] = guidance_embedding(params.style.guidance - 1, net.guidance_width, net.device)
        if not net.parts:
            return Seen(None, guides)
        image = pixels(picture)
        for part in net.parts:
            guides |= part.guide(image, params)
        return Seen(image, guides)

    def _prepare(self, style: Style, before: Prepared | None) -> Prepared:
        if before and (before.style.steps, before.style.strength) == (style.steps, style.strength):
            schedule = before.schedule
        else:
            net = self.networks
            schedule = consistency_schedule(net.tables, style.steps, style.strength, net.timesteps, net.sampler)
        return Prepared(style, schedule, *self._read(style))

    def _read(self, style: Style) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Words and negative words, and the pooled ones of both; known prompts cost nothing."""
        text = self.networks.text
        if style.lora:
            text = self.networks.loras.reader(last_set(style.lora))
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
            shape, device = self.networks.latent_shape, self.networks.device
            drawn = [torch.randn(shape, generator=state.generator) for _ in range(style.steps)]  # alike on every device
            state.noises = tuple(noise.to(device, non_blocking=True) for noise in drawn)


def changed(before: Style, after: Style, names: tuple[str, ...]) -> bool:
    """Whether any of these settings differs."""
    return any(getattr(before, name) != getattr(after, name) for name in names)


@lru_cache(maxsize=8)
def guidance_embedding(scale: float, width: int, device: torch.device = CPU) -> Tensor:
    """The sinusoidal embedding of a guidance scale, (1, width); Meng et al. 2023, as diffusers computes it."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -(np.log(10_000.0) / (half - 1)))
    angles = 1000.0 * scale * frequencies
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2))[None].to(device)


def pixels(picture: Tensor) -> NDArray[np.uint8]:
    """(H, W, 3) of a picture of either kind that `networks.Encode` takes."""
    if picture.dtype != torch.uint8:
        picture = (picture * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return picture[0].cpu().numpy()
