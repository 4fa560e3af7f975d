"""Train `mini`'s motion adapter: fresh noise for every frame, and yet one picture.

    python -m models.training.motion --work DIR --start models/mini --minutes 25 [--save models/mini]

Needs the tiles; the UNet, its words and the autoencoder are frozen. A sample is a camera move over a tile and over the
same tile painted, so that each frame's painting and the motion are known exactly. Paintings carry textures that repeat
every 8 pixels of the screen (`brushwork`): moves by whole 8 pixels are compared pixel by pixel, others through a box of
8, in which such textures vanish. To a seed belongs a wash (`unet.pigment`); all frames are to wear that of the first,
which a stream keeps in its window for good. A clip that jumps behind its first frames teaches to take the wash from
them and not the content, a share with one noise for all that nothing is to be done where nothing flickers.

One causal pass serves all frames (`rolling.whole_clip`), with the positions of a window of any length. There is one
module, behind the UNet's last resnet: the wash reaches the output through the skip connections of full latent size
alone, and nothing that is done at a lower level can take it back.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import MotionAdapter
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.folder import Folder
from models.motion import MotionUNet
from models.rolling import whole_clip
from models.training.autoencoder import loss_of, tile_sets, to_tensor
from models.training.unet import Parts, ask, paint, pigment, texture

ONLY = ("up_blocks.2.motion_modules.1",)  # of the adapter's modules
POSITIONS = 16
CROP = 128  # pixels
SHAPES = ((6, 4), (4, 6), (3, 8), (2, 12))  # clips and frames of a step: as many pictures in each
KINDS = (0.7, 0.2, 0.1)  # pure noise, a source at some strength, a later step


def new_adapter(channels: tuple[int, ...]) -> MotionAdapter:
    """All the modules that the format has, of which `ONLY` is trained and saved; it starts as doing nothing."""
    adapter = MotionAdapter(
        block_out_channels=channels,
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=16,
        motion_max_seq_length=POSITIONS,
        use_motion_mid_block=False,
    )
    for path in ONLY:
        nn.init.zeros_(adapter.get_submodule(path).proj_out.weight)
        nn.init.zeros_(adapter.get_submodule(path).proj_out.bias)
    return adapter


def save(adapter: MotionAdapter, folder: Path) -> None:
    """Write the trained module in fp16, its path into the configuration; see `networks.Folder.motion_modules`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in adapter.state_dict().items() if k.startswith(ONLY)}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    adapter.save_config(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "only": ONLY}, indent=2) + "\n")


@dataclass
class Clips:
    """B clips of F frames, row by row; pictures (B·F, 3, H, W) in [-1, 1]."""

    source: Tensor
    target: Tensor
    noise: Tensor  # (B·F, C, H/8, W/8)
    corners: NDArray[np.int64]  # (B, F, 2) y, x of each frame in its tile, pixels
    positions: Tensor  # (B, F) in the window
    mask: Tensor  # (B, F, F)
    t: Tensor  # timestep, (B,)
    first: Tensor  # starts from pure noise, (B·F, 1, 1, 1)
    later: Tensor  # starts from a noised target
    words: Tensor  # (B, T, D)
    on_grid: bool  # every move is by whole 8 pixels


