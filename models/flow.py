"""Optical flow between source frames, and how far it can be trusted.

Flows are *backward*: `flow(p)` leads from pixel p of the newer picture to where it was in the older one, in pixels, x
then y. So `warp(before, flow)` shows the older picture as it would look now.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accel.cache import default_root
from accel.engine import Backend, Engine
from models.addons import ADDONS, addon
from models.filters import erode, grey, inside, on_cpu, sample, to_image, to_tensor, total
from models.raft import flow_engine

log = logging.getLogger(__name__)

Flow = Tensor
"""(1, 2, h, w), backward, in pixels."""

FlowEstimator = Callable[[Tensor, Tensor], Flow]
"""(now, before), each (1, 3, H, W) RGB float in [0, 1] → the backward flow (1, 2, H, W)."""


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
    """RAFT-small as an engine on the pictures' device, made for their size when the first pair comes.

    One run gives the flows both ways; the other way is kept for the next question, which is the way back as a rule.
    """

    def __init__(self, weights: Path) -> None:
        self._weights = weights
        self._engine: Engine | None = None
        self._known: tuple[Tensor, Tensor, Flow] | None = None  # a pair, and the flow from its first to its second

    def __call__(self, now: Tensor, before: Tensor) -> Flow:
        if self._known is not None and self._known[0] is now and self._known[1] is before:
            return self._known[2]
        if self._engine is None or self._engine.spec.inputs[0].shape != now.shape:
            self._engine = flow_engine(self._weights, now.shape, engines_on(now.device), default_root())
        (flows,) = self._engine(now.contiguous(), before.contiguous())
        flows = flows.clone()  # an engine's outputs last until its next launch
        self._known = before, now, flows[1:]
        return flows[:1]


def flow_estimator(name: str) -> FlowEstimator:
    """An estimator by its settings name, `auto` as on a CPU; UserError where weights are missing.

    Nothing is compiled before its first pair of pictures.
    """
    return Raft(min(addon("flow").glob("*.safetensors"))) if name == "raft" else Dis()


def chosen_flow(name: str, device: torch.device) -> str:
    """What `auto` comes to: RAFT on a GPU where its weights are here, else DIS, thirty times quicker on a CPU."""
    if name != "auto":
        return name
    if on_cpu(device):
        return "dis"
    here = any(ADDONS["raft-small"].folder.glob("*.safetensors"))
    log.info(
        "optical flow: %s", "RAFT" if here else "DIS on the CPU; `livestyle fetch raft-small` brings one for the GPU"
    )
    return "raft" if here else "dis"


def engines_on(device: torch.device) -> Backend:
    """What small networks run with beside a lane's tensors.

    On a GPU they are recorded and not compiled: a lane begins in a second, and kernels this small gain little.
    """
    if device.type == "cuda":
        from accel.cuda_backend import CudaBackend

        return CudaBackend(str(device), mode=None)
    if device.type == "meta":
        from accel.torch_backend import TorchBackend

        return TorchBackend("meta")
    from accel.select import choose, missing

    return choose("torch" if missing("openvino") else "openvino").backend


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
