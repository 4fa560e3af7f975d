"""Depth pictures: how near things are, white on black, from one picture by a network.

Any of transformers' depth estimators; Depth Anything V2 small (Yang et al. 2024, arXiv 2406.09414) is the one that
`livestyle fetch` knows. Each picture is brought to the full range by itself, as ControlNets for depth were trained.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.engine import EngineSpec, TensorSpec
from accel.errors import UserError
from models.addons import addon
from models.folder import Folder
from models.hub import fault
from models.networks import Graph

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from accel.engine import Engine

GRAPH = "depth 1"  # raise it when `Depth` changes: part of the fingerprint
SIDE = 518  # pixels that Depth Anything was trained on
FILE = "model.safetensors"
FETCH = "fetch it again: `livestyle fetch depth-anything-small`"
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
KEPT = 2  # estimators, each for one picture size


class Depth(nn.Module):
    """A depth estimator: pictures (1, H, W, 3) uint8 → the same, the nearest 255 and the farthest 0."""

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
        low, high = near.amin((2, 3), keepdim=True), near.amax((2, 3), keepdim=True)
        grey = (255 * (near - low) / (high - low).clamp_min(1e-6)).round().to(torch.uint8)
        return grey.permute(0, 2, 3, 1).repeat(1, 1, 1, 3)


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
    depth = TensorSpec("depth", picture.shape, "uint8")
    fingerprint = GRAPH + Folder(folder.parent).fingerprint(folder.name)
    metric = config.get("depth_estimation_type") == "metric"
    return Graph(
        lambda: Depth(estimator(folder), (size[1], size[0]), metric=metric),
        EngineSpec("depth", (picture,), (depth,), fingerprint),
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


class Depths:
    """The fetched depth estimator at work: engines by picture size, made when first needed; any thread.

    >>> near = Depths()(picture)  # (H, W, 3) uint8 RGB → the same
    """

    def __init__(self) -> None:
        self._engines: OrderedDict[tuple[int, int], Engine] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        with self._lock:  # an engine's output is its own until its next call
            (found,) = self._engine((picture.shape[1], picture.shape[0]))(
                torch.from_numpy(np.require(picture, requirements=("C", "W")))[None]
            )
            image: NDArray[np.uint8] = found[0].cpu().numpy().copy()
        return image

    def ready(self, size: tuple[int, int]) -> None:
        """Make the engine for pictures of (width, height) ahead; UserError where there is no estimator."""
        with self._lock:
            self._engine(size)

    def _engine(self, size: tuple[int, int]) -> Engine:
        if size not in self._engines:
            from accel.cache import default_root
            from accel.select import choose

            graph = depth_graph(addon("distances"), size)
            self._engines[size] = choose("auto").backend.load(graph.build, graph.spec, default_root())
        self._engines.move_to_end(size)
        while len(self._engines) > KEPT:
            self._engines.popitem(last=False)
        return self._engines[size]
