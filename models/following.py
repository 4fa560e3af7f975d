"""A stream's memory brought up to its settings, frame by frame; only what changed is worked out again."""

from __future__ import annotations

import torch
from torch import Tensor

from models.params import Style
from models.schedule import consistency_schedule
from models.state import CPU, Networks, Prepared, State
from models.text import Transition
from models.text_xl import DoubleTextEncoder
from models.worn import last_set

PROMPTS = ("prompt", "negative", "lora")
SHOT = ("strength", "steps", "guidance", "image_guidance", "mask_guidance", "guidance_mode", "delta", "seed")
# changed, frames before mislead; so do `PROMPTS` at once


def prepared(net: Networks, style: Style, before: Prepared | None = None) -> Prepared:
    """What these settings come to, by what they came to before."""
    if before and (before.style.steps, before.style.strength) == (style.steps, style.strength):
        schedule = before.schedule
    else:
        schedule = consistency_schedule(net.tables, style.steps, style.strength, net.timesteps, net.sampler)
    return Prepared(style, schedule, *read(net, style))


def read(net: Networks, style: Style) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Words and negative words, and the pooled ones of both; known prompts cost nothing."""
    text = net.text
    if style.lora:
        text = net.loras.reader(last_set(style.lora))
    if isinstance(text, DoubleTextEncoder):
        wanted, unwanted = text.read(style.prompt), text.read_negative(style.negative)
        return wanted.words, unwanted.words, (wanted.pooled,), (unwanted.pooled,)
    return text.embed(style.prompt), text.embed(style.negative), (), ()


def followed(net: Networks, state: State, style: Style) -> Prepared:
    """Bring a stream up to the settings of its next frame: what they come to there, on the engines' device."""
    before = state.prepared.style
    if before is not style:
        new, told = prepared(net, style, state.prepared), changed(before, style, PROMPTS)
        if told:
            last = state.transition.at(state.since) if state.transition else state.prepared.embeddings
            state.transition, state.since = Transition(last, new.embeddings, style.blend_frames), 0
        state.prepared = new
        if changed(before, style, SHOT) or (told and not style.blend_frames):
            state.forget()
    draw(net, state, (before.seed, before.seed_mode, before.steps) != (style.seed, style.seed_mode, style.steps))
    shown = state.prepared
    if state.transition is not None:
        state.since += 1
        shown = shown.with_embeddings(state.transition.at(state.since))
        if state.since >= state.transition.frames:
            state.transition = None
    return placed(net, state, shown)


def placed(net: Networks, state: State, shown: Prepared) -> Prepared:
    """The same with its embeddings where the engines want them; once per change."""
    if net.device == CPU:
        return shown
    if state.placed is None or state.placed[0] is not shown:
        moved = tuple(tensor.to(net.device, non_blocking=True) for tensor in shown.embeddings)
        state.placed = shown, shown.with_embeddings(moved)
    return state.placed[1]


def draw(net: Networks, state: State, renew: bool) -> None:
    """Noise for the next frame: the same one, the seed's first (`renew`), or the generator's next."""
    style = state.prepared.style
    if renew:
        state.generator.manual_seed(style.seed)
    if renew or style.seed_mode == "per-frame":
        shape = net.latent_shape
        drawn = [torch.randn(shape, generator=state.generator) for _ in range(style.steps)]  # alike on every device
        state.noises = tuple(noise.to(net.device, non_blocking=True) for noise in drawn)


def changed(before: Style, after: Style, names: tuple[str, ...]) -> bool:
    """Whether any of these settings differs."""
    return any(getattr(before, name) != getattr(after, name) for name in names)
