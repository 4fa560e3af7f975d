"""The numbers of a consistency schedule, worked out once per change of settings: pure maths, no network.

Latent consistency models, Luo et al. 2023 (arXiv 2310.04378); the tables are those of diffusers' `LCMScheduler`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising step at timestep t: z_t = signal·x0 + sigma·ε."""

    t: int
    signal: float  # √ᾱ_t
    sigma: float  # √(1 - ᾱ_t)
    c_skip: float  # boundary condition: x = c_skip·z_t + c_out·x0
    c_out: float


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps of one frame, noisiest first, and how the network's output is to be read."""

    steps: tuple[Step, ...]
    prediction: str  # "epsilon" | "v_prediction" | "sample"


def consistency_schedule(tables: Any, steps: int, strength: float) -> Schedule:
    """Evenly spaced steps from the noise level of `strength` (0–1) down; `tables` is an `LCMScheduler`.

    A strength too small for so many steps is raised to the least that holds them (steps / original steps).

    >>> [s.t for s in consistency_schedule(LCMScheduler(), steps=4, strength=1.0).steps]
    [999, 759, 499, 259]
    """
    least = (steps + 1e-6) / tables.config["original_inference_steps"]
    tables.set_timesteps(steps, strength=max(strength, least))
    levels = tables.alphas_cumprod

    def step(t: int) -> Step:
        c_skip, c_out = tables.get_scalings_for_boundary_condition_discrete(t)
        return Step(t, float(levels[t].sqrt()), float((1 - levels[t]).sqrt()), float(c_skip), float(c_out))

    return Schedule(tuple(step(int(t)) for t in tables.timesteps), tables.config["prediction_type"])


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
