"""The few-step loop, as plain functions over tensors: what steers a frame, one step of it, and all of them in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from models.schedule import Schedule, Step, clean, output_for

Prompt = tuple[Tensor, ...]  # words (n, L, D), and pooled ones (n, P) where the UNet takes them
Mode = Literal["full", "self", "onetime-negative", "four-way"]
R = TypeVar("R")


class Pass(IntEnum):
    """What guidance runs the network for; its number says which memory is its own, row = step + pass·steps."""

    WANTED = 0  # with the wanted words; with the source too, but for four-way guidance
    NEGATIVE = 1  # with the negative words, and the source where the UNet takes it concatenated
    BARE = 2  # with the negative words and zeros for the source: only of UNets that take one
    MASKED = 3  # as that, what stands out kept in self-attention by its mask (Style-A-Video)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What steers a frame apart from its noise.

    Guidance of mode "full" is classifier-free, ≤ 1 = off. "self" and "onetime-negative" are StreamDiffusion's residual
    guidance (Kodaira et al. 2023, arXiv 2312.12491, §3.2), whose negative estimate is what lies between the latent and
    an anchor: the source, or what the negative words alone made of it in the first step. They save the passes with
    the negative words, and so have no `image_guidance`. "four-way" is Style-A-Video's (Huang et al. 2023).
    """

    words: Prompt
    negative: Prompt  # what guidance leads away from
    source: Tensor | None = None  # (1, C, H/8, W/8) source latent, where the UNet takes it concatenated
    guidance: float = 1.0
    image_guidance: float = 1.0  # InstructPix2Pix's second scale; four-way's of the source
    mode: Mode = "full"
    delta: float = 1.0  # how much of the negative estimate counts, of noise predicted; residual modes only
    mask_guidance: float = 0.0  # four-way's third scale

    @property
    def passes(self) -> int:
        """How often the network is run for the first step; later ones never need more."""
        return len(self.asked(0))

    def rows(self, steps: int) -> int:
        """How many memories the passes of so many steps use."""
        return 1 + max(k + kind * steps for k in range(steps) for kind in self.asked(k))

    def asked(self, step: int) -> tuple[Pass, ...]:
        """The passes of a step, 0 = the first."""
        if self.mode == "four-way":
            return tuple(self.weights)
        if self.guidance <= 1 or self.mode == "self" or (self.mode == "onetime-negative" and step):
            return (Pass.WANTED,)
        if self.mode == "onetime-negative" or self.source is None or self.image_guidance == 1:
            return Pass.WANTED, Pass.NEGATIVE
        return Pass.WANTED, Pass.NEGATIVE, Pass.BARE

    @property
    def weights(self) -> dict[Pass, float]:
        """Four-way guidance as a sum, (1 - s_I - s_T - s_M)·ε∅ + s_I·ε_I + s_T·ε_T + s_M·ε_M, without what counts 0.

        A UNet that takes no source has ε_I = ε∅, the plain negative pass: s_I then cancels.
        """
        words, image, mask = self.guidance, self.image_guidance, self.mask_guidance
        found = {Pass.WANTED: words, Pass.NEGATIVE: image, Pass.BARE: 1 - image - words - mask, Pass.MASKED: mask}
        if self.source is None:
            found = {Pass.WANTED: words, Pass.NEGATIVE: 1 - words - mask, Pass.MASKED: mask}
        return {kind: weight for kind, weight in found.items() if abs(weight) > 1e-6}

    def joined(self, z: Tensor, kind: Pass) -> Tensor:
        """What the network takes for z in such a pass, (1, C or 2·C, H/8, W/8)."""
        if self.source is None:
            return z
        seen = kind is Pass.NEGATIVE or (kind is Pass.WANTED and self.mode != "four-way")
        return torch.cat([z, self.source if seen else torch.zeros_like(self.source)], 1)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One frame on its way from noise to x0; all that steers it goes with it."""

    z: Tensor  # (1, C, H/8, W/8) the latent at its next step, in the end x0
    schedule: Schedule
    cond: Conditioning
    noises: tuple[Tensor, ...] = ()  # of the steps after the first
    anchor: Tensor | None = None  # the source's latent that z was made of, for mode "self"
    smoothing: float = 0.0  # how far each step's x̂0 is led to the last frame's
    carry: Callable[[Tensor], Tensor] | None = None  # moves a latent of the last frame to where its scene is now
    fresh: bool = False  # the first of a shot: frames before tell nothing
    seen: Any = None  # what the network wants to know of the frame, handed through
    estimates: tuple[Tensor, ...] = ()  # x̂0 of the steps behind it, smoothed


@dataclass(frozen=True, slots=True)
class Rows:
    """What one call of the network computes: n latents, a row each, of one frame or several."""

    z: Tensor  # (n, C, H/8, W/8), what is concatenated included
    t: Tensor  # (n,)
    prompt: Prompt  # (n, L, D)[, (n, P)]
    rows: range  # whose memory each latent belongs to: step + pass·steps
    kinds: tuple[Pass, ...]
    steps: tuple[int, ...]  # which step each is at, 0 = the noisiest
    of: int  # steps per frame
    frames: tuple[Any, ...]  # `Trajectory.seen` of each
    live: tuple[bool, ...]  # whether it is asked for; another repeats one that is, and must leave memory alone
    fresh: tuple[bool, ...]  # whether its memory is of another shot, to be forgotten before


Network = Callable[[Rows], Tensor]  # → outputs (n, C, H/8, W/8), in memory that its next call leaves alone
Asking = Generator[Rows, Tensor, R]  # work that hands out its calls of the network and is sent their outputs


def start(source: Tensor, noise: Tensor, step: Step, *, pure: bool) -> Tensor:
    """The first noisy latent: noise alone, or the source latent at the first step's level."""
    return noise if pure else step.signal * source + step.sigma * noise


