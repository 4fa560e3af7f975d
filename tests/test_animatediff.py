"""A whole clip through our motion UNet equals diffusers' `AnimateDiffVideoToVideoPipeline` (≤ 1e-3 in float32)."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AnimateDiffVideoToVideoPipeline,
    AutoencoderTiny,
    LCMScheduler,
    MotionAdapter,
)
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from models.denoise import Conditioning, Pass, Trajectory, start, stepped
from models.folder import Folder
from models.motion import Motion, MotionModule
from models.networks import Decode, Encode
from models.rolling import Window, Windowed
from models.schedule import Schedule, consistency_schedule
from models.unet import Call, Denoise, Seen
from scripts.random_folder import MODELS, write
from tests.folders import random_folder
from tests.test_published import merged, narrow

FRAMES = 5
SIZE = (48, 32)  # width, height
TOLERANCE = 1e-3
PROMPT, NEGATIVE = "oil painting of a rainy city", "ink"


@pytest.fixture(scope="module", params=[True, False], ids=["v2", "v3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Motion with a mid block, as v2, AnimateLCM and Lightning have it, and without, as v3; AnimateLCM's betas."""
    path = random_folder(tmp_path_factory.mktemp("motion"), "sd")
    torch.manual_seed(1)
    MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=8,
        motion_max_seq_length=32,
        use_motion_mid_block=request.param,
    ).save_pretrained(path / "motion_adapter")
    LCMScheduler(beta_schedule="linear", steps_offset=1).save_pretrained(path / "scheduler")
    return Folder(path)


def clip(frames: int = FRAMES) -> Tensor:
    return torch.rand(frames, 3, SIZE[1], SIZE[0], generator=torch.Generator().manual_seed(7))


class PerFrame(nn.Module):
    """A norm over (B, C, F, H, W) with each frame's own statistics, as v2, v3 and AnimateLCM were trained."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.norm(frame) for frame in x.unbind(2)], 2)


class Pooled(nn.Module):
    """A norm over (F, C, H, W) with the statistics of the whole clip, as in diffusers and as v1 was trained."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.norm(x.movedim(0, 1)[None])[0]
        return pooled.movedim(0, 1)


def renormed(network: Any, kind: type[nn.Module], norm: Callable[[nn.Module], nn.Module]) -> None:
    """Another norm in every motion module."""
    modules = [module for module in network.modules() if isinstance(module, kind)]
    assert modules
    for module in modules:
        module.norm = norm(module.norm)  # type: ignore[assignment, arg-type]


def schedule_of(folder: Folder, steps: int, strength: float = 1.0) -> Schedule:
    return consistency_schedule(folder.scheduler(), steps, strength)


