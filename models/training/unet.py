"""Train `mini`'s UNet and text encoder: photograph + words + noise → the painter's picture, in one step or several.

    python -m models.training.unet --work DIR --minutes 60 [--crop 256 --batch 3] [--save models/mini]

Needs the tiles and the autoencoder. Each sample asks for one or two styles in words and is one of three cases:

first step, pure noise    z = ε                             target: the painting
first step at strength s  z = √ᾱ·source + √(1-ᾱ)·ε          target: source and painting mixed by s
a later step              z = √ᾱ·target + √(1-ᾱ)·ε          target: itself (more or less finished)

The seed is the pigment: a slow field taken from ε tints the target of a first step, so that the net learns that other
noise means another wash, not an average of all. The network predicts v (Salimans & Ho 2022). The loss is on decoded
pixels: RMSE and image gradients as for the autoencoder, and the local energy of fine texture, which plain distances
would average away.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.autoencoder import PatchAutoencoder
from models.training.autoencoder import loss_of, psnr, tile_sets, to_tensor
from models.training.captions import BOLD_WORDS, FINE_WORDS, NAMES, TONES, corpus, sentence
from models.training.tones import tone

TOKENS, WIDTH = 24, 96  # prompt length and width of the text encoder
STYLES = tuple(NAMES)
KINDS = (0.6, 0.2, 0.2)  # shares of the three cases of a sample


def new_unet(latent_channels: int) -> UNet2DConditionModel:
    """The miniature: three levels, attention at the lowest only, the prompt also modulating every block (FiLM)."""
    return UNet2DConditionModel(
        sample_size=(36, 64),
        in_channels=2 * latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels=(96, 96, 128),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads: head size 32
        norm_num_groups=16,
        use_linear_projection=True,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def new_scheduler() -> LCMScheduler:
    return LCMScheduler(
        prediction_type="v_prediction", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )


def new_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair vocabulary holds every word of `captions` whole."""
    shape = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = shape.normalizer, shape.pre_tokenizer
    letters = [chr(c) for c in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=1400, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    learner.train_from_iterator(corpus() * 20, trainer)
    learned = json.loads(learner.to_str())["model"]
    vocab = dict(learned["vocab"])
    for symbol in [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]:
        vocab.setdefault(symbol, len(vocab))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pigment(noise: Tensor) -> Tensor:
    """The wash that a seed stands for: (B, 3, H, W) gains around 1 from a slow field of the noise (B, C, H/8, W/8)."""
    kernel = torch.hann_window(9, periodic=False)[1:-1]
    kernel = torch.outer(kernel, kernel)[None, None]
    groups = torch.stack([noise[:, 0:3].sum(1), noise[:, 3:6].sum(1)], 1)
    weight = F.conv2d(torch.ones_like(groups[:1, :1]), kernel.square(), padding=3).sqrt() * math.sqrt(3)
    fields = F.conv2d(groups, kernel.expand(2, 1, -1, -1), padding=3, groups=2) / weight  # unit variance
    fields = F.interpolate(fields, scale_factor=8, mode="bilinear")
    return 1 + 0.04 * fields[:, :1] + 0.025 * fields[:, 1:] * torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1)


@dataclass
class Request:
    """What one training sample asks for."""

    captions: tuple[str, str]
    weight: float  # of the second caption's style
    styles: tuple[str, str]
    tones: list[str]
    suffix: str  # "" or "_alt"