def run(network: Network, frame: Trajectory, before: Sequence[Tensor | None] = ()) -> Trajectory:
    """A frame through all its steps, one row per call; `before` are the last frame's estimates, or nothing.

    >>> after = run(network, Trajectory(z, schedule, cond, noises[1:]))
    >>> after.z, after.estimates  # x0, and what the next frame may be smoothed with
    """
    return answered(network, through(frame, before))


def answered(network: Network, asking: Asking[R]) -> R:
    """What the work comes to, with this network for each of its calls."""
    output: Any = None
    while True:
        try:
            rows = asking.send(output)
        except StopIteration as done:
            found: R = done.value
            return found
        output = network(rows)


def through(frame: Trajectory, before: Sequence[Tensor | None] = ()) -> Asking[Trajectory]:
    """`run`, for whoever makes its calls: so frames of several streams share one (`models.together`)."""
    steps = len(frame.schedule.steps)
    for k in range(steps):
        flights: list[Trajectory | None] = [None] * steps
        flights[k] = frame
        moved = (yield from advance(flights, before))[k]
        assert moved is not None
        frame = moved
    return frame


def advance(
    flights: Sequence[Trajectory | None], before: Sequence[Tensor | None] = (), width: int = 1
) -> Asking[list[Trajectory | None]]:
    """Every frame one step on, the one in place k from its step k; `width` rows per call of the network."""
    found = yield from evaluated(flights, width)
    before = before or [None] * len(flights)
    return [f and stepped(f, k, outputs, before[k]) for k, (f, outputs) in enumerate(zip(flights, found, strict=True))]


def evaluated(flights: Sequence[Trajectory | None], width: int) -> Asking[list[dict[Pass, Tensor]]]:
    """The outputs that each frame's guidance asks for at its step.

    A call takes rows i·width … (i + 1)·width - 1. So of an engine for n = steps rows each call is one pass; one for 2·n
    rows does a guided step in one call, one for n + 1 rows a step of onetime-negative guidance. Calls that nothing is
    asked of are not made.
    """
    n = len(flights)
    asked = {k + kind * n: (k, kind, f) for k, f in enumerate(flights) if f for kind in f.cond.asked(k)}
    found: list[dict[Pass, Tensor]] = [{} for _ in flights]
    for first in range(0, max(asked, default=-1) + 1, width):
        rows = range(first, first + width)
        if not (live := [row for row in rows if row in asked]):
            continue
        filled = [asked.get(row, asked[live[0]]) for row in rows]  # finite, whatever is in an empty row
        prompts = [f.cond.words if kind is Pass.WANTED else f.cond.negative for _, kind, f in filled]
        output = yield Rows(
            z=torch.cat([f.cond.joined(f.z, kind) for _, kind, f in filled]),
            t=timesteps(tuple(f.schedule.steps[k].t for k, _, f in filled), filled[0][2].z.device),
            prompt=tuple(torch.cat(parts) for parts in zip(*prompts, strict=True)),
            rows=rows,
            kinds=tuple(kind for _, kind, _ in filled),
            steps=tuple(k for k, _, _ in filled),
            of=n,
            frames=tuple(f.seen for _, _, f in filled),
            live=tuple(row in asked for row in rows),
            fresh=tuple(row in asked and f.fresh for row, (_, _, f) in zip(rows, filled, strict=True)),
        )
        for row in live:
            k, kind, _ = asked[row]
            found[k][kind] = output[row - first : row - first + 1]
    return found