@lru_cache
def pipeline(folder: Folder, *, per_frame: bool) -> Any:
    path = folder.path
    found = AnimateDiffVideoToVideoPipeline(
        vae=AutoencoderTiny.from_pretrained(path / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(path / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(path / "tokenizer"),
        unet=merged(path),
        motion_adapter=MotionAdapter.from_pretrained(path / "motion_adapter"),
        scheduler=LCMScheduler.from_config(json.loads((path / "scheduler" / "scheduler_config.json").read_text())),
    )
    found.set_progress_bar_config(disable=True)
    if per_frame:
        renormed(found.unet, AnimateDiffTransformer3D, PerFrame)
    return found


def theirs(
    folder: Folder, schedule: Schedule, guidance: float, frames: int = FRAMES, *, per_frame: bool = True
) -> Tensor:
    """diffusers' own pipeline, pictures (F, 3, H, W); told our timesteps, since it knows LCM's `strength` not."""
    return pipeline(folder, per_frame=per_frame)(
        video=[list(clip(frames))],
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        width=SIZE[0],
        height=SIZE[1],
        timesteps=[step.t for step in schedule.steps],
        strength=1.0,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).frames[0]


@torch.inference_mode()
def ours(
    folder: Folder,
    schedule: Schedule,
    guidance: float,
    frames: int = FRAMES,
    *,
    pooled: bool = False,
    scale: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """The clip as one block of our window (or in chunks), through the graph and the memory that streams go through."""
    vae, text = folder.vae(), folder.text()
    source = Encode(vae)(clip(frames))  # (F, C, h, w)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(source.shape, generator=generator)
    others = [  # of the steps after the first, drawn channel by channel there
        torch.randn(1, source.shape[1], frames, *source.shape[2:], generator=generator)[0].movedim(0, 1)
        for _ in schedule.steps[1:]
    ]
    cond = Conditioning((text.embed(PROMPT),), (text.embed(NEGATIVE),), guidance=guidance)
    words = {Pass.WANTED: cond.words[0], Pass.NEGATIVE: cond.negative[0]}

    window = Window(sinks=0, ring=frames, chunk=chunk or frames)
    motion = Motion(folder, (source.shape[2], source.shape[3]), window)
    names = ["z", "t", "words", *(spec.name for spec in motion.inputs)]
    unet = Denoise(folder.unet(), names, [motion]).eval()
    if pooled:
        renormed(unet, MotionModule, Pooled)
    steps = len(schedule.steps)
    memory, seen = Windowed(motion, window, cond.rows(steps)), Seen(None, {"motion_scale": scale})

    def network(z: Tensor, k: int, kind: Pass) -> Tensor:
        row, t = k + kind * steps, torch.tensor([float(schedule.steps[k].t)])
        call = Call(z, t, words[kind], range(row, row + 1), (k,), steps, (seen,))
        given = {"z": call.z, "t": call.t, "words": call.words} | memory.inputs(call)
        output, *new = unet(*(given[name] for name in names))
        memory.keep(call, dict(zip((spec.name for spec in motion.outputs), new, strict=True)))
        return output

    outputs = []
    for part, first, *more in zip(*(x.split(window.chunk) for x in (source, noise, *others)), strict=True):
        z = start(part, first, schedule.steps[0], pure=False)
        frame = Trajectory(z, schedule, cond, tuple(more))
        for k in range(steps):
            frame = stepped(frame, k, {kind: network(frame.z, k, kind) for kind in cond.asked(k)})
        outputs.append(frame.z)
    return Decode(vae, as_bytes=False)(torch.cat(outputs))


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_clip_as_one_block_equals_diffusers(folder: Folder, steps: int, guidance: float) -> None:
    schedule = schedule_of(folder, steps)
    found = ours(folder, schedule, guidance)
    assert found.std() > 0.02  # else anything equals anything
    assert (found - theirs(folder, schedule, guidance)).abs().max() <= TOLERANCE


def test_also_when_the_clip_itself_shows_through(folder: Folder) -> None:
    schedule = schedule_of(folder, 2, strength=0.5)
    assert (ours(folder, schedule, 2.0) - theirs(folder, schedule, 2.0)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_single_frame_equals_unchanged_diffusers(folder: Folder, guidance: float) -> None:
    schedule = schedule_of(folder, 2)
    expected = theirs(folder, schedule, guidance, frames=1, per_frame=False)
    assert (ours(folder, schedule, guidance, frames=1) - expected).abs().max() <= TOLERANCE


def test_the_norms_statistics_are_all_that_differs_from_unchanged_diffusers(folder: Folder) -> None:
    """diffusers pools them over the clip, as only v1 was trained; a stream cannot know frames to come."""
    schedule = schedule_of(folder, 2)
    expected = theirs(folder, schedule, 1.0, per_frame=False)
    assert (ours(folder, schedule, 1.0, pooled=True) - expected).abs().max() <= TOLERANCE
    difference = float((ours(folder, schedule, 1.0) - expected).abs().max())
    print(f"largest difference by the norm alone: {difference:.4f}")
    assert difference > 5 * TOLERANCE


def test_the_comparison_would_notice(folder: Folder) -> None:
    """No motion at all, or frames that see only those before them, are other pictures."""
    schedule = schedule_of(folder, 2)
    found = ours(folder, schedule, 1.0)
    assert (ours(folder, schedule, 1.0, scale=0.0) - found).abs().max() > 20 * TOLERANCE
    assert (ours(folder, schedule, 1.0, chunk=1) - found).abs().max() > 5 * TOLERANCE


def test_a_narrow_twin_of_the_published_model(tmp_path: Path) -> None:
    """AnimateLCM's layout, LoRA and schedule, as `livestyle fetch` puts them together; a tenth of the width."""
    folder = Folder(write(narrow(MODELS["animatediff-lcm"]), tmp_path, torch.float32))
    schedule = schedule_of(folder, 2)
    found = ours(folder, schedule, 1.5, frames=3)
    assert (found - theirs(folder, schedule, 1.5, frames=3)).abs().max() <= TOLERANCE
    assert (ours(folder, schedule, 1.5, frames=3, scale=0.0) - found).abs().max() > 5 * TOLERANCE