def moves(rng: np.random.Generator, frames: int, room: int, on_grid: bool) -> NDArray[np.int64]:
    """The corners of a drifting crop, (F, 2) pixels in [0, room], multiples of 8 on the grid."""
    top = 0.0 if rng.random() < 0.3 else float(rng.choice([0.7, 2.0, 6.0]))  # px per frame
    speed = rng.normal(0, top + 1e-9, 2)
    path = rng.integers(0, room + 1, 2) + np.arange(frames)[:, None] * speed + rng.normal(0, 0.2 * top, (frames, 2))
    if rng.random() < 0.5:  # the first frames are all that is left of an earlier place
        path[: rng.integers(1, max(2, frames // 3) + 1)] += rng.integers(-room, room + 1, 2)
    path = np.abs(path)
    path = room - np.abs(room - path % (2 * room))  # reflected at both ends
    return 8 * (path / 8).round().astype(np.int64) if on_grid else path.round().astype(np.int64)


def places(rng: np.random.Generator, frames: int) -> Tensor:
    """Positions of a clip's frames, (F,): of a stream that has just begun, or a sample of a full window's."""
    if rng.random() < 0.4:
        return torch.arange(frames)
    length = int(rng.integers(frames, POSITIONS + 1))
    between = 1 + np.sort(rng.permutation(length - 2)[: frames - 2])
    return torch.from_numpy(np.concatenate([[0], between, [length - 1]]))


@torch.no_grad()
def draw(parts: Parts, sets: dict[str, NDArray[np.uint8]], rng: np.random.Generator, shape: tuple[int, int]) -> Clips:
    """Random clips; those of one draw are all on the grid of 8 pixels, or all off it."""
    clips, frames = shape
    on_grid, side = bool(rng.random() < 0.5), sets["photo"].shape[1]
    sources, targets, noises, corners, words, kinds, times = [], [], [], [], [], [], []
    for _ in range(clips):
        tile = int(rng.integers(len(sets["photo"])))
        request = replace(ask(rng, tile), captions=("", "")) if rng.random() < 0.03 else ask(rng, tile)
        path = moves(rng, frames, side - CROP, on_grid)
        low, high = path.min(0), path.max(0) + CROP
        extent = int(8 * np.ceil((high - low).max() / 8))
        y, x = (int(min(edge, side - extent)) for edge in low)
        seen = to_tensor(sets["photo"][tile, y : y + extent, x : x + extent])
        painted = paint(sets, request, tile, y, x, extent)
        cuts = [(slice(a - y, a - y + CROP), slice(b - x, b - x + CROP)) for a, b in path.tolist()]
        source = torch.stack([seen[:, a, b] for a, b in cuts])
        grain = rng.choice([0.0, 0.01, 0.03]) * torch.randn_like(source)  # of a camera's sensor

        noise = torch.randn(frames, parts.vae.config["latent_channels"], CROP // 8, CROP // 8)
        if rng.random() < 0.25:
            noise = noise[:1].expand(frames, -1, -1, -1)
        kind = int(rng.choice(3, p=KINDS))
        t = 999 if kind == 0 else 20 * int(rng.integers(1, 40 if kind == 2 else 51)) - 1
        done = (t + 1) / 1000
        done = done + (1 - done) * float(rng.random()) if kind == 2 else done
        wash = pigment(torch.randn_like(noise[:1]) if kind == 2 else noise[:1])
        wash = torch.ones_like(wash) if all(s == "photo" for s in request.styles) else wash
        finished = (torch.stack([painted[:, a, b] for a, b in cuts]) * wash).clamp(0, 1) * 2 - 1
        share = request.weight if request.captions[0] != request.captions[1] else 0.0
        sources.append((source + grain).clamp(-1, 1))
        targets.append(torch.lerp(source, finished, done))
        noises.append(noise)
        corners.append(path)
        words.append(torch.lerp(parts.embed([request.captions[0]]), parts.embed([request.captions[1]]), share))
        kinds.append(kind)
        times.append(t)
    kind_of = torch.tensor(kinds).repeat_interleave(frames).view(-1, 1, 1, 1)
    return Clips(
        torch.cat(sources),
        torch.cat(targets),
        torch.cat(noises),
        np.stack(corners),
        torch.stack([places(rng, frames) for _ in range(clips)]),
        whole_clip(frames, clips)[1].contiguous(),
        torch.tensor(times),
        kind_of == 0,
        kind_of == 2,
        torch.cat(words),
        on_grid,
    )


def pictures(parts: Parts, net: MotionUNet, clips: Clips, scale: float = 1.0) -> Tensor:
    """What the model makes of clips, (B·F, 3, H, W) in [-1, 1]."""
    frames = clips.positions.shape[1]
    signal, sigma = parts.levels(clips.t.repeat_interleave(frames))
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            z_source, z_target = parts.vae.encode(torch.cat([clips.source, clips.target])).latents.float().chunk(2)
        z = signal * torch.where(clips.later, z_target, z_source) + sigma * clips.noise
        z = torch.where(clips.first, clips.noise, z)
        motion = clips.positions, clips.mask, torch.tensor([scale])
        v, *_ = net(torch.cat([z, z_source], 1), clips.t.float(), clips.words, *motion)
        decoded: Tensor = parts.vae.decode(signal * z - sigma * v.float()).sample.float()
    return decoded


def unsteadiness(error: Tensor, corners: NDArray[np.int64]) -> Tensor:
    """How much the error (B·F, 3, H, W) of neighbouring frames differs where they show the same, RMS."""
    clips, frames = corners.shape[:2]
    error = error.unflatten(0, (clips, frames))
    gaps = []
    for clip, path in zip(error, corners, strict=True):
        for i in range(1, frames):
            (y, x), (dy, dx) = clip.shape[2:], (path[i] - path[i - 1]).tolist()
            if abs(dy) <= y // 2 and abs(dx) <= x // 2:  # not a jump
                now = clip[i, :, max(0, -dy) : y - max(0, dy), max(0, -dx) : x - max(0, dx)]
                before = clip[i - 1, :, max(0, dy) : y - max(0, -dy), max(0, dx) : x - max(0, -dx)]
                gaps.append((now - before).square().mean())
    return torch.stack(gaps).add(1e-6).sqrt().mean() if gaps else error.new_zeros(())


def clip_loss(picture: Tensor, clips: Clips) -> tuple[Tensor, Tensor, Tensor]:
    """Distance to the paintings, unsteadiness, and difference of fine-texture energy, which a blur would lose."""
    fine = (texture(picture) - texture(clips.target)).abs().mean()
    error = picture - clips.target
    if clips.on_grid:
        return loss_of(picture, clips.target), unsteadiness(error, clips.corners), fine
    boxed = F.avg_pool2d(picture, 8, 1), F.avg_pool2d(clips.target, 8, 1)
    return loss_of(*boxed), unsteadiness(boxed[0] - boxed[1], clips.corners), fine


@torch.no_grad()
def evaluate(parts: Parts, net: MotionUNet, sets: dict[str, NDArray[np.uint8]], rounds: int = 12) -> str:
    """Distance, unsteadiness and texture difference on held-out tiles, without and with motion."""
    lines = []
    for scale in (0.0, 1.0):
        rng = np.random.default_rng(0)
        torch.manual_seed(0)
        found = []
        for i in range(rounds):
            clips = draw(parts, sets, rng, SHAPES[i % len(SHAPES)])
            found.append(torch.stack(clip_loss(pictures(parts, net, clips, scale), clips)))
        distance, unsteady, fine = torch.stack(found).mean(0).tolist()
        lines.append(f"scale {scale:g}: distance {distance:.4f} unsteadiness {unsteady:.4f} texture {fine:.4f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="holds the tiles; checkpoints go to its motion/")
    parser.add_argument("--start", type=Path, required=True, help="the model's folder")
    parser.add_argument("--minutes", type=float, required=True, help="0: only evaluate and save")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    parser.add_argument("--save", type=Path, help="the model's folder to write motion_adapter/ into when done")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(int(time.time()))
    rng = np.random.default_rng(int(time.time()))
    folder = Folder(args.start)
    text = folder.text()
    parts = Parts(folder.vae(), folder.unet(), folder.text_model(), text._tokenizer, folder.scheduler())
    adapter = new_adapter(tuple(parts.unet.config["block_out_channels"]))
    checkpoint = args.work / "motion" / "adapter.pt"
    checkpoint.parent.mkdir(exist_ok=True)
    if checkpoint.exists():
        adapter.load_state_dict(torch.load(checkpoint))
    net = MotionUNet(parts.unet, adapter, ONLY)
    net.motion.train()
    learned = list(net.motion.parameters())
    print(f"{sum(p.numel() for p in learned) / 1e6:.2f} M parameters", flush=True)
    average = copy.deepcopy(learned)
    optimiser = torch.optim.AdamW(learned, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    sets = tile_sets(args.work, "train")

    def keep() -> None:
        """The moving average into the checkpoint, and back."""
        raw = [p.detach().clone() for p in learned]
        with torch.no_grad():
            torch._foreach_copy_(learned, average)
            torch.save(adapter.state_dict(), checkpoint)
            torch._foreach_copy_(learned, raw)

    start = saved = time.monotonic()
    step, running = 0, torch.zeros(3)
    while args.minutes and (progress := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 1e-6
        clips = draw(parts, sets, rng, SHAPES[rng.integers(len(SHAPES))])
        distance, unsteady, fine = clip_loss(pictures(parts, net, clips), clips)
        optimiser.zero_grad(set_to_none=True)
        (distance + unsteady + 0.25 * fine).backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(average, learned, 1 - min(0.995, step / (step + 20)))
            running += torch.stack([distance, unsteady, fine])
        if step % 50 == 0:
            means = " ".join(f"{v:.4f}" for v in (running / 50).tolist())
            print(f"{progress:.3f} step {step} loss {means} {time.monotonic() - start:.0f} s", flush=True)
            running = torch.zeros(3)
        if time.monotonic() - saved > 120:
            keep()
            saved = time.monotonic()
    keep()
    adapter.load_state_dict(torch.load(checkpoint))
    if args.save:
        save(adapter, args.save / "motion_adapter")
    net.motion.eval()
    print(evaluate(parts, net, tile_sets(args.work, "val")), flush=True)


if __name__ == "__main__":
    main()