def ask(rng: np.random.Generator, tile: int) -> Request:
    """Draw styles, adjectives and a sentence for a tile (even tiles have bold strokes rendered, odd ones fine)."""
    a, b = (STYLES[i] for i in rng.integers(len(STYLES), size=2))
    tones = [str(t) for t in rng.permutation(list(TONES))[: rng.choice([0, 1, 2], p=[0.7, 0.24, 0.06])]]
    strokes = rng.random() < 0.25
    words = [str(rng.choice(TONES[t])) for t in tones]
    words += [str(rng.choice(FINE_WORDS if tile % 2 else BOLD_WORDS))] if strokes else []
    case, suffix = rng.random(), "_alt" if strokes else ""
    if case < 0.05:
        return Request(("", ""), 0.0, ("photo", "photo"), [], "")
    first = sentence(a, words, rng)
    if case < 0.80:
        return Request((first, first), 0.0, (a, a), tones, suffix)
    if case < 0.87:
        both = f"{first} and {rng.choice(NAMES[b])}"
        return Request((both, both), 0.5, (a, b), tones, suffix)
    return Request((first, sentence(b, words, rng)), float(rng.uniform(0.15, 0.85)), (a, b), tones, suffix)


def paint(sets: dict[str, NDArray[np.uint8]], request: Request, tile: int, y: int, x: int, crop: int) -> Tensor:
    """The painting a request asks for, (3, crop, crop) in [0, 1]."""

    def cut(style: str) -> Tensor:
        name = style if style == "photo" else style + request.suffix
        return (to_tensor(sets[name][tile, y : y + crop, x : x + crop]) + 1) / 2

    painted = cut(request.styles[0])
    if request.weight:
        painted = torch.lerp(painted, cut(request.styles[1]), request.weight)
    for name in request.tones:
        painted = tone(painted[None], name)[0]
    return painted


def texture(x: Tensor) -> Tensor:
    """Local standard deviation of the fine detail, over 8×8 blocks."""
    fine = x - F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), 5, 1)
    return F.avg_pool2d(fine.square(), 8).add(1e-4).sqrt()