@lru_cache(maxsize=64)
def timesteps(steps: tuple[int, ...], device: torch.device) -> Tensor:
    """(n,) float32; made once, since a device waits for what comes from the host."""
    with torch.inference_mode(False):
        return torch.tensor(steps, dtype=torch.float32, device=device)


def stepped(frame: Trajectory, k: int, outputs: dict[Pass, Tensor], before: Tensor | None = None) -> Trajectory:
    """A frame after its step k, from the network's outputs; `before` is the last frame's estimate at that step."""
    z, schedule = frame.z, frame.schedule
    step, last = schedule.steps[k], k + 1 == len(schedule.steps)
    output, anchor = guided(outputs, frame, k)
    x0 = clean(output, z, step, schedule.prediction)
    if frame.smoothing and before is not None and not frame.fresh:
        x0 = torch.lerp(x0, frame.carry(before) if frame.carry else before, frame.smoothing)
    x = step.c_out * x0 + step.c_skip * z
    if not last:
        after, noise = schedule.steps[k + 1], frame.noises[k]
        if step.fresh < 1:  # part of it is the noise that lies between z and this x0
            noise = step.fresh * noise + math.sqrt(1 - step.fresh**2) * output_for(x0, z, step, "epsilon")
        x = after.signal * x + after.sigma * noise
    return replace(frame, z=x, anchor=anchor, estimates=(*frame.estimates, x0))


def guided(outputs: dict[Pass, Tensor], frame: Trajectory, k: int) -> tuple[Tensor, Tensor | None]:
    """The output of step k under guidance, and the anchor for the next one.

    Full guidance with a concatenated source is InstructPix2Pix's (Brooks et al. 2023, eq. 3): o(∅,∅) + w·(o(words) -
    o(image)) + w_i·(o(image) - o(∅,∅)); at w_i = 1 the bare pass cancels and is not made.
    """
    cond, anchor, z = frame.cond, frame.anchor, frame.z
    if cond.mode == "four-way":
        terms = [weight * outputs[kind] for kind, weight in cond.weights.items()]
        return sum(terms[1:], start=terms[0]), anchor
    wanted = outputs[Pass.WANTED]
    if cond.guidance <= 1:
        return wanted, anchor
    unwanted = outputs.get(Pass.NEGATIVE)
    if cond.mode != "full":
        step, prediction = frame.schedule.steps[k], frame.schedule.prediction
        if unwanted is not None:
            anchor = clean(unwanted, z, step, prediction)
        elif anchor is None:
            raise ValueError("guidance of mode self needs the source's latent as anchor")
        else:
            unwanted = output_for(anchor, z, step, prediction)
        unwanted = moderated(unwanted, z, step, prediction, cond.delta)
        anchor = (step.c_out + step.c_skip * step.signal) * anchor  # as x0 is by the boundary condition
    assert unwanted is not None
    out = unwanted + cond.guidance * (wanted - unwanted)
    if Pass.BARE in outputs:
        out = out + (cond.image_guidance - 1) * (unwanted - outputs[Pass.BARE])
    return out, anchor


def moderated(output: Tensor, z: Tensor, step: Step, prediction: str, delta: float) -> Tensor:
    """The output whose noise is δ times this one's; at signal 0, where that would say nothing, the output itself."""
    if delta == 1 or not step.signal:
        return output
    if prediction == "epsilon":
        return delta * output
    noise = output_for(clean(output, z, step, prediction), z, step, "epsilon")
    return output_for(clean(delta * noise, z, step, "epsilon"), z, step, prediction)


def denoise(
    network: Callable[[Tensor, float, Prompt], Tensor],
    z: Tensor,
    schedule: Schedule,
    cond: Conditioning,
    noises: Sequence[Tensor],
) -> Tensor:
    """`run` for a network of (z and what is concatenated to it, t, prompt): from the first noisy latent to x0."""
    frame = Trajectory(z, schedule, cond, tuple(noises))
    return run(lambda rows: network(rows.z, float(rows.t[0]), rows.prompt), frame).z
