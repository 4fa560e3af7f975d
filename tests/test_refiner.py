"""The learned refiner: what it leaves alone, when it forgets, what it costs, and that engines agree on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from accel.openvino_backend import OpenVINOBackend
from accel.torch_backend import TorchBackend
from models.refiner import MEMORY, LearnedRefiner, RefinerNet, load_refiner, read_net
from models.reproject import Motion
from models.temporal import Blend, Past
from models.training.refiner import advance

SIZE = (96, 64)  # width, height
# bf16 holds 8 bits; measured: 7e-4 at the worst pixel of 16 frames of 288 lines
PARITY = 5e-3


@pytest.fixture(scope="module")
def refiner() -> LearnedRefiner:
    return load_refiner(SIZE, TorchBackend())


def run(refiner: LearnedRefiner, frames: list[Tensor], motion: Motion, past: Past | None = None) -> list[Tensor]:
    """All outputs, each frame after the first with a motion of its own like the one given."""
    past = past or Past()
    return [refiner(frame, replace(motion) if i else None, past) for i, frame in enumerate(frames)]


def still(trust: float = 1.0, shift: float = 0.0, cut: bool = False) -> Motion:
    """Everything moved by `shift` px at guide size."""
    source = torch.nn.functional.avg_pool2d(painting(), 2)
    flow, sure = torch.full((1, 2, *source.shape[2:]), shift), torch.full((1, 1, *source.shape[2:]), trust)
    return Motion(flow, sure, cut, source, source)


def painting(seed: int = 0) -> Tensor:
    """Soft blotches with hard edges and grain, (1, 3, H, W) in [0, 1]."""
    noise = torch.Generator().manual_seed(seed)
    blotches = torch.rand(1, 3, SIZE[1] // 16, SIZE[0] // 16, generator=noise)
    planes = torch.nn.functional.interpolate(blotches, scale_factor=16.0, mode="nearest")
    return (planes + 0.05 * torch.randn(1, 3, SIZE[1], SIZE[0], generator=noise)).clamp(0, 1)


def flickering(picture: Tensor, seed: int) -> Tensor:
    noise = torch.randn(1, 3, SIZE[1] // 8, SIZE[0] // 8, generator=torch.Generator().manual_seed(seed)) * 18 / 255
    return (picture + torch.nn.functional.interpolate(noise, scale_factor=8.0, mode="bicubic")).clamp(0, 1)


def test_the_first_frame_passes_untouched(refiner: LearnedRefiner) -> None:
    picture = painting()
    assert refiner(picture, None, Past()) is picture


def test_a_cut_and_another_size_start_afresh(refiner: LearnedRefiner) -> None:
    past = Past(painting(1), torch.full((1, 1, SIZE[1] // 4, SIZE[0] // 4), 9.0))
    picture = painting()
    assert refiner(picture, still(cut=True), past) is picture
    assert past.output is picture
    assert past.age is None
    past.output = torch.zeros(1, 3, 32, 32)
    assert refiner(picture, still(), past) is picture


def test_a_steady_picture_stays_as_it_is(refiner: LearnedRefiner) -> None:
    picture = painting()
    assert all(float((o - picture).abs().max()) < 1 / 255 for o in run(refiner, [picture] * 6, still()))


def test_flicker_of_a_still_picture_fades(refiner: LearnedRefiner) -> None:
    clean = painting()
    noisy = [flickering(clean, seed) for seed in range(1, 13)]
    outputs = run(refiner, noisy, still())
    assert (outputs[-1] - clean).square().mean() < 0.3 * (noisy[-1] - clean).square().mean()
    step = (outputs[-1] - outputs[-2]).square().mean()
    assert step < 0.05 * (noisy[-1] - noisy[-2]).square().mean()


def test_what_was_not_seen_before_is_not_drawn_from_the_past(refiner: LearnedRefiner) -> None:
    motion, frame = still(), flickering(painting(), 1)
    motion.trust[..., 12:] = 0  # all but the left quarter is new
    memories = [painting(), painting()]
    memories[1][..., 24:] = painting(7)[..., 24:]
    age = torch.full((1, 1, SIZE[1] // 4, SIZE[0] // 4), 9.0)
    outputs = [refiner(frame, replace(motion), Past(memory, age)) for memory in memories]
    moved, apart = ((a - b)[..., 40:] for a, b in (outputs, memories))
    share = float((moved * apart).mean() / apart.square().mean())  # of the past in the picture; measured: 0.09
    assert abs(share) < 0.15


def test_a_frame_does_not_depend_on_those_after_it(refiner: LearnedRefiner) -> None:
    frames = [flickering(painting(), seed) for seed in (1, 2)]
    one, other = (run(refiner, [*frames, painting(last)], still()) for last in (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one[:2], other[:2], strict=True))
    assert not torch.equal(one[2], other[2])


@pytest.mark.parametrize("trust", [0.0, 1.0])
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_extremes_stay_finite_and_in_range(refiner: LearnedRefiner, trust: float, level: float) -> None:
    past = Past()
    for i in range(5):
        picture = torch.full((1, 3, SIZE[1], SIZE[0]), level if i % 2 else 1 - level)
        output = refiner(picture, still(trust, 1e4) if i else None, past)
        assert bool(output.isfinite().all())
        assert 0 <= float(output.min()) <= float(output.max()) <= 1
    assert past.age is not None
    assert 1 <= float(past.age.min()) <= float(past.age.max()) <= MEMORY


def test_an_untrained_network_is_a_running_mean() -> None:
    age = torch.full((1, 1, SIZE[1] // 4, SIZE[0] // 4), 3.0)
    before, now = torch.rand(2, 1, 3, SIZE[1], SIZE[0]) * 0.5 + 0.25
    motion = still()
    output, age, _ = advance(RefinerNet(), now, motion.now, motion.flow, motion.trust, before, age)
    assert torch.allclose(output, 0.75 * before + 0.25 * now, atol=0.01)  # bf16
    assert torch.allclose(age, torch.tensor(4.0), atol=0.05)


def test_the_network_is_small() -> None:
    assert sum(p.numel() for p in RefinerNet().parameters()) <= 400_000


def test_sizes_off_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        load_refiner((100, 64), TorchBackend())


def test_streams_share_a_refiner_and_not_their_past(refiner: LearnedRefiner) -> None:
    mine, theirs, frames = Past(), Past(), [flickering(painting(), seed) for seed in range(1, 5)]
    for i, frame in enumerate(frames):
        output = refiner(frame, still() if i else None, mine)
        refiner(painting(i), still() if i else None, theirs)
    assert torch.equal(output, run(refiner, frames, still())[-1])


def test_openvino_agrees_with_torch(refiner: LearnedRefiner) -> None:
    quick = load_refiner(SIZE, OpenVINOBackend(threads=1))
    pasts = (Past(), Past())
    for seed in range(1, 9):
        frame, motion = flickering(painting(), seed), still(0.9, 0.25) if seed > 1 else None
        one, other = (r(frame, motion, past) for r, past in zip((refiner, quick), pasts, strict=True))
        assert float((one - other).abs().max()) <= PARITY


def test_training_runs_what_the_refiner_runs(refiner: LearnedRefiner) -> None:
    frame, motion = flickering(painting(), 2), still(0.9, 0.25)
    past = Past(flickering(painting(), 1), torch.full((1, 1, SIZE[1] // 4, SIZE[0] // 4), 3.0))
    assert past.output is not None
    assert past.age is not None
    trained, _, _ = advance(read_net(), frame, motion.now, motion.flow, motion.trust, past.output, past.age)
    bare = LearnedRefiner(refiner.engine, Blend(clean=0.0))  # what the rule for noise takes comes after the network
    assert float((bare(frame, motion, past) - trained).abs().max()) <= PARITY
