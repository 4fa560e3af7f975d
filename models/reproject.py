"""Two clocks: carry stylized pictures along the source's motion to the frame that is being shown.

A *key* is a source frame with its stylized picture. What a key says about the present frame comes in two parts. How
the style colours things is a local affine map of colours, fitted on the key pair as the guided filter does (He et al.
2010); applied to the present source it is never late. What that map cannot say (strokes, lines, paper) is the key's
residual, carried along the composed flow as far as that can be trusted. Where nothing moved, both together are the key
itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import cast

import torch
from torch import Tensor

from accel.transfer import brought
from models.filters import CPU, box, on_cpu, resize, sample, total, warp, weigh
from models.flow import FlowEstimator, Trust, compose, likeness, plausible

GUIDE = 2  # the source's motion is followed at 1/2 of the picture's size
CELL = 8  # one affine map of colours per 8×8 pixels
REACH = 3  # cells on each side that a map is fitted on
STIFFNESS = 2e-3  # variance of source colours below which a map is mostly an offset
FORGIVING = 10.0  # sharpness of the photometric test against a key, which may be many frames old
# At half size a flow is half as long but as steep, and DIS wavers; on plain walls it wavers most, and does no harm.
TRUST = Trust(boundary=(0.01 * GUIDE**2, 0.005), plain=0.08)
CUT = 0.15  # mean trust below which the scene has changed


@dataclass(frozen=True, slots=True)
class Motion:
    """What happened between the last two source frames, at the guide's size."""

    flow: Tensor  # now → before, (1, 2, h, w)
    trust: Tensor  # 0–1, (1, 1, h, w)
    cut: bool  # another scene: nothing of the past holds. On a device other than the CPU False, and `lost` tells
    now: Tensor  # the two source frames, (1, 3, h, w)
    before: Tensor
    lost: Tensor | None = None  # there: whether the scene is another, () bool; `trust` is 0 everywhere then


