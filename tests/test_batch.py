"""The stream batch gives the pictures of the sequential loop, steps - 1 frames later, whatever changes meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from models.batch import StreamBatch
from models.denoise import Conditioning, Network, Pass, Rows, Trajectory, run, start
from tests.test_denoise import SHAPE, Toy, frame, lcm, noise, noise_of, words

STEPS = 4


class Remembering(Toy):
    """Each row of it mixes in a memory of its own, as a rolling window does."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[int, Tensor] = {}

    def __call__(self, rows: Rows) -> Tensor:
        output = super().__call__(rows)
        for i, row in enumerate(rows.rows):
            if rows.fresh[i]:
                self.memory.pop(row, None)
            if rows.live[i]:
                now = output[i : i + 1] + 0.1 * rows.frames[i]
                self.memory[row] = torch.lerp(self.memory.get(row, now), now, 0.4)
                output[i] = self.memory[row][0]
        return output


def stream(steps: int = STEPS, length: int = 14) -> list[Trajectory]:
    """Frames across a prompt change, a cut, and changes of strength, noise and guidance, a new setting every few."""
    plain: dict[str, Any] = {"words": words(0), "negative": words(1)}
    told = plain | {"words": words(2)}
    settings: list[dict[str, Any]] = [
        *[plain] * 3,
        *[told] * 2,
        *[told | {"guidance": 3.0}] * 2,
        *[told | {"guidance": 2.0, "mode": "onetime-negative", "delta": 0.8}] * 2,
        told | {"guidance": 1.4, "mode": "self"},
        *[plain | {"guidance": 2.0, "mode": "four-way", "mask_guidance": 0.5, "image_guidance": 0.0}] * 2,
        *[plain | {"guidance": 3.0, "negative": words(4)}] * 2,
    ]
    frames = []
    for n, cond in enumerate(settings[:length]):
        schedule = lcm(steps, 0.5 if n % 5 == 4 else 0.8)
        noises, source = [noise(n % 3 * steps + k) for k in range(steps)], noise(50 + n)
        frames.append(
            Trajectory(
                z=start(source, noises[0], schedule.steps[0], pure=False),
                schedule=schedule,
                cond=Conditioning(**cond),
                noises=tuple(noises[1:]),
                anchor=source,
                smoothing=0.3 if n > 6 else 0.0,
                carry=lambda x, n=n: x.roll(n, -1),  # type: ignore[misc]
                fresh=n in (0, 3, 6, 10),
                seen=float(n),
            )
        )
    return frames


def in_turn(network: Network, frames: Sequence[Trajectory]) -> list[Trajectory]:
    """The sequential loop."""
    found: list[Trajectory] = []
    for one in frames:
        found.append(run(network, one, found[-1].estimates if found else ()))
    return found


def in_flight(
    network: Network, frames: Sequence[Trajectory], width: int | None = None
) -> tuple[list[Trajectory | None], list[Trajectory]]:
    """What each push gave, and what draining did."""
    batch = StreamBatch(len(frames[0].schedule.steps), width)
    pushed = [batch.push(network, one) for one in frames]
    return pushed, batch.drain(network)


@pytest.mark.parametrize("width", [1, 3, STEPS, STEPS + 1, 2 * STEPS])
@pytest.mark.parametrize("kind", [Toy, Remembering])
def test_pictures_are_those_of_the_sequential_loop_later(width: int, kind: Callable[[], Toy]) -> None:
    frames = stream()
    expected = in_turn(kind(), frames)
    network = kind()
    pushed, rest = in_flight(network, frames, width)
    assert pushed[: STEPS - 1] == [None] * (STEPS - 1)
    found = [*pushed[STEPS - 1 :], *rest]
    assert len(found) == len(frames)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert ours.seen == theirs.seen
        assert torch.equal(ours.z, theirs.z)
        assert all(torch.equal(a, b) for a, b in zip(ours.estimates, theirs.estimates, strict=True))
    assert all(len(call.rows) == width and call.z.shape[0] == width for call in network.calls)
    assert all(call.z.isfinite().all() for call in network.calls)


