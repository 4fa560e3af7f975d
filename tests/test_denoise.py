"""The few-step loop: guidance of every mode, smoothing of x̂0, and the schedules, against formulas written out here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from accel.errors import UserError
from models.denoise import Conditioning, Network, Pass, Rows, Trajectory, denoise, run, start
from models.schedule import Schedule, clean, consistency_schedule, output_for

SHAPE = (1, 4, 6, 5)
TURBO = (999, 749, 499, 249)
TURBO_TABLES = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
MODES = ["full", "self", "onetime-negative", "four-way"]
Field = Callable[[Tensor, float, Tensor], Tensor]


def words(seed: int) -> tuple[Tensor, ...]:
    return (noise(1000 + seed, (1, 3, 8)),)


def noise(seed: int, shape: Sequence[int] = SHAPE) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def noise_of(z: Tensor, t: float, said: Tensor) -> Tensor:
    """A network of one row that predicts noise: smooth, and different for every latent, timestep and prompt."""
    taste = said.mean(1)[:, :4, None, None] + said.std()
    bent = torch.tanh(z[:, :4] * (0.6 + t / 2000) + taste)
    return bent + 0.3 * torch.sin(3 * z.roll(1, -1)[:, -4:] + t / 300) + 0.1 * taste


class Toy:
    """A network that computes each row by itself, so that batching changes no bit, and remembers what it was asked."""

    def __init__(self, field: Field = noise_of) -> None:
        self.field = field
        self.calls: list[Rows] = []

    def __call__(self, rows: Rows) -> Tensor:
        self.calls.append(rows)
        masked = [0.25 * (kind is Pass.MASKED) for kind in rows.kinds]
        out = [
            self.field(rows.z[i : i + 1], float(rows.t[i]), rows.prompt[0][i : i + 1]) for i in range(len(rows.rows))
        ]
        return torch.cat([o + m for o, m in zip(out, masked, strict=True)])

    @property
    def kinds(self) -> list[Pass]:
        return [kind for call in self.calls for kind in call.kinds]


def lcm(steps: int, strength: float = 1.0, **config: Any) -> Schedule:
    return consistency_schedule(LCMScheduler(**config), steps, strength)


def frame(steps: int = 4, seed: int = 0, strength: float = 0.7, prediction: str = "epsilon", **cond: Any) -> Trajectory:
    schedule = lcm(steps, strength, prediction_type=prediction)
    noises = [noise(seed + k) for k in range(steps)]
    source = noise(seed + 50)
    conditioning = Conditioning(**{"words": words(0), "negative": words(1)} | cond)
    z = start(source, noises[0], schedule.steps[0], pure=False)
    return Trajectory(z, schedule, conditioning, tuple(noises[1:]), anchor=source)


def as_prediction(schedule: Schedule, kind: str) -> Field:
    """The network of `noise_of` as one that predicts something else."""
    steps = {float(step.t): step for step in schedule.steps}

    def field(z: Tensor, t: float, said: Tensor) -> Tensor:
        eps = noise_of(z, t, said)
        return output_for(clean(eps, z, steps[t], "epsilon"), z, steps[t], kind)

    return field


def test_outputs_mean_what_they_are_computed_from() -> None:
    for step in lcm(4).steps:
        x0, z = noise(1), noise(2)
        for kind in ("epsilon", "v_prediction", "sample"):
            assert torch.allclose(clean(output_for(x0, z, step, kind), z, step, kind), x0, atol=1e-4)
        eps = noise(3)
        v = step.signal * eps - step.sigma * x0  # Salimans & Ho 2022
        z = step.signal * x0 + step.sigma * eps
        assert torch.allclose(output_for(x0, z, step, "v_prediction"), v, atol=1e-4)


def test_a_network_of_one_latent_and_a_network_of_rows_come_to_the_same() -> None:
    first = frame(guidance=3.0)
    one = denoise(lambda z, t, p: noise_of(z, t, p[0]), first.z, first.schedule, first.cond, first.noises)
    assert torch.equal(one, run(Toy(), first).z)


# Guidance -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "self", "onetime-negative"])
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_guidance_up_to_one_is_off(mode: str, guidance: float) -> None:
    network = Toy()
    found = run(network, frame(mode=mode, guidance=guidance, delta=0.5))
    assert torch.equal(found.z, run(Toy(), frame()).z)
    assert network.kinds == [Pass.WANTED] * 4


def published(first: Trajectory, mode: str, delta: float) -> Tensor:
    """StreamDiffusion 0.1.1 for one frame in its stream batch, by its own recurrence over "stock" noise, in float64.

    u = δ·stock, ε = u + w·(ε_words - u), x̂ = c_out·(x - σε)/α + c_skip·x. The stock of the next step is that step's
    noise plus α'/σ'·Δ, with Δ as x̂ but of σ·stock instead of x. It begins as the noise added to the source.
    """
    cond, steps = first.cond, first.schedule.steps
    x, w = first.z.double(), cond.guidance
    stock = (x - steps[0].signal * first.anchor.double()) / steps[0].sigma
    for k, step in enumerate(steps):
        text = noise_of(x, step.t, cond.words[0].double())
        negative = noise_of(x, step.t, cond.negative[0].double())
        if mode == "onetime-negative" and k == 0:
            stock = negative
        u = negative if mode == "full" else delta * stock
        eps = u + w * (text - u)
        x_hat = step.c_out * (x - step.sigma * eps) / step.signal + step.c_skip * x
        if k + 1 == len(steps):
            return x_hat
        scaled = step.sigma * stock
        change = step.c_out * (scaled - step.sigma * eps) / step.signal + step.c_skip * scaled
        after, new = steps[k + 1], first.noises[k].double()
        stock = new + after.signal * change / after.sigma
        x = after.signal * x_hat + after.sigma * new
    raise AssertionError


@pytest.mark.parametrize("mode", ["full", "self", "onetime-negative"])
@pytest.mark.parametrize("delta", [1.0, 0.6])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_residual_guidance_is_that_of_streamdiffusion(mode: str, delta: float, steps: int, prediction: str) -> None:
    network = Toy()
    first = frame(steps, mode=mode, guidance=1.7, delta=delta, prediction=prediction)
    network.field = as_prediction(first.schedule, prediction)
    theirs = published(first, mode, delta)
    ours = run(network, first).z
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    negatives = {"full": steps, "self": 0, "onetime-negative": 1}[mode]
    assert network.kinds.count(Pass.NEGATIVE) == negatives
    assert network.kinds.count(Pass.WANTED) == steps


def test_residual_guidance_follows_the_boundary_condition_where_it_counts() -> None:
    """With LCM's usual scaling c_skip is next to nothing; a model with another must get the published numbers too."""
    for mode in ("self", "onetime-negative"):
        first = frame(3, mode=mode, guidance=2.0)
        first = replace(first, schedule=lcm(3, 0.7, timestep_scaling=0.002))
        assert first.schedule.steps[-1].c_skip > 0.1
        theirs = published(first, mode, 1.0)
        assert (run(Toy(), first).z - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_one_step_of_onetime_negative_is_full_guidance() -> None:
    full, onetime = (run(Toy(), frame(1, mode=mode, guidance=4.0)).z for mode in ("full", "onetime-negative"))
    assert torch.equal(full, onetime)
    assert not torch.allclose(full, run(Toy(), frame(1)).z)


def test_one_step_of_self_leads_away_from_the_noise_that_was_added() -> None:
    first = frame(1, mode="self", guidance=2.0)
    step = first.schedule.steps[0]
    eps = noise(0) + 2.0 * (noise_of(first.z, step.t, first.cond.words[0]) - noise(0))
    x0 = step.c_out * clean(eps, first.z, step, "epsilon") + step.c_skip * first.z
    assert torch.allclose(run(Toy(), first).z, x0, atol=1e-5)


def test_self_guidance_without_an_anchor_is_an_error_of_the_program() -> None:
    with pytest.raises(ValueError, match="anchor"):
        run(Toy(), replace(frame(mode="self", guidance=2.0), anchor=None))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("delta", [1.0, 0.5])
def test_guidance_stays_finite_down_from_noise_alone(mode: str, delta: float) -> None:
    first = frame(4, mode=mode, guidance=2.0, delta=delta, prediction="v_prediction")
    schedule = lcm(4, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert schedule.steps[0].signal < 1e-3
    assert run(Toy(), replace(first, schedule=schedule)).z.isfinite().all()


# Four-way guidance --------------------------------------------------------------------------------------------------


def four_way(words: float, image: float, mask: float, source: Tensor | None, steps: int = 2) -> tuple[Tensor, Toy]:
    network = Toy()
    scales = {"guidance": words, "image_guidance": image, "mask_guidance": mask}
    return run(network, frame(steps, mode="four-way", source=source, **scales)).z, network


def branch(*, wanted: bool, image: bool, masked: bool, source: Tensor) -> Tensor:
    """The loop with one kind of pass only."""
    seen = source if image else torch.zeros_like(source)
    said = frame().cond.words if wanted else frame().cond.negative

    def network(rows: Rows) -> Tensor:
        z = torch.cat([rows.z, seen], 1)
        return noise_of(z, float(rows.t[0]), said[0]) + 0.25 * masked

    return run(network, frame(2)).z


def test_one_scale_of_four_way_guidance_is_that_branch_and_no_scale_none_of_them() -> None:
    source = noise(9)
    for scales, asked in {
        (0.0, 0.0, 0.0): {"wanted": False, "image": False, "masked": False},
        (1.0, 0.0, 0.0): {"wanted": True, "image": False, "masked": False},
        (0.0, 1.0, 0.0): {"wanted": False, "image": True, "masked": False},
        (0.0, 0.0, 1.0): {"wanted": False, "image": False, "masked": True},
    }.items():
        found, network = four_way(*scales, source)
        assert torch.equal(found, branch(**asked, source=source))
        assert len(network.calls) == 2  # one per step: what counts nothing is not computed


@pytest.mark.parametrize(
    ("scales", "cost"), [((2.0, 1.5, 0.7), 4), ((2.0, 1.5, 0.0), 3), ((2.0, 0, 0), 2), ((0.3, 0.7, 0), 2)]
)
def test_four_way_guidance_is_the_weighted_sum_of_its_passes(scales: tuple[float, float, float], cost: int) -> None:
    source = noise(9)
    first = frame(1, mode="four-way")
    step, z = first.schedule.steps[0], first.z
    bare, seen = torch.cat([z, torch.zeros_like(source)], 1), torch.cat([z, source], 1)
    wanted, negative = first.cond.words[0], first.cond.negative[0]
    nothing = noise_of(bare, step.t, negative)
    image, text = noise_of(seen, step.t, negative), noise_of(bare, step.t, wanted)
    s_t, s_i, s_m = scales
    eps = (1 - s_i - s_t - s_m) * nothing + s_i * image + s_t * text + s_m * (nothing + 0.25)
    x0 = step.c_out * clean(eps, z, step, "epsilon") + step.c_skip * z
    found, network = four_way(*scales, source, steps=1)
    assert torch.allclose(found, x0, atol=1e-4)
    assert len(network.calls) == cost
    assert (
        frame(1, mode="four-way", guidance=s_t, image_guidance=s_i, mask_guidance=s_m, source=source).cond.passes
        == cost
    )


def test_without_a_concatenated_source_the_image_pass_is_the_plain_negative_one() -> None:
    found, network = four_way(2.0, 1.5, 0.0, None)
    assert torch.allclose(found, run(Toy(), frame(2, guidance=2.0)).z, atol=1e-4)
    assert set(network.kinds) == {Pass.WANTED, Pass.NEGATIVE}
    found, network = four_way(1.0, 1.0, 0.0, None)  # the neutral scales
    assert torch.equal(found, run(Toy(), frame(2)).z)
    assert network.kinds == [Pass.WANTED] * 2


# Smoothing of x̂0 ----------------------------------------------------------------------------------------------------


def test_no_smoothing_and_no_frame_before_change_nothing() -> None:
    first = frame(guidance=2.0)
    alone = run(Toy(), first)
    before = [noise(70 + k) for k in range(4)]
    assert torch.equal(run(Toy(), first, before).z, alone.z)
    assert torch.equal(run(Toy(), replace(first, smoothing=0.5)).z, alone.z)
    assert torch.equal(run(Toy(), replace(first, smoothing=0.5), [None] * 4).z, alone.z)
    assert torch.equal(run(Toy(), replace(first, smoothing=0.5, fresh=True), before).z, alone.z)
    assert not torch.equal(run(Toy(), replace(first, smoothing=0.5), before).z, alone.z)


@pytest.mark.parametrize("sampler", ["lcm", "euler", "ancestral"])
def test_smoothing_leads_each_estimate_to_the_last_frames_and_finds_the_noise_again(sampler: Any) -> None:
    first = frame(3)
    schedule = consistency_schedule(LCMScheduler(), 3, 0.7, TURBO, sampler)
    before = [noise(70 + k) for k in range(3)]
    found = run(Toy(), replace(first, schedule=schedule, smoothing=0.3, carry=lambda x: x.roll(1, -1)), before)
    z = first.z
    for k, step in enumerate(schedule.steps):
        x0 = (z - step.sigma * noise_of(z, step.t, first.cond.words[0])) / step.signal
        x0 = 0.7 * x0 + 0.3 * before[k].roll(1, -1)
        assert torch.allclose(found.estimates[k], x0, atol=1e-4)
        eps = (z - step.signal * x0) / step.sigma  # what makes z and x0 agree
        z = x0
        if k < 2:
            after = schedule.steps[k + 1]
            z = after.signal * x0 + after.sigma * (step.fresh * first.noises[k] + (1 - step.fresh**2) ** 0.5 * eps)
    assert torch.allclose(found.z, z, atol=1e-4)


def test_a_still_scene_settles_under_smoothing_while_its_noise_changes() -> None:
    def pictures(smoothing: float) -> Tensor:
        source, found = noise(50), []
        before: Sequence[Tensor | None] = ()
        for n in range(40):
            first = frame(2)
            noises = [noise(200 + 2 * n), noise(201 + 2 * n)]
            z = start(source, noises[0], first.schedule.steps[0], pure=False)
            after = run(Toy(), replace(first, z=z, noises=(noises[1],), smoothing=smoothing), before)
            before = after.estimates
            found.append(after.z)
        return torch.stack(found[10:])

    assert pictures(0.8).diff(dim=0).abs().mean() < 0.3 * pictures(0.0).diff(dim=0).abs().mean()


def test_a_still_scene_of_the_same_noise_converges_to_what_it_is_without_smoothing() -> None:
    first = replace(frame(3), smoothing=0.5)
    alone, before, away = run(Toy(), first), [noise(70 + k) for k in range(3)], []
    for _ in range(30):
        after = run(Toy(), first, before)
        before = list(after.estimates)
        away.append(float((after.z - alone.z).abs().max()))
    assert away[-1] < 1e-4 < away[0]


# Schedules ----------------------------------------------------------------------------------------------------------


GOLDEN = {  # steps: {strength from: timesteps}
    1: {0.01: [249], 0.25: [249], 0.49: [249], 0.5: [499], 0.74: [499], 0.75: [749], 0.99: [749], 1.0: [999]},
    2: {0.01: [499, 249], 0.5: [499, 249], 0.74: [499, 249], 0.75: [749, 499], 1.0: [999, 499]},
    3: {0.01: [749, 499, 249], 0.75: [749, 499, 249], 0.99: [749, 499, 249], 1.0: [999, 749, 499]},
    4: {0.01: [999, 749, 499, 249], 0.5: [999, 749, 499, 249], 1.0: [999, 749, 499, 249]},
}


def entries(steps: int, strength: float) -> list[int]:
    return [step.t for step in consistency_schedule(LCMScheduler(), steps, strength, TURBO).steps]


@pytest.mark.parametrize("steps", GOLDEN)
def test_a_models_own_timesteps_are_entered_by_strength(steps: int) -> None:
    assert {strength: entries(steps, strength) for strength in GOLDEN[steps]} == GOLDEN[steps]
    before = [0] * steps
    for percent in range(1, 101):
        now = entries(steps, percent / 100)
        assert all(a <= b for a, b in zip(before, now, strict=True))
        assert now == sorted(set(now), reverse=True)
        before = now


def img2img_timesteps(scheduler: Any, steps: int, strength: float) -> list[int]:
    """What diffusers' image-to-image pipelines run of a schedule."""
    scheduler.set_timesteps(steps)
    return [int(t) for t in scheduler.timesteps[steps - min(int(steps * strength), steps) :]]


@pytest.mark.parametrize(
    ("total", "strength"), [(1, 1.0), (2, 0.5), (2, 1.0), (4, 0.25), (4, 0.5), (4, 0.75), (4, 1.0)]
)
def test_a_models_own_timesteps_are_those_of_diffusers_trailing_schedules(total: int, strength: float) -> None:
    theirs = img2img_timesteps(EulerDiscreteScheduler(timestep_spacing="trailing"), total, strength)
    assert entries(len(theirs), strength) == theirs


def test_more_steps_than_a_model_has_timesteps_are_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match="4 noise levels") as error:
        consistency_schedule(LCMScheduler(), 5, 1.0, TURBO)
    assert "style.steps=4" in error.value.hint


@pytest.mark.parametrize("t", TURBO)
def test_a_single_step_at_a_models_own_timestep_is_x0(t: int) -> None:
    schedule = consistency_schedule(LCMScheduler(), 1, (t + 1) / 1000, TURBO)
    (step,) = schedule.steps
    assert (step.t, step.c_skip, step.c_out) == (t, 0.0, 1.0)
    source, eps = noise(1), noise(2)
    z = start(source, eps, step, pure=False)
    conditioning = Conditioning(words(0), words(1))
    network: Network = lambda rows: eps  # noqa: E731
    assert torch.allclose(run(network, Trajectory(z, schedule, conditioning)).z, source, atol=2e-5)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
@pytest.mark.parametrize(("total", "strength"), [(1, 1.0), (2, 0.5), (2, 1.0), (4, 0.5), (4, 1.0)])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_eulers_samplers_are_those_of_diffusers(kind: Any, total: int, strength: float, prediction: str) -> None:
    theirs = kind(timestep_spacing="trailing", prediction_type=prediction, **TURBO_TABLES)
    chosen = img2img_timesteps(theirs, total, strength)
    theirs.set_begin_index(total - len(chosen))
    source, generator = noise(5), torch.Generator().manual_seed(3)
    x = theirs.add_noise(source, torch.randn(SHAPE, generator=generator), theirs.timesteps[total - len(chosen) :][:1])
    tables = LCMScheduler(prediction_type=prediction, **TURBO_TABLES)
    sampler = "euler" if kind is EulerDiscreteScheduler else "ancestral"
    schedule = consistency_schedule(tables, len(chosen), strength, TURBO, sampler)
    field = as_prediction(schedule, prediction)
    for t in theirs.timesteps[total - len(chosen) :]:
        output = field(theirs.scale_model_input(x, t), float(t), words(0)[0])
        x = theirs.step(output, t, x, generator=generator, return_dict=False)[0]
    generator = torch.Generator().manual_seed(3)
    noises = [torch.randn(SHAPE, generator=generator) for _ in chosen]
    z = start(source, noises[0], schedule.steps[0], pure=False)
    ours = run(Toy(field), Trajectory(z, schedule, Conditioning(words(0), words(1)), tuple(noises[1:]))).z
    assert (ours - x).abs().max() <= 1e-4 * x.abs().max()


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("strength", [0.01, 0.5, 1.0])
def test_consistency_models_keep_their_own_schedule(steps: int, strength: float) -> None:
    tables = LCMScheduler()
    schedule = consistency_schedule(tables, steps, strength)
    tables.set_timesteps(steps, strength=max(strength, (steps + 1e-6) / 50))
    assert [step.t for step in schedule.steps] == tables.timesteps.tolist()
    assert all(step.fresh == 1 and step.c_skip > 0 for step in schedule.steps)
