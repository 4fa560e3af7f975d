"""Depth pictures: how near things are, white on black, from one picture by a network.

Any of transformers' depth estimators; Depth Anything V2 small (Yang et al. 2024, arXiv 2406.09414) is the one that
`livestyle fetch` knows. Pictures are brought to the full range, as ControlNets for depth were trained; those of a
stream to one that changes slowly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.engine import EngineSpec, TensorSpec
from accel.errors import UserError
from models.folder import Folder
from models.hub import fault
from models.networks import Graph

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from accel.engine import Engine

GRAPH = "depth 2"  # raise it when `Depth` changes: part of the fingerprint
SIDE = 518  # pixels that Depth Anything was trained on
FILE = "model.safetensors"
FETCH = "fetch it again: `livestyle fetch depth-anything-small`"
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
DISTANCES = "distances"  # the estimator's name among the engines that control needs
SETTLING = 0.1  # how much of a picture's own range each counts in its stream's


class Depth(nn.Module):
    """A depth estimator: pictures (1, H, W, 3) uint8 → how near all is, (1, H, W), in a unit of its own."""

    mean: Tensor
    spread: Tensor

    def __init__(self, network: nn.Module, size: tuple[int, int], *, metric: bool) -> None:
        super().__init__()
        self.network = network
        self.size = size  # (H, W)
        self.metric = metric  # the network gives metres instead of their inverse
        config: Any = network.config
        self.inner = inner_size(size, int(getattr(config.backbone_config, "patch_size", 14)))
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("spread", torch.tensor(SPREAD).view(1, 3, 1, 1))

    def forward(self, picture: Tensor) -> Tensor:
        x = picture.permute(0, 3, 1, 2).to(self.mean.dtype) / 255
        x = F.interpolate(x, self.inner, mode="bilinear", align_corners=False)
        near: Tensor = self.network((x - self.mean) / self.spread).predicted_depth[:, None]  # (1, 1, h, w)
        near = F.interpolate(near.float(), self.size, mode="bilinear", align_corners=False)
        if self.metric:
            near = 1 / near.clamp_min(1e-3)
        return near[:, 0]


class Shades:
    """A stream's depth pictures, (H, W, 3) uint8 of the same: the nearest white, by an estimator's engine.

    The first one has the full range. Later ones share a range that follows slowly: one for each would make everything
    darker at once where somebody comes near, and pulse with every estimate.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._range: tuple[float, float] | None = None

    def __call__(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        (found,) = self._engine(torch.from_numpy(np.require(picture, requirements=("C", "W")))[None])
        near = found[0].cpu().numpy()
        low, high = float(near.min()), float(near.max())
        if self._range is not None:
            low, high = (old + SETTLING * (new - old) for old, new in zip(self._range, (low, high), strict=True))
        self._range = low, high
        grey = np.rint(np.clip((near - low) * (255 / max(high - low, 1e-6)), 0, 255)).astype(np.uint8)
        return np.repeat(grey[..., None], 3, 2)

    def reset(self) -> None:
        """Another scene begins, with a range of its own."""
        self._range = None


def inner_size(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """What the network sees of pictures of (height, width): whole patches, one side about 518, scaled least.

    >>> inner_size((512, 512), 14), inner_size((288, 512), 14)
    ((518, 518), (294, 518))
    """
    scale = min((SIDE / side for side in size), key=lambda scale: abs(1 - scale))
    height, width = (max(round(side * scale / patch), 1) * patch for side in size)
    return height, width


def depth_graph(folder: Path, size: tuple[int, int]) -> Graph:
    """A depth estimator's folder to be compiled for pictures of (width, height); UserError where it is not whole."""
    try:
        config = dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"depth control: {folder} has no readable config.json", hint=FETCH) from error
    if problem := fault(folder / FILE):
        raise UserError(f"depth control: {folder.name}/{FILE}: {problem}", hint=FETCH)
    picture = TensorSpec("picture", (1, size[1], size[0], 3), "uint8")
    near = TensorSpec("near", picture.shape[:3])
    fingerprint = GRAPH + Folder(folder.parent).fingerprint(folder.name)
    metric = config.get("depth_estimation_type") == "metric"
    return Graph(
        lambda: Depth(estimator(folder), (size[1], size[0]), metric=metric),
        EngineSpec("depth", (picture,), (near,), fingerprint),
    )


def estimator(folder: Path) -> nn.Module:
    """The network of a folder, float32."""
    from transformers import AutoModelForDepthEstimation

    read: Any = AutoModelForDepthEstimation.from_pretrained
    try:
        network, told = read(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"depth control: {folder} cannot be read ({reason})", hint=FETCH) from error
    if told["missing_keys"]:
        raise UserError(f"depth control: {folder} has no {sorted(told['missing_keys'])[0]}", hint=FETCH)
    module: nn.Module = network.eval().requires_grad_(False)
    return module
