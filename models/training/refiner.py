"""Train the learned refiner; nothing is labelled.

    python -m models.training.refiner --work DIR --clips CLIPS --minutes 20 [--save FOLDER]

CLIPS holds `NAME.src.npy` and, painted by a fixed-seed stylizer, `NAME.STYLE.npy`, both (T, H, W, 3) uint8. The work
folder holds the tiles of `models.training.tiles`. See `models.training.flickering` for what is made of them.

The net runs recurrently over four frames at a time, and what it remembers is carried on from one step to the next
without its gradient. Losses: RMSE and image gradients to the truth, the short-term loss of Lai et al. 2018 along the
trusted motion, and a guard of fine detail against smoothing.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import cv2
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from models.refiner import CELL, WEIGHTS, RefinerNet, read_net, travelled
from models.reproject import GUIDE
from models.training.autoencoder import gradients, tile_sets
from models.training.flickering import CROP, LENGTH, Sequence, Sequences, read_clips

BATCH, WINDOW = 5, 4  # sequences at once; frames that gradients flow back through


def carried(picture: Tensor, flow: Tensor, *, sharp: bool) -> Tensor:
    """`models.filters.warp` (sharp) or `sample` for a batch, with gradients."""
    height, width = flow.shape[2:]
    size = torch.tensor([width, height]).view(2, 1, 1)
    places = flow + torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"))

    def look(places: Tensor, how: str) -> Tensor:
        return F.grid_sample(picture, ((places * 2 + 1) / size - 1).permute(0, 2, 3, 1), how, "border", False)

    if not sharp:
        return look(places, "bilinear")
    part = places - places.floor()
    return torch.lerp(look(places, "bicubic"), look(places.floor() + part * part * (3 - 2 * part), "bilinear"), 1 / 3)


def advance(
    net: nn.Module, stylized: Tensor, source: Tensor, flow: Tensor, trust: Tensor, output: Tensor, age: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One frame of `LearnedRefiner` for a batch: output, age, and the carried output it started from."""
    past = carried(output, GUIDE * enlarged(flow, GUIDE), sharp=True)
    apart = past - stylized
    cells = F.avg_pool2d(apart, CELL)
    flow = F.avg_pool2d(flow, CELL // GUIDE)
    age = carried(age, flow * (GUIDE / CELL), sharp=False)
    rows = (picture.permute(0, 2, 3, 1) for picture in (stylized, apart))
    with torch.autocast("cpu", torch.bfloat16):
        move, age = net(*rows, cells, source, trust, travelled(GUIDE * flow), age)
    move = enlarged(move.float(), CELL)
    return (stylized + move[:, :3] + move[:, 3:] * apart).clamp(0, 1), age.float(), past


def enlarged(field: Tensor, times: int) -> Tensor:
    return F.interpolate(field, scale_factor=float(times), mode="bilinear")


def detail(picture: Tensor) -> Tensor:
    """Mean |Laplacian| per picture, (B,)."""
    lap = 4 * picture[..., 1:-1, 1:-1] - picture[..., 2:, 1:-1] - picture[..., :-2, 1:-1]
    return (lap - picture[..., 1:-1, 2:] - picture[..., 1:-1, :-2]).abs().mean((1, 2, 3))


def loss_of(output: Tensor, truth: Tensor, past: Tensor, trust: Tensor, steadiness: float = 0.3) -> Tensor:
    """RMSE and gradients to the truth, steadiness along the motion, and the detail's logarithmic ratio."""
    rmse = (output - truth).square().mean((1, 2, 3)).add(1e-6).sqrt().mean()
    edges = sum((a - b).abs().mean() for a, b in zip(gradients(output), gradients(truth), strict=True))
    steady = (enlarged(trust, GUIDE) * (output - past.detach()).abs()).mean()
    guard = torch.log((detail(output) + 0.004) / (detail(truth) + 0.004)).abs().mean()
    return rmse + 0.5 * edges + steadiness * steady + 0.02 * guard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--steadiness", type=float, default=0.3, help="weight of the short-term loss")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--mean-with", type=Path, help="weights whose mean with the new ones is saved")
    parser.add_argument("--save", type=Path, default=WEIGHTS.parent)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    net = read_net(args.start).requires_grad_(True) if args.start else RefinerNet()
    net.to(memory_format=torch.channels_last)
    average = copy.deepcopy(net)
    optimiser = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    dataset = Sequences(read_clips(args.clips), tile_sets(args.work, "train"))
    source = iter(DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=4))
    running: list[Sequence] = [next(source) for _ in range(BATCH)]
    for i, sequence in enumerate(running):
        sequence.at = 8 * i  # out of step with each other
    outputs, ages = [s.stylized[s.at] for s in running], [torch.ones(1, CROP // CELL, CROP // CELL)] * BATCH
    start = saved = time.monotonic()
    step, total = 0, 0.0
    while (progress := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        for i, sequence in enumerate(running):
            if sequence.at + WINDOW >= LENGTH:
                running[i] = next(source)
                outputs[i], ages[i] = running[i].stylized[0], torch.ones_like(ages[i])
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 1e-6
        output, age = torch.stack(outputs), torch.stack(ages)
        loss = torch.zeros(())
        for _ in range(WINDOW):
            flow, trust = (torch.stack([getattr(s, name)[s.at] for s in running]) for name in ("flow", "trust"))
            for sequence in running:
                sequence.at += 1
            names = ("stylized", "truth", "source")
            stylized, truth, seen = (torch.stack([getattr(s, name)[s.at] for s in running]) for name in names)
            output, age, past = advance(net, stylized, seen, flow, trust, output, age)
            loss = loss + loss_of(output, truth, past, trust, args.steadiness) / WINDOW
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        outputs, ages = list(output.detach()), list(age.detach())
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - min(0.99, step / (step + 20)))
        total += float(loss.detach())
        if step % 50 == 0:
            print(f"{progress:.3f} step {step} loss {total / 50:.5f} {time.monotonic() - start:.0f} s", flush=True)
            total = 0.0
        if time.monotonic() - saved > 120:
            save(average, args.work / "refiner.safetensors")
            saved = time.monotonic()
    if args.mean_with:
        with torch.no_grad():
            others = list(read_net(args.mean_with).parameters())
            torch._foreach_lerp_(list(average.parameters()), others, 0.5)
    save(average, args.save / WEIGHTS.name)


def save(net: nn.Module, path: Path) -> None:
    """float16, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.half().contiguous() for name, tensor in net.state_dict().items()}, path.with_suffix(".part")
    )
    path.with_suffix(".part").rename(path)


if __name__ == "__main__":
    main()
