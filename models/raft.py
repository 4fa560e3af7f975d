"""RAFT-small (Teed and Deng 2020, arXiv 2003.12039): optical flow by looking up, again and again, where features agree.

For inference, both ways of one pair of pictures at once, in a fixed number of rounds. Parameters have the names of
torchvision's published weights `raft_small_C_T_V2`. Checked beside torchvision 0.29.2's own network with the same
random weights: the same to 1e-5 of the largest flow after 1, 5 and 12 rounds; tests/test_raft.py keeps its answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.engine import Backend, Engine, EngineSpec, TensorSpec
from accel.errors import UserError

GRAPH = 1  # raise it when the network's forward changes: part of the engine's fingerprint
ROUNDS = 5  # the published figures are of 12; a guide's pictures are small, and so are their motions
LEAST = 128  # pixels a side: the coarsest of the four levels must have two features
STEP = 8  # pixels per feature
LEVELS, RADIUS = 4, 3  # of the correlations that are looked up
HIDDEN = 96  # channels of what is remembered from round to round


class RaftNet(nn.Module):
    """Flows between two pictures; 990,162 parameters."""

    def __init__(self, rounds: int = ROUNDS) -> None:
        super().__init__()
        self.rounds = rounds
        self.feature_encoder = Encoder(128, norm=True)
        self.context_encoder = Encoder(160, norm=False)
        self.update_block = Update()

    def forward(self, now: Tensor, before: Tensor) -> Tensor:
        """Pictures (1, 3, H, W) in [0, 1] → flows (2, 2, H, W) in pixels: now → before, and before → now.

        Places and flows are float32 whatever the weights are: half a pixel is 1/16 of a feature's step.
        """
        height, width = now.shape[2:]
        room = (0, max(-width % STEP, LEAST - width), 0, max(-height % STEP, LEAST - height))
        pictures = F.pad(2 * torch.cat([now, before]) - 1, room, mode="replicate")
        features = self.feature_encoder(pictures)
        hidden, context = self.context_encoder(pictures).split([HIDDEN, 64], 1)
        hidden, context = hidden.tanh(), context.relu()
        correlations = [level.float() for level in pyramid(features, features.flip(0))]
        own = places(features)
        flow = torch.zeros_like(features[:, :2], dtype=torch.float32)
        for _ in range(self.rounds):
            alike = looked_up(correlations, own + flow)
            hidden, more = self.update_block(hidden, context, alike.to(hidden.dtype), flow.to(hidden.dtype))
            flow = flow + more.float()
        flow = STEP * F.interpolate(flow, scale_factor=STEP, mode="bilinear", align_corners=True)
        return flow[..., :height, :width]


def flow_engine(weights: Path, shape: Sequence[int], backend: Backend, cache: Path | None = None) -> Engine:
    """The network with a file's weights, compiled for two pictures of `shape`, (1, 3, H, W); see `RaftNet.forward`.

    On a CPU in float32: "fast" is bf16 there, which puts flows of 10 px wrong by 0.24 px on average. On a GPU it is
    float16, 0.03 px for flows of 8.
    """
    pictures = tuple(TensorSpec(name, tuple(shape)) for name in ("now", "before"))
    flows = TensorSpec("flows", (2, 2, *shape[2:]))
    with weights.open("rb") as stream:
        fingerprint = f"{GRAPH} {ROUNDS} {hashlib.file_digest(stream, 'sha256').hexdigest()}"
    precision = "fp32" if backend.device.lower() == "cpu" else "fast"
    spec = EngineSpec("flow", pictures, (flows,), fingerprint, precision)
    return backend.load(partial(read_net, weights), spec, cache)


def read_net(weights: Path) -> RaftNet:
    """The network with the weights of a safetensors file; UserError where they are another network's."""
    from safetensors.torch import load_file

    net = RaftNet()
    try:
        net.load_state_dict(load_file(weights))
    except RuntimeError as error:
        raise UserError(f"{weights} is not RAFT-small's", hint="`livestyle fetch raft-small`") from error
    return net.eval().requires_grad_(False)