class Guide:
    """Follows a source at guide size: its present frame, and the motion since the one before.

    `check` may be a cheaper estimator; it makes the flow the other way, which only tells how far the first one holds.
    """

    def __init__(
        self, estimator: FlowEstimator, check: FlowEstimator | None = None, device: torch.device = CPU
    ) -> None:
        self.estimator = estimator
        self.check = check or estimator
        self.device = device
        self._seen: Tensor | None = None  # the present frame where the estimators look at it
        self._frame: Tensor | None = None  # and on the device

    @property
    def frame(self) -> Tensor:
        """The present source frame, (1, 3, h, w)."""
        assert self._frame is not None, "before the first frame"
        return self._frame

    def advance(self, small: Tensor) -> Motion | None:
        """Take in the next frame, `GUIDE` times smaller; None for the first one, or after a change of size.

        It may be on the CPU, for estimators there: then it is brought to the guide's device, and so are the flows.
        """
        seen, before = self._seen, self._frame
        self._seen, self._frame = small, brought(small, self.device)
        if seen is None or before is None or seen.shape != small.shape:
            return None
        back = brought(self.estimator(small, seen), self.device)
        forth = brought(self.check(seen, small), self.device)
        now = self._frame
        coarse = (now.shape[3] // 2, now.shape[2] // 2)
        sound = plausible(scaled(back, coarse), scaled(forth, coarse), resize(now, coarse), TRUST)
        trust = resize(sound, (now.shape[3], now.shape[2])) * likeness(now, sample(before, back), TRUST.photometric)
        lost = trust.mean() < CUT
        if on_cpu(lost.device):
            return Motion(back, trust, bool(lost), now, before)
        return Motion(back, trust.masked_fill(lost, 0), False, now, before, lost)


@dataclass(slots=True, eq=False)
class Track:
    """The way back from the present frame to one source frame, kept up to date frame by frame."""

    frame: Tensor  # that one, (1, 3, h, w)
    flow: Tensor | None = None  # now → that frame; None: it is the present one
    trust: Tensor | None = None
    cut: bool = False  # the scene has changed since
    lost: Tensor | None = None  # the same where that is not looked at, see `Motion`

    def advance(self, motion: Motion) -> None:
        """One more source frame has come."""
        self.cut |= motion.cut
        if self.cut:
            return
        if motion.lost is not None:
            self.lost = motion.lost if self.lost is None else self.lost | motion.lost
        if self.flow is None or self.trust is None:
            self.flow, self.trust = motion.flow, motion.trust
        else:
            self.trust = motion.trust * sample(self.trust, motion.flow)
            self.flow = compose(motion.flow, self.flow)


@dataclass(frozen=True, slots=True)
class Tint:
    """Affine maps of colours, one per cell: stylized ≈ gain · source + offset."""

    gain: tuple[Tensor, Tensor, Tensor]  # per output channel, (1, 3, h, w)
    offset: Tensor  # (1, 3, h, w)

    def __call__(self, source: Tensor) -> Tensor:
        """The source in the style's colours, (1, 3, H, W)."""
        size = (source.shape[3], source.shape[2])
        rows = [total(resize(row, size) * source) for row in self.gain]
        return torch.cat(rows, 1).contiguous(memory_format=torch.channels_last) + resize(self.offset, size)

    def unless(self, condition: Tensor, other: Tint) -> Tint:
        """The other one's maps where the condition, a single value, holds."""
        rows = [torch.where(condition, theirs, own) for own, theirs in zip(self.gain, other.gain, strict=True)]
        return Tint((rows[0], rows[1], rows[2]), torch.where(condition, other.offset, self.offset))

    def carried(self, flow: Tensor) -> Tint:
        """The maps as they lie after a motion (of any size)."""
        flow = scaled(flow, (self.offset.shape[3], self.offset.shape[2]))
        first, second, third = (sample(row, flow) for row in self.gain)
        return Tint((first, second, third), sample(self.offset, flow))


def fit_tint(source: Tensor, stylized: Tensor, reach: int = REACH) -> Tint:
    """Least squares over (2·reach + 1)² cells, with a ridge of STIFFNESS; the source may be of another size."""
    size = (stylized.shape[3] // CELL, stylized.shape[2] // CELL)
    x, y = resize(source, size), resize(stylized, size)
    mean_x, mean_y = box(x, reach), box(y, reach)

    def covariance(a: Tensor, mean_a: Tensor) -> Tensor:
        """Of the three source channels with three others, (h, w, 3, 3)."""
        rows = [box(x[:, i : i + 1] * a, reach) - mean_x[:, i : i + 1] * mean_a for i in range(3)]
        return torch.stack([row[0].permute(1, 2, 0) for row in rows], 2)

    ridge = covariance(x, mean_x) + STIFFNESS * torch.eye(3, device=x.device)
    gain, _ = torch.linalg.solve_ex(ridge, covariance(y, mean_y))  # (h, w, from, to); `solve` would wait to check
    rows = [gain[..., i].permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last) for i in range(3)]
    rows = [box(row, reach) for row in rows]
    offset = mean_y - torch.cat([total(row * mean_x) for row in rows], 1)
    return Tint(cast(tuple[Tensor, Tensor, Tensor], tuple(rows)), box(offset, reach))


def tinted(tint: Tint, frame: Tensor, size: tuple[int, int]) -> Tensor:
    """A source frame in the style's colours at (width, height); its detail is the style's, in the residual."""
    return resize(tint(frame), size)


class Key:
    """A source frame with its stylized picture, and the way back to it."""

    def __init__(self, track: Track, stylized: Tensor) -> None:
        self.track = track
        self.stylized = stylized

    @cached_property
    def tint(self) -> Tint:
        return fit_tint(self.track.frame, self.stylized)

    @cached_property
    def overall(self) -> Tint:
        """One map of colours for the whole picture."""
        return fit_tint(self.track.frame, self.stylized, max(self.tint.offset.shape[2:]))

    @cached_property
    def residual(self) -> Tensor:
        """What the tint does not say of the key, (1, 3, H, W)."""
        return self.stylized - tinted(self.tint, self.track.frame, (self.stylized.shape[3], self.stylized.shape[2]))

    def now(self, frame: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """What this key says about the present source frame, and how far that is its own, (1, 1, h, w); None: wholly.

        `frame` is at guide size, the result at `size`, (width, height). After a cut only the style's colours are left.
        """
        track = self.track
        if track.cut:
            return tinted(self.overall, frame, size), torch.zeros_like(frame[:, :1])
        if track.flow is None or track.trust is None:
            return self.stylized, None
        trust = track.trust * likeness(frame, sample(track.frame, track.flow), FORGIVING)
        carried = warp(self.residual, scaled(track.flow, size))
        tint = self.tint.carried(track.flow)
        if track.lost is not None:
            tint = tint.unless(track.lost, self.overall)
        return tinted(tint, frame, size).add_(weigh(trust, carried)), trust


def scaled(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """A flow at another size, (width, height), in that size's pixels."""
    factors = _factors(size[0] / flow.shape[3], size[1] / flow.shape[2], flow.device)
    return resize(flow * factors, size)


@lru_cache(maxsize=16)
def _factors(across: float, down: float, device: torch.device) -> Tensor:
    """(1, 2, 1, 1); made once, since a device waits for what comes from the host."""
    with torch.inference_mode(False):
        return brought(torch.tensor([across, down]), device).view(1, 2, 1, 1)