def test_one_step_is_the_sequential_loop() -> None:
    frames = stream(steps=1)
    pushed, rest = in_flight(Remembering(), frames)
    assert rest == []
    for ours, theirs in zip(pushed, in_turn(Remembering(), frames), strict=True):
        assert ours is not None
        assert torch.equal(ours.z, theirs.z)


@pytest.mark.parametrize(
    ("mode", "width", "calls"),
    [
        ("off", STEPS, 1),
        ("full", STEPS, 2),
        ("full", 2 * STEPS, 1),
        ("self", STEPS, 1),
        ("onetime-negative", STEPS, 2),
        ("onetime-negative", STEPS + 1, 1),
        ("four-way", STEPS, 3),
    ],
)
def test_a_frame_costs_one_call_per_pass_or_less_where_the_engine_is_wider(mode: str, width: int, calls: int) -> None:
    cond = {"mode": mode, "guidance": 2.0, "mask_guidance": 0.5} if mode != "off" else {}
    network, batch = Toy(), StreamBatch(STEPS, width)
    for seed in range(6):
        network.calls.clear()
        batch.push(network, frame(STEPS, seed, **cond))
    assert len(network.calls) == calls
    first = network.calls[0]
    assert first.rows == range(width)
    assert first.steps[:STEPS] == (0, 1, 2, 3)
    assert first.of == STEPS
    needed = frame(STEPS, **cond).cond.rows(STEPS)
    assert needed <= max(call.rows.stop for call in network.calls)
    assert (
        needed > max(row for call in network.calls for row, live in zip(call.rows, call.live, strict=True) if live) - 1
    )
    if width == STEPS:  # a call of one row per step is one pass
        assert all(len({k for k, live in zip(c.kinds, c.live, strict=True) if live}) == 1 for c in network.calls)


def test_rows_without_a_frame_are_finite_and_marked_while_it_fills_and_drains() -> None:
    network, batch = Toy(), StreamBatch(3)
    for n in range(4):
        batch.push(network, replace(frame(3, n), seen=n, fresh=True))
        assert len(batch) == min(n + 1, 2)
    assert [done.seen for done in batch.drain(network)] == [2, 3]
    assert [call.live for call in network.calls] == [
        (True, False, False),
        (True, True, False),
        (True, True, True),
        (True, True, True),
        (False, True, True),
        (False, False, True),
    ]
    assert all(call.fresh == call.live for call in network.calls)
    assert all(call.frames[i] is not None for call in network.calls for i in range(3))


def test_a_reset_throws_away_what_is_inside() -> None:
    network, batch = Toy(), StreamBatch(3)
    batch.push(network, frame(3))
    batch.reset()
    assert (len(batch), batch.drain(network)) == (0, [])
    assert [batch.push(network, frame(3, seed)) for seed in range(2)] == [None, None]
    done = batch.push(network, frame(3))
    assert done is not None
    assert torch.equal(done.z, run(Toy(), frame(3)).z)


def test_frames_of_another_number_of_steps_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 steps in a stream batch of 3"):
        StreamBatch(3).push(Toy(), frame(2))


def test_a_network_that_fails_leaves_the_frames_before_in_their_places() -> None:
    batch, frames = StreamBatch(2), [frame(2, seed) for seed in range(2)]
    batch.push(Toy(), frames[0])

    def broken(rows: Rows) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        batch.push(broken, frames[1])
    done = batch.push(Toy(), frames[1])
    assert done is not None
    assert torch.equal(done.z, run(Toy(), frames[0]).z)


