"""The numbers of a few-step schedule, worked out once per change of settings: pure maths, no network.

Latent consistency models, Luo et al. 2023 (arXiv 2310.04378), with the tables of diffusers' `LCMScheduler`; and models
distilled on a few timesteps of their own, such as SD-Turbo (Sauer et al. 2023, arXiv 2311.17042, §3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from accel.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Sampler = Literal["lcm", "euler", "ancestral"]


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising step at timestep t: z_t = signal·x0 + sigma·ε."""

    t: int
    signal: float  # √ᾱ_t
    sigma: float  # √(1 - ᾱ_t)
    c_skip: float  # boundary condition: x = c_skip·z_t + c_out·x0
    c_out: float
    fresh: float = 1.0  # of the next step's noise, what is new; √(1 - fresh²) is the noise found here


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps of one frame, noisiest first, and how the network's output is to be read."""

    steps: tuple[Step, ...]
    prediction: str  # "epsilon" | "v_prediction" | "sample"


def consistency_schedule(
    tables: Any, steps: int, strength: float, timesteps: Sequence[int] | None = None, sampler: Sampler = "lcm"
) -> Schedule:
    """Evenly spaced steps from the noise level of `strength` (0–1) down; `tables` is an `LCMScheduler`.

    A strength too small for so many steps is raised to the least that holds them (steps / original steps). With a
    model's own `timesteps` see `entered`; it is then no latent consistency model, and x = x0. The `sampler` says how
    much of each step's noise is new: all of it ("lcm"), none, as in DDIM ("euler"), or what `EulerAncestral…` renews.

    >>> [s.t for s in consistency_schedule(LCMScheduler(), steps=4, strength=1.0).steps]
    [999, 759, 499, 259]
    """
    if timesteps is None:
        least = (steps + 1e-6) / tables.config["original_inference_steps"]
        tables.set_timesteps(steps, strength=max(strength, least))
        chosen = [int(t) for t in tables.timesteps]
    else:
        chosen = entered(timesteps, steps, strength)
    levels = {t: (float(tables.alphas_cumprod[t].sqrt()), float((1 - tables.alphas_cumprod[t]).sqrt())) for t in chosen}

    def step(t: int, after: int | None) -> Step:
        c_skip, c_out = 0.0, 1.0
        if timesteps is None:
            c_skip, c_out = map(float, tables.get_scalings_for_boundary_condition_discrete(t))
        fresh = 1.0
        if after is not None and sampler != "lcm":
            fresh = renewed(*levels[t], *levels[after]) if sampler == "ancestral" else 0.0
        return Step(t, *levels[t], c_skip, c_out, fresh)

    pairs = zip(chosen, (*chosen[1:], None), strict=True)
    return Schedule(tuple(step(t, after) for t, after in pairs), tables.config["prediction_type"])


def entered(timesteps: Sequence[int], steps: int, strength: float) -> list[int]:
    """So many of a model's own timesteps (noisiest first), from the level of `strength` (0–1) down.

    Of m timesteps the lowest ⌊strength·m⌋ may be used, and as many as there are steps at least; they are taken evenly,
    the noisiest of them always. No timestep falls when strength rises. Where diffusers' trailing schedule of N steps
    has no others (N = 1, 2, 4 for SD-Turbo), these are its image-to-image steps for ⌊strength·N⌋ = `steps`: its card's
    N = 2, strength .5 is one step at 499. UserError for more steps than timesteps.

    >>> entered((999, 749, 499, 249), steps=1, strength=0.5)
    [499]
    """
    most = len(timesteps)
    if steps > most:
        raise UserError(f"this model knows {most} noise levels, not {steps}", hint=f"style.steps={most} or fewer")
    usable = min(max(math.floor(strength * most + 1e-6), steps), most)
    return [timesteps[most - math.ceil(usable * (steps - i) / steps)] for i in range(steps)]


def renewed(signal: float, sigma: float, signal_after: float, sigma_after: float) -> float:
    """What ancestral sampling (η = 1) renews of the noise between two levels, 0–1; Karras et al. 2022, as k-diffusion.

    Of the next level's noise, σ'/σ is the old, with σ in units of the signal.
    """
    return math.sqrt(max(1 - (sigma_after * signal / (signal_after * sigma)) ** 2, 0.0))


def clean(output: Tensor, z: Tensor, step: Step, prediction: str) -> Tensor:
    """The estimate of x0 that a network's output at z means."""
    match prediction:
        case "epsilon":
            return (z - step.sigma * output) / step.signal
        case "v_prediction":
            return step.signal * z - step.sigma * output
        case "sample":
            return output
    raise ValueError(f"unknown prediction type: {prediction}")


def output_for(x0: Tensor, z: Tensor, step: Step, prediction: str) -> Tensor:
    """The output at z that would mean this x0: the inverse of `clean`. As "epsilon", the noise between the two."""
    match prediction:
        case "epsilon":
            return (z - step.signal * x0) / step.sigma
        case "v_prediction":
            return (step.signal * z - x0) / step.sigma
        case "sample":
            return x0
    raise ValueError(f"unknown prediction type: {prediction}")
