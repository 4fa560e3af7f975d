"""The learned refiner: a small network decides, place by place, how much of the past holds.

It stands where `models.temporal.refine` stands and is called alike. Like that one it moves the new picture towards the
last output carried along the source's motion, in two bands; unlike it, the weights come from a network that sees both
pictures, and a small correction is added. Everything is computed on 4×4 cells (space-to-depth), as in ESPCN (Shi et al.
2016). The blend-and-residual output follows the recurrent refiners of blind temporal consistency (Lai et al. 2018);
the weight's starting point is a running mean's, so an untrained network is a plain motion-compensated average.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.engine import Backend, Engine, EngineSpec, TensorSpec
from models.autoencoder import Residual
from models.filters import blur, resize, sample, weigh
from models.reproject import GUIDE, Motion, scaled
from models.temporal import COARSE, Blend, Past, calm, likely, noise_in, power

WEIGHTS = Path(__file__).parent / "refiner_weights" / "refiner.safetensors"
GRAPH = 1  # raise it when the network's forward changes: part of the engine's fingerprint
CELL = 4  # pixels a side
MEMORY = 32.0  # pictures that an output's place may be the mean of
SURPRISE, FLOOR = 3.0, 0.02  # times the usual wavering that a real change exceeds, and the wavering always allowed for


class RefinerNet(nn.Module):
    """How to move the stylized picture, and how many pictures the result then is the mean of; 0.22 M parameters."""

    def __init__(self, quarter: int = 32, eighth: int = 64) -> None:
        super().__init__()
        self.look = nn.Conv2d(3 * CELL, quarter, (CELL, 1), stride=(CELL, 1))
        self.compare = nn.Conv2d(3 * CELL, quarter, (CELL, 1), stride=(CELL, 1), bias=False)
        self.level = nn.Linear(quarter, quarter)
        self.enter = nn.Conv2d(quarter + 26, quarter, 3, padding=1)
        self.down = nn.Conv2d(quarter, eighth, 3, stride=2, padding=1)
        self.trunk = nn.Sequential(Residual(eighth), Residual(eighth))
        self.up = nn.Sequential(nn.Conv2d(eighth, quarter * 4, 1), nn.PixelShuffle(2))
        self.tail = Residual(quarter)
        self.leave = nn.Conv2d(quarter, 5, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(
        self,
        stylized: Tensor,  # (B, H, W, 3)
        apart: Tensor,  # (B, H, W, 3), the carried output less the stylized picture
        coarse: Tensor,  # (B, 3, H/4, W/4), the mean of `apart` over cells
        source: Tensor,  # (B, 3, H/2, W/2), what was painted
        trust: Tensor,  # (B, 1, H/2, W/2)
        travel: Tensor,  # (B, 3, H/4, W/4), see `travelled`
        age: Tensor,  # (B, 1, H/4, W/4), pictures that the carried output is the mean of
    ) -> tuple[Tensor, Tensor]:
        """Two maps over cells: how to move the picture, (B, 4, H/4, W/4), and the new age.

        The first holds an offset of three colours and a weight of `apart`, both to be enlarged and then added to the
        stylized picture.
        """
        trusts = F.pixel_unshuffle(trust, CELL // GUIDE)
        sure = trusts.mean(1, keepdim=True)
        size = coarse.abs().mean(1, keepdim=True)
        # The usual wavering of the trusted places, (B, 1, 1, 1); square roots tame the outliers.
        usual = (
            (size.add(1e-6).sqrt() * sure).mean((2, 3), keepdim=True) / (sure.mean((2, 3), keepdim=True) + 0.01)
        ).square()
        unit = 1 / (usual + FLOOR)
        agree = torch.exp(-coarse.square().mean(1, keepdim=True) * unit.square() / (2 * SURPRISE**2))
        mean = (age / (age + 1) * sure).clamp(0.02, 0.98)
        prior = torch.log(mean / (1 - mean))
        seen = torch.relu(self.look(_rows(stylized)) + self.compare(_rows(apart)) * unit)
        level = self.level((seen * sure).mean((2, 3)) / (sure.mean((2, 3)) + 0.01))
        strength = torch.log(usual + 0.002) / 4 * torch.ones_like(sure)
        scene = F.pixel_unshuffle(source, CELL // GUIDE) - 0.5
        maps = [
            seen,
            scene,
            (coarse * unit).clamp(-6, 6),
            agree,
            trusts,
            travel,
            prior / 4,
            strength,
            torch.ones_like(sure),
        ]
        x = torch.relu(self.enter(torch.cat(maps, 1)) + level[:, :, None, None])
        x = self.tail(x + self.up(self.trunk(self.down(x))))
        found = self.leave(torch.relu(x))
        weight = torch.sigmoid(prior + found[:, :1])
        weight_fine = torch.sigmoid(prior + found[:, 1:2])
        # What the new picture is cleaned by counts as far as it does; nothing is cleaned where nothing wavers.
        correction = torch.tanh(found[:, 2:]) * (3 * usual).clamp_max(0.15) * (1 - weight)
        move = torch.cat([(weight - weight_fine) * coarse + correction, weight_fine], 1)
        variance = weight.square() / age + (1 - weight).square()
        return move, variance.reciprocal().clamp_max(MEMORY)


class LearnedRefiner:
    """A compiled `RefinerNet` with the calling convention of `models.temporal.refine`.

    Holds no stream's memory: one refiner serves all streams of its size, each with its own `Past`.

    >>> refiner = load_refiner((512, 288), backend)
    >>> steady = refiner(stylized, guide.advance(source), past)
    """

    def __init__(self, engine: Engine, blend: Blend | None = None) -> None:
        self.engine = engine
        self.blend = blend or Blend()  # the analytic refiner's, for what nothing holds

    def __call__(self, stylized: Tensor, motion: Motion | None, past: Past) -> Tensor:
        """The steadied picture (1, 3, H, W) in [0, 1]; `past` moves on by one frame."""
        motion = past.since(motion, stylized)
        if motion is None:
            return past.begin(stylized)
        size = (stylized.shape[3], stylized.shape[2])
        apart = past.carried(motion) - stylized
        cells = resize(apart, (size[0] // CELL, size[1] // CELL))
        flow = scaled(motion.flow, (cells.shape[3], cells.shape[2]))
        age = torch.ones_like(cells[:, :1])
        if past.age is not None and past.age.shape == age.shape:  # the analytic refiner's is of another size
            age = sample(past.age, flow)
        trips = travelled(CELL * flow)
        move, now = self.engine(_last(stylized), _last(apart), cells, motion.now, motion.trust, trips, age)
        hold = move[:, 3:]
        move = resize(move, size)
        output = (stylized + move[:, :3]).addcmul_(move[:, 3:], apart)
        output = self._cleaned(output, stylized, apart, motion, hold).clamp_(0, 1)
        return past.take(output, now.clone(), stylized, motion, new=1)  # an engine's outputs last until its next launch

    def _cleaned(self, output: Tensor, stylized: Tensor, apart: Tensor, motion: Motion, hold: Tensor) -> Tensor:
        """Where the past is of no use, without as much of the detail as is usually wavering; see `temporal.refine`."""
        size, small = (stylized.shape[3], stylized.shape[2]), (motion.flow.shape[3], motion.flow.shape[2])
        bands = resize(apart, small)
        fine, blend = bands - blur(bands, COARSE), self.blend
        _, usual = likely(power(fine, 1), motion.trust, blend.surprise, blend.floor_fine)
        if calm(usual, blend):
            return output
        noise, smooth = noise_in(resize(stylized, small), usual, resize(hold, small), blend)
        return output - weigh(noise, stylized) + resize(noise * smooth, size)


def travelled(flow: Tensor) -> Tensor:
    """How much sharpness a warp by this flow (B, 2, h, w) in pixels costs along x and y, and its length; (B, 3, h, w).

    Nothing is lost by whole pixels, most half-way between them.
    """
    length = flow.square().sum(1, keepdim=True).sqrt() / 8
    return torch.cat([torch.sin(torch.pi * flow).square(), length.clamp_max(4)], 1)


def load_refiner(
    size: tuple[int, int], backend: Backend, cache: Path | None = None, weights: Path = WEIGHTS
) -> LearnedRefiner:
    """The trained refiner for pictures of (width, height), both multiples of 8."""
    width, height = size
    if width % 8 or height % 8:
        raise ValueError(f"the learned refiner's pictures are multiples of 8, not {width}×{height}")
    cells = (height // CELL, width // CELL)
    age = TensorSpec("age", (1, 1, *cells))
    inputs = (
        TensorSpec("stylized", (1, height, width, 3)),
        TensorSpec("apart", (1, height, width, 3)),
        TensorSpec("coarse", (1, 3, *cells)),
        TensorSpec("source", (1, 3, height // GUIDE, width // GUIDE)),
        TensorSpec("trust", (1, 1, height // GUIDE, width // GUIDE)),
        TensorSpec("travel", (1, 3, *cells)),
        age,
    )
    fingerprint = f"{GRAPH} {hashlib.sha256(weights.read_bytes()).hexdigest()}"
    spec = EngineSpec("refiner", inputs, (TensorSpec("move", (1, 4, *cells)), age), fingerprint)
    return LearnedRefiner(backend.load(partial(read_net, weights), spec, cache))


def read_net(weights: Path = WEIGHTS) -> RefinerNet:
    """The network with weights of a safetensors file, float32."""
    from safetensors.torch import load_file

    net = RefinerNet()
    net.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return net.eval().requires_grad_(False)


def _last(picture: Tensor) -> Tensor:
    """(1, 3, H, W) → (1, H, W, 3), the same memory where it is channels-last."""
    return picture.permute(0, 2, 3, 1).contiguous()


def _rows(picture: Tensor) -> Tensor:
    """(B, H, W, 3) → (B, 12, H, W/4), the same memory: four neighbours of a row become channels."""
    return picture.reshape(*picture.shape[:2], -1, 3 * CELL).permute(0, 3, 1, 2)
