"""What happens to one frame: pixels → latents → noise → few denoising steps → pixels."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accel.transfer import device_errors, enqueued
from models.batch import StreamBatch
from models.calls import Calls
from models.denoise import Conditioning, Pass, Trajectory, start, through, timesteps
from models.filters import sample
from models.flow import compose
from models.following import SHOT, draw, followed, prepared, read
from models.frame_graph import frame_graph
from models.launched import Decoding, Failed, Filling, Launched, Stages
from models.noise import drifted, fed_back
from models.params import Params
from models.prompt import parse
from models.reproject import scaled
from models.safety import Censor
from models.schedule import entered
from models.state import CPU, Networks, Prepared, State
from models.text import unknown_words
from models.together import PAYS, Widths, attempt, side_by_side, widths
from models.unet import Seen
from models.units import advice
from models.worn import lora_set

if TYPE_CHECKING:
    from accel.engine import Pending

log = logging.getLogger(__name__)

Framed = tuple[State, NDArray[np.uint8], Params]  # a stream's memory, its picture (H, W, 3), its settings


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
        state = State(prepared(net, params.style), Calls(net.unet, net.parts, net.time_ids), batch, censor)
        draw(net, state, renew=True)
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
            return followed(self.networks, state, params.style)

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
        """Take the next frame as the first of a shot; the stream's settings and noise stay."""
        state.forget()

    def prepare(self, params: Params) -> None:
        """Read the prompts, and let the parts work ahead; then the frame path finds all of it done. Any thread."""
        style = params.style
        if self.networks.timesteps:
            entered(self.networks.timesteps, style.steps, style.strength)
        self.networks.loras.tensors(lora_set(style.lora))
        read(self.networks, style)
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