class Encoder(nn.Module):
    """A picture's features at 1/8 of its size."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.convnormrelu = convolved(3, 32, 7, 2, norm)
        self.layer1 = nn.Sequential(Block(32, 32, 1, norm), Block(32, 32, 1, norm))
        self.layer2 = nn.Sequential(Block(32, 64, 2, norm), Block(64, 64, 1, norm))
        self.layer3 = nn.Sequential(Block(64, 96, 2, norm), Block(96, 96, 1, norm))
        self.conv = nn.Conv2d(96, width, 1)

    def forward(self, picture: Tensor) -> Tensor:
        return self.conv(self.layer3(self.layer2(self.layer1(self.convnormrelu(picture)))))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A residual block that is narrow inside."""

    def __init__(self, width: int, out: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.convnormrelu1 = convolved(width, out // 4, 1, 1, norm)
        self.convnormrelu2 = convolved(out // 4, out // 4, 3, stride, norm)
        self.convnormrelu3 = convolved(out // 4, out, 1, 1, norm)
        # Its ReLU is left out.
        self.downsample = nn.Identity() if stride == 1 else convolved(width, out, 1, stride, norm)[:-1]

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.downsample(x) + self.convnormrelu3(self.convnormrelu2(self.convnormrelu1(x))))


class Update(nn.Module):
    """One round: what is remembered, and by how much each flow changes."""

    def __init__(self) -> None:
        super().__init__()
        self.motion_encoder = MotionEncoder()
        self.recurrent_block = nn.ModuleDict({"convgru1": ConvGRU(64 + 82)})
        self.flow_head = nn.ModuleDict(
            {"conv1": nn.Conv2d(HIDDEN, 128, 3, padding=1), "conv2": nn.Conv2d(128, 2, 3, padding=1)}
        )

    def forward(self, hidden: Tensor, context: Tensor, alike: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        seen = torch.cat([context, self.motion_encoder(alike, flow)], 1)
        hidden = self.recurrent_block["convgru1"](hidden, seen)
        return hidden, self.flow_head["conv2"](self.flow_head["conv1"](hidden).relu())


class MotionEncoder(nn.Module):
    """What correlations and flow say together; 82 channels, the last two the flow."""

    def __init__(self) -> None:
        super().__init__()
        self.convcorr1 = convolved(LEVELS * (2 * RADIUS + 1) ** 2, 96, 1)
        self.convflow1 = convolved(2, 64, 7)
        self.convflow2 = convolved(64, 32, 3)
        self.conv = convolved(96 + 32, 80, 3)

    def forward(self, alike: Tensor, flow: Tensor) -> Tensor:
        both = torch.cat([self.convcorr1(alike), self.convflow2(self.convflow1(flow))], 1)
        return torch.cat([self.conv(both), flow], 1)


class ConvGRU(nn.Module):
    """A gated recurrent unit over pictures."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convz, self.convr, self.convq = (nn.Conv2d(HIDDEN + width, HIDDEN, 3, padding=1) for _ in range(3))

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        both = torch.cat([hidden, seen], 1)
        update, reset = self.convz(both).sigmoid(), self.convr(both).sigmoid()
        new = self.convq(torch.cat([reset * hidden, seen], 1)).tanh()
        return torch.lerp(hidden, new, update)


def convolved(width: int, out: int, side: int, stride: int = 1, norm: bool = False) -> nn.Sequential:
    """A convolution, its norm, and a ReLU."""
    convolution = nn.Conv2d(width, out, side, stride, (side - 1) // 2)
    return nn.Sequential(convolution, *([nn.InstanceNorm2d(out)] if norm else []), nn.ReLU())


def places(features: Tensor) -> Tensor:
    """Every feature's own x and y, (1, 2, h, w)."""
    height, width = features.shape[2:]
    across = torch.arange(width, device=features.device, dtype=torch.float32).expand(height, width)
    down = torch.arange(height, device=features.device, dtype=torch.float32)[:, None].expand(height, width)
    return torch.stack([across, down])[None]


def pyramid(features: Tensor, others: Tensor) -> Iterator[Tensor]:
    """How alike each feature (B, C, h, w) is to each of the others, level by level coarser, (B·h·w, 1, h', w').

    The means of correlations are the correlations with means, so what is pooled is small.
    """
    batch, channels, height, width = features.shape
    rows = features.reshape(batch, channels, height * width).transpose(1, 2) / channels**0.5
    for level in range(LEVELS):
        others = F.avg_pool2d(others, 2) if level else others
        size = others.shape[2:]
        yield (rows @ others.reshape(batch, channels, -1)).reshape(batch * height * width, 1, *size)


def looked_up(levels: list[Tensor], targets: Tensor) -> Tensor:
    """The correlations within RADIUS of the places that flows lead to, (B, LEVELS · 49, h, w), x outermost."""
    batch, _, height, width = targets.shape
    side = torch.arange(-RADIUS, RADIUS + 1, device=targets.device, dtype=torch.float32)
    around = torch.stack([side[:, None].expand(-1, len(side)), side.expand(len(side), -1)], 2)  # (7, 7, 2)
    centres = targets.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
    found = []
    for level, alike in enumerate(levels):
        x, y = (centres / 2**level + around).unbind(3)
        grid = torch.stack([2 * x / (alike.shape[3] - 1) - 1, 2 * y / (alike.shape[2] - 1) - 1], 3)
        found.append(F.grid_sample(alike, grid, align_corners=True).reshape(batch, height, width, -1))
    return torch.cat(found, 3).permute(0, 3, 1, 2)