@dataclass
class Parts:
    """The networks and tables of the model in training."""

    vae: PatchAutoencoder
    unet: UNet2DConditionModel
    text: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: LCMScheduler

    def tokens(self, captions: list[str]) -> Tensor:
        return self.tokenizer(
            captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids

    def embed(self, captions: list[str]) -> Tensor:
        return self.text(self.tokens(captions))[0]

    def x0(self, z: Tensor, t: Tensor, source: Tensor, words: Tensor) -> Tensor:
        v = self.unet(torch.cat([z, source], 1), t, words, return_dict=False)[0].float()
        signal, noise = self.levels(t)
        return signal * z - noise * v

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1-ᾱ) at whole timesteps, (B, 1, 1, 1)."""
        level = self.scheduler.alphas_cumprod[t.long()].view(-1, 1, 1, 1)
        return level.sqrt(), (1 - level).sqrt()


@dataclass
class Batch:
    """Random training samples: pictures (B, 3, H, W) in [-1, 1], latents (B, C, H/8, W/8), the rest (B, 1, 1, 1)."""

    source: Tensor
    painted: Tensor
    noise: Tensor
    pigment: Tensor  # gains around 1, (B, 3, H, W)
    t: Tensor  # timestep, (B,)
    first: Tensor  # the net starts from pure noise
    later: Tensor  # the net starts from a noised painting instead of a noised source
    done: Tensor  # how far from the source to the painting the target lies
    ids: tuple[Tensor, Tensor]  # tokens of the two captions, (B, TOKENS)
    share: Tensor  # of the second caption


def draw(parts: Parts, sets: dict[str, NDArray[np.uint8]], rng: np.random.Generator, batch: int, crop: int) -> Batch:
    """One random batch."""
    tiles = rng.integers(len(sets["photo"]), size=batch)
    corners = 8 * rng.integers(0, (sets["photo"].shape[1] - crop) // 8 + 1, size=(batch, 2))
    requests = [ask(rng, int(tile)) for tile in tiles]
    source = torch.stack(
        [to_tensor(sets["photo"][i, y : y + crop, x : x + crop]) for i, (y, x) in zip(tiles, corners, strict=True)]
    )
    painted = torch.stack(
        [paint(sets, r, int(i), y, x, crop) for r, i, (y, x) in zip(requests, tiles, corners, strict=True)]
    )
    noise = torch.randn(batch, parts.vae.config["latent_channels"], crop // 8, crop // 8)
    kind = torch.from_numpy(rng.choice(3, size=batch, p=KINDS)).view(-1, 1, 1, 1)
    t = torch.from_numpy(20 * rng.integers(1, np.where(kind.flatten() == 2, 40, 51)) - 1)  # a later step is below 800
    t[kind.flatten() == 0] = 999
    done = (t.view(-1, 1, 1, 1) + 1) / 1000
    done = torch.where(kind == 2, done + (1 - done) * torch.rand(batch, 1, 1, 1), done)  # at least as far as its own t
    gains = pigment(torch.where(kind == 2, torch.randn_like(noise), noise))
    plain = torch.tensor([all(s == "photo" for s in r.styles) for r in requests]).view(-1, 1, 1, 1)
    share = torch.tensor([r.weight if r.captions[0] != r.captions[1] else 0.0 for r in requests])
    return Batch(
        source,
        painted,
        noise,
        torch.where(plain, torch.ones_like(gains), gains),
        t,
        kind == 0,
        kind == 2,
        done,
        (parts.tokens([r.captions[0] for r in requests]), parts.tokens([r.captions[1] for r in requests])),
        share.view(-1, 1, 1),
    )


def batch_loss(parts: Parts, batch: Batch) -> Tensor:
    """The loss of one batch, in bfloat16 where the arithmetic allows it."""
    target = torch.lerp(batch.source, (batch.painted * batch.pigment).clamp(0, 1) * 2 - 1, batch.done)
    signal, sigma = parts.levels(batch.t)
    words = torch.lerp(parts.text(batch.ids[0])[0], parts.text(batch.ids[1])[0], batch.share)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            z_source, z_target = parts.vae.encode(torch.cat([batch.source, target])).latents.float().chunk(2)
        start = torch.where(batch.later, z_target, z_source)
        z = torch.where(batch.first, batch.noise, signal * start + sigma * batch.noise)
        x0 = parts.x0(z, batch.t, z_source, words)
        picture = parts.vae.decode(x0).sample.float()
    fine = (texture(picture) - texture(target)).abs().mean()
    return loss_of(picture, target) + 0.1 * (x0 - z_target).square().mean((1, 2, 3)).sqrt().mean() + 0.25 * fine


@torch.no_grad()
def evaluate(parts: Parts, sets: dict[str, NDArray[np.uint8]], most: int = 29) -> dict[str, tuple[float, float, float]]:
    """Held-out dB per style: one step against the painting in its seed's pigment, against the plain one, the ceiling.

    The ceiling is the autoencoder's own reconstruction of the plain painting.
    """
    scores = {}
    for style in STYLES:
        rows = []
        for i in range(0, min(most, len(sets["photo"])), 4):
            source, plain = to_tensor(sets["photo"][i : i + 4]), to_tensor(sets[style][i : i + 4])
            noise = torch.randn(1, parts.vae.config["latent_channels"], *(s // 8 for s in source.shape[2:])).expand(
                len(source), -1, -1, -1
            )
            tinted = plain if style == "photo" else (((plain + 1) / 2 * pigment(noise)).clamp(0, 1)) * 2 - 1
            with torch.autocast("cpu", torch.bfloat16):
                words = parts.embed([NAMES[style][0]]).expand(len(source), -1, -1)
                t = torch.full((len(source),), 999)
                picture = parts.vae.decode(
                    parts.x0(noise, t, parts.vae.encode(source).latents.float(), words)
                ).sample.float()
                again = parts.vae(plain).float()
            rows.append(torch.stack([psnr(picture, tinted), psnr(picture, plain), psnr(again, plain)], 1))
        scores[style] = tuple(torch.cat(rows).mean(0).tolist())
    return scores


def report(scores: dict[str, tuple[float, float, float]]) -> str:
    """The scores as a Markdown table with their averages over painted styles."""
    painted = [v for k, v in scores.items() if k != "photo"]
    mean = tuple(sum(v[i] for v in painted) / len(painted) for i in range(3))
    lines = ["| style | one step, seed's pigment | one step, plain | autoencoder |", "|---|---|---|---|"]
    for name, row in [*scores.items(), ("**mean, painted**", mean)]:
        lines.append(f"| {name} | " + " | ".join(f"{v:.1f}" for v in row) + " |")
    return "\n".join(lines)


def save(parts: Parts, folder: Path) -> None:
    """Write a diffusers-format folder with fp16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(parts.vae).half().save_pretrained(folder / "vae")
    copy.deepcopy(parts.unet).half().save_pretrained(folder / "unet")
    copy.deepcopy(parts.text).half().save_pretrained(folder / "text_encoder")
    parts.tokenizer.save_pretrained(folder / "tokenizer")
    parts.scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionInstructPix2PixPipeline",
        "vae": ["models.autoencoder", "PatchAutoencoder"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "LCMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    words = {
        "styles": {k: list(v) for k, v in NAMES.items()},
        "words": sorted({w for p in corpus() for w in p.split() if w.isalpha()}),
    }
    (folder / "styles.json").write_text(json.dumps(words, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="0: only evaluate and save")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lr-end", type=float, default=1e-5)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--save", type=Path, help="write a diffusers folder when done")
    parser.add_argument(
        "--start", type=Path, help="folder of an earlier model to go on from, where there is no checkpoint"
    )
    args = parser.parse_args()
    torch.manual_seed(int(time.time()))
    rng = np.random.default_rng(int(time.time()))
    vae = (
        PatchAutoencoder.from_pretrained(args.work / "vae")
        .requires_grad_(False)
        .eval()
        .to(memory_format=torch.channels_last)
    )
    tokenizer = new_tokenizer()
    unet = new_unet(vae.config["latent_channels"]).to(memory_format=torch.channels_last)
    parts = Parts(vae, unet, new_text_encoder(tokenizer), tokenizer, new_scheduler())
    learned = nn.ModuleDict({"unet": unet, "text": parts.text})
    print(
        {k: f"{sum(p.numel() for p in m.parameters()) / 1e6:.2f} M" for k, m in learned.items()},
        len(tokenizer),
        "tokens",
        flush=True,
    )
    checkpoint = args.work / "unet.pt"
    if checkpoint.exists():
        learned.load_state_dict(torch.load(checkpoint))
    elif args.start:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(args.start / "unet").float().state_dict())
        parts.text.load_state_dict(CLIPTextModel.from_pretrained(args.start / "text_encoder").float().state_dict())
    average = copy.deepcopy(learned)
    optimiser = torch.optim.AdamW(learned.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    sets = tile_sets(args.work, "train")
    compiled_loss = torch.compile(batch_loss)
    compiled_loss(parts, draw(parts, sets, rng, args.batch, args.crop)).backward()  # minutes, before the clock starts
    start = saved = time.monotonic()
    step, running = 0, 0.0
    while args.minutes and (progress := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = args.lr_end + (args.lr - args.lr_end) * min(1, (step + 1) / 300) * (
                0.5 + 0.5 * math.cos(math.pi * progress)
            )
        optimiser.zero_grad(set_to_none=True)
        loss = compiled_loss(parts, draw(parts, sets, rng, args.batch, args.crop))
        loss.backward()
        nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            decay = min(0.999, step / (step + 50))
            torch._foreach_lerp_(list(average.parameters()), list(learned.parameters()), 1 - decay)
        running += float(loss.detach())
        if step % 200 == 0:
            print(f"{progress:.3f} step {step} loss {running / 200:.4f} {time.monotonic() - start:.0f} s", flush=True)
            running = 0.0
        if time.monotonic() - saved > 180:
            torch.save(average.state_dict(), checkpoint)
            saved = time.monotonic()
    torch.save(average.state_dict(), checkpoint)
    parts.unet, parts.text = average["unet"].eval(), average["text"].eval()
    if args.save:
        save(parts, args.save)
    print(report(evaluate(parts, tile_sets(args.work, "val"))), flush=True)


if __name__ == "__main__":
    main()