def test_a_real_unet_gives_the_same_in_a_batch_as_row_by_row() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()

    def network(rows: Rows) -> Tensor:
        output: Tensor = unet(rows.z, rows.t, rows.prompt[0], return_dict=False)[0]
        return output

    frames = [replace(one, cond=replace(one.cond, source=noise(80 + n))) for n, one in enumerate(stream())]
    with torch.inference_mode():
        expected = in_turn(network, frames)
        pushed, rest = in_flight(network, frames)
    for ours, theirs in zip([*pushed[STEPS - 1 :], *rest], expected, strict=True):
        assert ours is not None
        assert (ours.z - theirs.z).abs().max() <= 1e-5 * theirs.z.abs().max()


def published(frames: Sequence[Tensor], noises: Tensor, steps: int, mode: str, w: float, delta: float) -> list[Tensor]:
    """StreamDiffusion 0.1.1's stream batch over a whole clip, by its formulas: all rows at once, shifted every frame.

    `noises` (steps, C, h, w) are the same for every frame. Its first steps - 1 results are of no frame.
    """
    schedule = lcm(steps, 0.7).steps
    c_skip, c_out, signal, sigma = (
        torch.tensor([getattr(step, name) for step in schedule])[:, None, None, None]
        for name in ("c_skip", "c_out", "signal", "sigma")
    )

    def predicted(x: Tensor, said: Tensor) -> Tensor:
        return torch.cat([noise_of(x[k : k + 1], schedule[k].t, said) for k in range(len(x))])

    def consistent(x: Tensor, eps: Tensor) -> Tensor:
        return c_out * (x - sigma * eps) / signal + c_skip * x

    one = torch.ones(1, 1, 1, 1)
    waiting, stock, found = torch.zeros(steps - 1, *SHAPE[1:]), torch.zeros_like(noises), []
    for source in frames:
        x = torch.cat([signal[:1] * source + sigma[:1] * noises[:1], waiting])
        stock = torch.cat([noises[:1], stock[:-1]])
        if mode == "onetime-negative":
            stock[:1] = predicted(x[:1], words(1)[0])
        u = delta * stock if mode != "full" else predicted(x, words(1)[0])
        eps = u + w * (predicted(x, words(0)[0]) - u)
        done = consistent(x, eps)
        change = torch.cat([signal[1:], one]) * consistent(sigma * stock, eps) / torch.cat([sigma[1:], one])
        stock = noises.roll(-1, 0) + change
        waiting = signal[1:] * done[:-1] + sigma[1:] * noises[1:]
        found.append(done[-1:])
    return found[steps - 1 :]


@pytest.mark.parametrize("mode", ["full", "self", "onetime-negative"])
@pytest.mark.parametrize("delta", [1.0, 0.7])
@pytest.mark.parametrize("steps", [2, 4])
def test_a_clip_is_what_streamdiffusion_makes_of_it(mode: str, delta: float, steps: int) -> None:
    sources = [noise(50 + n) for n in range(8)]
    noises = [noise(k) for k in range(steps)]
    schedule = lcm(steps, 0.7)
    cond = Conditioning(words(0), words(1), guidance=1.4, mode=mode, delta=delta)  # type: ignore[arg-type]
    frames = [
        Trajectory(
            start(source, noises[0], schedule.steps[0], pure=False), schedule, cond, tuple(noises[1:]), anchor=source
        )
        for source in sources
    ]
    pushed, _ = in_flight(Toy(), frames)
    theirs = published(sources, torch.cat(noises), steps, mode, 1.4, delta)
    for a, b in zip(pushed[steps - 1 :], theirs, strict=True):
        assert a is not None
        assert (a.z - b).abs().max() <= 1e-4 * b.abs().max()


def test_the_masked_pass_has_rows_of_its_own() -> None:
    network = Toy()
    StreamBatch(2).push(network, frame(2, mode="four-way", guidance=2.0, mask_guidance=0.5, source=noise(9)))
    assert [call.kinds[0] for call in network.calls] == list(Pass)
    assert [call.rows.start for call in network.calls] == [0, 2, 4, 6]
