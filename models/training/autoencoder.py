"""Train `mini`'s autoencoder on photographs and painted pictures.

    python -m models.training.autoencoder --work DIR --minutes 20 --final

Reads the tiles made by `models.training.tiles`; styles that are not rendered yet are picked up when they appear.
The loss is the per-picture RMSE (what PSNR is about) plus the L1 distance of image gradients (edges stay sharp).
Writes `autoencoder.pt` (weights and their moving average) to the work folder every two minutes and continues from it.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.autoencoder import PatchAutoencoder

LATENT_NOISE = 0.02  # σ of the noise added to latents in training, so that the decoder forgives a denoiser's errors
CROP, BATCH = 128, 12


def tile_sets(work: Path, split: str) -> dict[str, NDArray[np.uint8]]:
    """Every rendered array of a split, by style name (`NAME_alt` for other stroke widths)."""
    return {p.stem.removeprefix(f"{split}_"): np.load(p, mmap_mode="r") for p in sorted(work.glob(f"{split}_*.npy"))}


def to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """(…, H, W, 3) uint8 → (…, 3, H, W) float in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, -3).float() / 127.5 - 1


def crops(sets: dict[str, NDArray[np.uint8]], rng: np.random.Generator, batch: int = BATCH, crop: int = CROP) -> Tensor:
    """Random crops: a third photographs, the rest over all painted sets, flipped and colour-shifted."""
    out = np.empty((batch, crop, crop, 3), np.uint8)
    painted = [k for k in sets if k != "photo"]
    for i in range(batch):
        tiles = sets["photo" if not painted or i % 3 == 0 else painted[rng.integers(len(painted))]]
        y, x = rng.integers(0, tiles.shape[1] - crop, 2)
        tile = tiles[rng.integers(len(tiles)), y : y + crop, x : x + crop]
        out[i] = tile[:, ::-1] if rng.random() < 0.5 else tile
    pictures = to_tensor(out)
    gain = torch.from_numpy(rng.uniform(0.8, 1.1, (batch, 3, 1, 1)).astype(np.float32))
    return (pictures * gain).clamp(-1, 1)


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """Mean per-picture RMSE + L1 of image gradients, [-1, 1] units."""
    rmse = (output - target).square().mean((1, 2, 3)).add(1e-6).sqrt().mean()
    edges = sum((a - b).abs().mean() for a, b in zip(gradients(output), gradients(target), strict=True))
    return rmse + 0.25 * edges


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Per-picture PSNR in dB of pictures in [-1, 1], (B,)."""
    return -10 * torch.log10(((output.clamp(-1, 1) - target) / 2).square().mean((1, 2, 3)))


@torch.no_grad()
def evaluate(model: nn.Module, sets: dict[str, NDArray[np.uint8]], most: int = 29) -> dict[str, float]:
    """Mean held-out PSNR per style, dB."""
    scores = {}
    for name, tiles in sets.items():
        batches = [to_tensor(tiles[i : i + 4]) for i in range(0, min(most, len(tiles)), 4)]
        scores[name] = float(torch.cat([psnr(model(b), b) for b in batches]).mean())
    return scores


@torch.no_grad()
def normalise_latents(model: PatchAutoencoder, sets: dict[str, NDArray[np.uint8]], rng: np.random.Generator) -> None:
    """Fold a per-channel scale and shift into the networks, so that latents have zero mean and unit variance."""
    z = torch.cat([model.encode(crops(sets, rng)).latents for _ in range(40)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    last, first = model.encoder[-1], model.decoder[0]
    last.weight.div_(std[:, None, None, None])
    last.bias.sub_(mean).div_(std)
    # the decoder's first convolution pads with zeros, which now mean the average latent: only interior pixels are exact
    first.bias.add_((first.weight * mean[None, :, None, None]).sum((1, 2, 3)))
    first.weight.mul_(std[None, :, None, None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--final", action="store_true", help="normalise the latents and save a diffusers folder")
    parser.add_argument("--like", type=Path, help="folder of an autoencoder whose latents are to be kept")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(int(time.time()))
    model = PatchAutoencoder().to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    checkpoint = args.work / "autoencoder.pt"
    if checkpoint.exists():
        model.load_state_dict(torch.load(checkpoint)["average"])
    teacher = PatchAutoencoder.from_pretrained(args.like).eval().requires_grad_(False) if args.like else None
    average = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    start = saved = time.monotonic()
    step, running, sets = 0, 0.0, tile_sets(args.work, "train")
    while (progress := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 1e-6
        target = crops(sets, rng).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            z = model.encode(target).latents
            output = model.decode(z + LATENT_NOISE * z.detach().std() * torch.randn_like(z)).sample.float()
            loss = loss_of(output, target)
            if teacher:
                with torch.no_grad():
                    wanted = teacher.encode(target).latents
                loss = loss + 0.3 * (z.float() - wanted.float()).square().mean((1, 2, 3)).sqrt().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            decay = min(0.998, step / (step + 100))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running += float(loss.detach())
        if step % 500 == 0:
            print(f"{progress:.3f} step {step} loss {running / 500:.4f} {time.monotonic() - start:.0f} s", flush=True)
            running, sets = 0.0, tile_sets(args.work, "train")
        if time.monotonic() - saved > 120 or progress > 0.999:
            torch.save({"average": average.state_dict()}, checkpoint)
            saved = time.monotonic()
    torch.save({"average": average.state_dict()}, checkpoint)
    if args.final:
        if teacher is None:
            normalise_latents(average, sets, rng)
        average.to(memory_format=torch.contiguous_format).save_pretrained(args.work / "vae")
    scores = evaluate(average, tile_sets(args.work, "val"))
    print({k: round(v, 2) for k, v in scores.items()}, flush=True)


if __name__ == "__main__":
    main()
