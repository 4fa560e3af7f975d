"""Optical flow between source frames, and how far it can be trusted.

Flows are *backward*: `flow(p)` leads from pixel p of the newer picture to where it was in the older one, in pixels, x
then y. So `warp(before, flow)` shows the older picture as it would look now.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accel.errors import UserError
from models.filters import erode, grey, sample, to_image, to_tensor, total

Flow = Tensor
"""(1, 2, h, w), backward, in pixels."""

FlowEstimator = Callable[[Tensor, Tensor], Flow]
"""(now, before), each (1, 3, H, W) RGB float in [0, 1] → the backward flow (1, 2, H, W)."""

RAFT_FILES = {"raft-small": "raft_small_C_T_V2-01064c6d.pth", "raft-large": "raft_large_C_T_SKHT_V2-ff5fadd5.pth"}


class Dis:
    """Dense inverse search (Kroeger et al. 2016) from OpenCV: the choice on a CPU.

    `finest` is the pyramid level that is still searched (0 = full resolution), `refine` the number of variational
    steps.
    """

    def __init__(self, finest: int = 1, refine: int = 2, descent: int = 12, stride: int = 4) -> None:
        self._search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        self._search.setFinestScale(finest)
        self._search.setVariationalRefinementIterations(refine)
        self._search.setGradientDescentIterations(descent)
        self._search.setPatchStride(stride)
        self._greys: deque[tuple[Tensor, NDArray[np.uint8]]] = deque(maxlen=2)

    def __call__(self, now: Tensor, before: Tensor) -> Tensor:
        flow = self._search.calc(self._grey(now), self._grey(before), None)  # type: ignore[call-overload]
        return to_tensor(flow)

    def _grey(self, picture: Tensor) -> NDArray[np.uint8]:
        """Grey bytes; every picture comes four times, twice as the newer one and twice as the older."""
        for known, bytes_ in self._greys:
            if known is picture:
                return bytes_
        self._greys.append((picture, to_image(grey(picture))))
        return self._greys[-1][1]


class Raft:
    """RAFT (Teed & Deng 2020) from torchvision; `weights` is a file the user downloaded."""

    def __init__(self, name: str, weights: Path, device: torch.device | str = "cpu") -> None:
        from torchvision.models import optical_flow

        self._net = getattr(optical_flow, name.replace("-", "_"))(weights=None)
        self._net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self._net.eval().to(device)

    @torch.inference_mode()
    def __call__(self, now: Tensor, before: Tensor) -> Tensor:
        height, width = now.shape[2:]
        room = (0, max(-width % 8, 128 - width), 0, max(-height % 8, 128 - height))  # RAFT's own least size
        pair = [torch.nn.functional.pad(2 * p - 1, room, mode="replicate").contiguous() for p in (now, before)]
        flow: Tensor = self._net(*pair)[-1]
        return flow[..., :height, :width]


def flow_estimator(name: str, weights: Path | None = None) -> FlowEstimator:
    """An estimator by its settings name: `dis`, `raft-small` or `raft-large`.

    Raises UserError where weights or torchvision are missing.
    """
    if name == "dis":
        return Dis()
    if name not in RAFT_FILES:
        raise UserError(f"unknown flow estimator {name!r}", hint=f"known: dis, {', '.join(RAFT_FILES)}")
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / RAFT_FILES[name]
    if not path.is_file():
        raise UserError(
            f"no weights for {name} at {path}",
            hint=f"curl -Lo {path} --create-dirs https://download.pytorch.org/models/{RAFT_FILES[name]}",
        )
    try:
        from torchvision.models import optical_flow  # noqa: F401 whether it is there at all
    except (ImportError, RuntimeError):  # RuntimeError: a torchvision built for another torch
        raise UserError(f"{name} needs a torchvision that fits this torch", hint="pip install torchvision") from None
    try:
        return Raft(name, path)
    except (RuntimeError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} does not hold the weights of {name}: {error}", hint="download it again") from None


def compose(first: Tensor, second: Tensor) -> Tensor:
    """The flow now → key from now → middle and middle → key."""
    return first + sample(second, first)


@dataclass(frozen=True, slots=True)
class Trust:
    """Where a flow is taken to be wrong. The defaults are the published ones (Sundaram 2010, Ruder 2016, Lai 2018)."""

    occlusion: tuple[float, float] = (0.01, 0.5)
    boundary: tuple[float, float] = (0.01, 0.002)
    photometric: float = 50.0
    spread: int = 1  # pixels by which doubt grows
    plain: float = 0.0  # range of the 7×7 neighbourhood below which a wrong flow does no harm (0 = it always does)


def validity(back: Tensor, forth: Tensor, now: Tensor, before: Tensor, trust: Trust = Trust()) -> Tensor:
    """How far the backward flow can be trusted, (1, 1, H, W) in [0, 1].

    `back` leads now → before and `forth` before → now. Four tests: both flows undo each other, the flow has no
    boundary, it stays inside, and the warped picture looks like the present one.
    """
    return plausible(back, forth, now, trust) * likeness(now, sample(before, back), trust.photometric)


def plausible(back: Tensor, forth: Tensor, now: Tensor, trust: Trust = Trust()) -> Tensor:
    """The tests of the flow itself, (1, 1, H, W): 1 where it passes them, else 0."""
    length = total(back.square())
    undone = sample(forth, back)
    gap = total((back + undone).square())
    factor, slack = trust.occlusion
    good = gap <= factor * (length + total(undone.square())) + slack
    factor, slack = trust.boundary
    good &= steepness(back) <= factor * length + slack
    sure = erode(good.float(), trust.spread)
    if trust.plain:
        light = grey(now)
        sure = torch.maximum(sure, (-erode(-light, 3) - erode(light, 3) < trust.plain).float())
    return sure * inside(back)


def likeness(now: Tensor, carried: Tensor, sharpness: float) -> Tensor:
    """exp(-sharpness · squared RGB distance), (1, 1, H, W)."""
    return total((now - carried).square()).mul_(-sharpness).exp_()


def steepness(flow: Tensor) -> Tensor:
    """|∇u|² + |∇v|² by forward differences, (1, 1, H, W)."""
    across = torch.diff(flow, dim=3, append=flow[..., -1:]).square()
    down = torch.diff(flow, dim=2, append=flow[..., -1:, :]).square()
    return total(across + down)


def inside(flow: Tensor) -> Tensor:
    """Whether p + flow(p) lies in the picture, (1, 1, H, W) bool."""
    height, width = flow.shape[2:]
    x = torch.arange(width, device=flow.device) + flow[:, 0]
    y = torch.arange(height, device=flow.device)[:, None] + flow[:, 1]
    return ((x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1))[:, None]
