"""Flickering sequences whose truth is known: what the learned refiner is trained on.

Clips and stills that our own stylizer and painters have painted; nothing is labelled. A sequence is one of two kinds:

clip    a crop of a painted clip; the motion is what the product's own flow makes of the source, mistakes and all
still   a photograph and its painting under one camera path, often with a second picture passing in front (the fake flow
        of ReReVST, Wang et al. 2020, with real occlusion)

Synthetic flicker is put on top: noise on coarse and fine grids, fresh or correlated in time, washes, tint, a pixel or
two of jitter. A fifth of the sequences get none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from models.filters import halved
from models.flow import Dis
from models.reproject import GUIDE, Guide
from models.training.tiles import HELD_OUT_CLIPS

CROP = 160  # pixels
LENGTH = 41  # frames of a sequence: the first, and ten windows of four
Pixels = NDArray[np.uint8]  # (T, H, W, 3)
Field = NDArray[np.float16]


@dataclass(slots=True)
class Sequence:
    """A painted clip with and without flicker, the motion of its source, and how far training has come in it."""

    truth: Tensor  # (T, 3, H, W)
    stylized: Tensor  # (T, 3, H, W)
    source: Tensor  # (T, 3, H/2, W/2)
    flow: Tensor  # (T - 1, 2, H/2, W/2)
    trust: Tensor  # (T - 1, 1, H/2, W/2)
    at: int = 0


@dataclass(frozen=True, slots=True)
class Followed:
    """A source clip as the product sees it, at guide size."""

    source: Field  # (T, 3, h, w)
    flow: Field  # (T - 1, 2, h, w)
    trust: Field  # (T - 1, 1, h, w)


def follow(source: Pixels) -> Followed:
    guide, seen, motions = Guide(Dis()), [], []
    for frame in source:
        motion = guide.advance(halved(frame))
        seen.append(guide.frame)
        motions += [motion] if motion else []
    fields = seen, [m.flow for m in motions], [m.trust for m in motions]
    return Followed(*(torch.cat(field).contiguous().half().numpy() for field in fields))


Clip = tuple[list[Pixels], Followed]  # all paintings of a source, itself among them


def read_clips(folder: Path) -> list[Clip]:
    """Every clip that is not held out: as it is, backwards, and at twice its speed."""
    clips = []
    for path in sorted(folder.glob("*.src.npy")):
        name = path.name.removesuffix(".src.npy")
        if f"{name}.mp4" in HELD_OUT_CLIPS:
            continue
        sets = [np.load(p) for p in sorted(folder.glob(f"{name}.*.npy"))]
        source = np.load(path)
        for order in (slice(None), slice(None, None, -1), slice(None, None, 2)):
            clips.append(([s[order] for s in sets], follow(source[order])))
    return clips


def clip_sequence(clips: list[Clip], rng: np.random.Generator) -> Sequence:
    paintings, seen = clips[rng.integers(len(clips))]
    painted = paintings[rng.integers(len(paintings))]
    start = int(rng.integers(len(painted) - LENGTH + 1))
    y, x = (8 * int(rng.integers((room - CROP) // 8 + 1)) for room in painted.shape[1:3])
    inside = (..., slice(y // GUIDE, (y + CROP) // GUIDE), slice(x // GUIDE, (x + CROP) // GUIDE))
    flow, trust = (field[start : start + LENGTH - 1][inside] for field in (seen.flow, seen.trust))
    side = CROP // GUIDE
    places = flow.astype(np.float32) + np.mgrid[:side, :side][::-1]
    trust = trust * ((places >= 0) & (places <= side - 1)).all(1, keepdims=True)  # the crop hides what lies outside
    truth = painted[start : start + LENGTH, y : y + CROP, x : x + CROP]
    return finished(truth, Followed(seen.source[start : start + LENGTH][inside], flow, trust), rng)


def still_sequence(tiles: dict[str, Pixels], rng: np.random.Generator) -> Sequence:
    """A photograph and its painting moved alike; before half of them another picture passes in a soft-edged ellipse."""
    style = rng.choice(list(tiles))
    back, front = (int(i) for i in rng.integers(len(tiles["photo"]), size=2))
    paths = [camera(rng, speed) for speed in (3.0, 6.0)]
    axes = rng.uniform(15, 60, 2) if rng.random() < 0.5 else np.zeros(2)
    y, x = np.mgrid[:CROP, :CROP].astype(np.float32) - CROP / 2
    frames: list[list[Pixels]] = [[], []]
    for near, far in zip(paths[1], paths[0], strict=True):
        shift = near[:, 2] - paths[1][LENGTH // 2][:, 2]
        mask = np.zeros((CROP, CROP, 1), np.float32)
        if axes.any():
            reach = np.hypot((x + shift[0]) / axes[0], (y + shift[1]) / axes[1])
            mask = ((1 - reach) * axes.min()).clip(0, 1)[..., None]
        for out, name in zip(frames, ("photo", style), strict=True):
            layers = [
                cv2.warpAffine(tiles[name][i], path, (CROP, CROP), flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
                               borderMode=cv2.BORDER_REFLECT).astype(np.float32)
                for i, path in ((back, far), (front, near))
            ]  # fmt: skip
            out.append(np.round(layers[0] + mask * (layers[1] - layers[0])).astype(np.uint8))
    return finished(np.stack(frames[1]), follow(np.stack(frames[0])), rng)


def camera(rng: np.random.Generator, speed: float) -> list[NDArray[np.float32]]:
    """A smooth path: LENGTH matrices (2, 3) from places of the crop to places of a tile of 384."""
    steps = rng.normal(0, 1, (1, 4)) + 0.3 * rng.normal(0, 1, (LENGTH, 4)).cumsum(0) / 3
    across, down, zoom, turn = (steps * rng.uniform(0, 1) * [speed, speed, 0.004, 0.006]).cumsum(0).T
    size = rng.uniform(0.7, 1.4)
    paths = []
    for dx, dy, z, a in zip(across, down, zoom, turn, strict=True):
        c, s = size * math.exp(z) * math.cos(a), size * math.exp(z) * math.sin(a)
        x, y = 192 + dx - (c - s) * CROP / 2, 192 + dy - (s + c) * CROP / 2
        paths.append(np.array([[c, -s, x], [s, c, y]], np.float32))
    return paths


def finished(truth: Pixels, seen: Followed, rng: np.random.Generator) -> Sequence:
    """Colours of another palette, and flicker; one in ten has the flickering picture for its source."""
    clean = truth.astype(np.float32) / 255
    if rng.random() < 0.5:
        clean = clean[..., rng.permutation(3)] * rng.uniform(0.7, 1, 3).astype(np.float32)
    strength = 0.0 if rng.random() < 0.2 else rng.uniform(0.1, 1.2)
    noisy = clean + 0.0 if strength == 0 else jittered(clean, rng) if rng.random() < 0.25 else clean
    noisy = np.round(255 * (noisy + strength * flicker(len(clean), rng)).clip(0, 1)) / 255
    arrays = (clean, noisy, seen.source, seen.flow, seen.trust)
    clean, noisy, source, flow, trust = (torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in arrays)
    clean, noisy = clean.movedim(3, 1), noisy.movedim(3, 1)
    return Sequence(clean, noisy, F.avg_pool2d(noisy, GUIDE) if rng.random() < 0.1 else source, flow, trust)


def flicker(frames: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Additive flicker of strength 1, (T, CROP, CROP, 3).

    Four in ten are the settings' `debug.flicker`, three a slow wash of light and warmth as another seed of ours brings,
    and the rest of any grain, held for a while or not, with or without a tint of the whole frame.
    """
    kind = rng.choice(["debug", "wash", "any"], p=[0.4, 0.3, 0.3])
    cell, sigma, fine, held, tint = 8, 18.0, 6.0, 0.0, 0.0
    mix = np.eye(3)  # from three fields to three colours
    if kind == "wash":
        cell, sigma, fine = int(rng.choice([16, 32, 32, 80])), 10.0, 0.0
        mix = np.array([[1.0, 1, 1], [0.6, 0, -0.6], [0, 0, 0]])
    elif kind == "any":
        cell, sigma, fine = int(rng.choice([4, 8, 16, 32])), rng.uniform(3, 24), rng.choice([0.0, 6.0])
        held = rng.choice([0.0, rng.uniform(0.3, 0.9)])  # AR(1)
        tint = rng.choice([0.0, rng.uniform(2, 10)])
    out = np.empty((frames, CROP, CROP, 3), np.float32)
    coarse = rng.normal(0, sigma, (CROP // cell, CROP // cell, 3))
    for i in range(frames):
        coarse = held * coarse + math.sqrt(1 - held**2) * rng.normal(0, sigma, coarse.shape)
        grain = rng.normal(0, fine, (CROP // 2, CROP // 2, 3)).astype(np.float32)
        out[i] = cv2.resize((coarse @ mix).astype(np.float32), (CROP, CROP), interpolation=cv2.INTER_CUBIC)
        out[i] += cv2.resize(grain, (CROP, CROP), interpolation=cv2.INTER_LINEAR) + rng.normal(0, tint, 3)
    return out / 255


def jittered(clean: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Each frame bent by its own smooth field of up to a pixel or two."""
    y, x = np.mgrid[:CROP, :CROP].astype(np.float32)
    size, out = rng.uniform(0.2, 0.8), np.empty_like(clean)
    for i, frame in enumerate(clean):
        bend = rng.normal(0, size, (6, 6, 2)) + rng.normal(0, size / 2, 2)
        bend = cv2.resize(bend.astype(np.float32), (CROP, CROP), interpolation=cv2.INTER_CUBIC)
        out[i] = cv2.remap(frame, x + bend[..., 0], y + bend[..., 1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return out


class Sequences(IterableDataset[Sequence]):
    """Without end: two clips to one still."""

    def __init__(self, clips: list[Clip], tiles: dict[str, Pixels]) -> None:
        self.clips, self.tiles = clips, tiles

    def __iter__(self) -> Iterator[Sequence]:
        cv2.setNumThreads(1)
        rng = np.random.default_rng(int(time.time()))
        while True:
            yield clip_sequence(self.clips, rng) if rng.random() < 0.67 else still_sequence(self.tiles, rng)
