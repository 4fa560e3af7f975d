"""Stable Diffusion's safety checker, and what a stream shows in place of a picture that does not pass.

The checker is diffusers' `StableDiffusionSafetyChecker`: how like a CLIP embedding of the picture is to those of
seventeen concepts, each with a threshold of its own, which three more make stricter.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from accel.engine import EngineSpec, TensorSpec
from accel.errors import UserError
from models.files import form_of, weight_files
from models.networks import Graph
from models.picture_encoder import Preprocessing

if TYPE_CHECKING:
    from accel.engine import Engine
    from models.folder import Folder

STRICTER = 0.01  # added to every concept once one that needs special care is found
GREY = 128
FETCH = "livestyle fetch safety-checker"


class Concepts(nn.Module):
    """A prepared picture → by how much it is over each threshold: of special care (1, 3), of concepts (1, 17)."""

    def __init__(self, checker: Any) -> None:
        super().__init__()
        self.checker = checker

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (1, 3, S, S), as `Preprocessing` makes them."""
        checker = self.checker
        embedding = checker.visual_projection(checker.vision_model(pixels)[1])  # (1, D)
        special = alike(embedding, checker.special_care_embeds) - checker.special_care_embeds_weights
        concepts = alike(embedding, checker.concept_embeds) - checker.concept_embeds_weights
        return special, concepts


def alike(embedding: Tensor, others: Tensor) -> Tensor:
    """Cosines between (1, D) and (N, D), (1, N)."""
    return nn.functional.normalize(embedding) @ nn.functional.normalize(others).T


def is_unsafe(special: NDArray[np.float32], concepts: NDArray[np.float32]) -> bool:
    """The verdict on what `Concepts` gives, to three decimals, as diffusers has it."""
    adjustment = STRICTER if (special.round(3) > 0).any() else 0.0
    return bool(((concepts + np.float32(adjustment)).round(3) > 0).any())


class SafetyChecker:
    """A checker on an engine, for all streams of one device; the thread that owns the engine calls it.

    >>> graph = safety_graph(safety_folder(folder))
    >>> checker = SafetyChecker(backend.load(graph.build, graph.spec, cache))
    >>> checker.unsafe(picture)
    False
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        side = engine.spec.inputs[0].shape[-1]
        self._prepared = Preprocessing(side, side)

    def unsafe(self, picture: NDArray[np.uint8]) -> bool:
        """Whether an (H, W, 3) RGB picture shows what should not be shown. What is not finite counts as that."""
        with torch.inference_mode():
            special, concepts = (found[0].float().cpu().numpy() for found in self._engine(self._prepared(picture)))
        if not (np.isfinite(special).all() and np.isfinite(concepts).all()):
            return True
        return is_unsafe(special, concepts)


class Censor:
    """One stream's pictures after the checker: the unsafe ones are never handed on.

    >>> censor.instead = params.style.safety
    >>> picture = censor.shown(picture)
    """

    def __init__(self, checker: SafetyChecker) -> None:
        self._checker = checker
        self._safe: NDArray[np.uint8] | None = None  # the last one that passed
        self.instead: Literal["off", "blank", "previous"] = "blank"  # what is shown instead; off = nothing is checked
        self.hidden = 0  # pictures that did not pass

    def shown(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The (H, W, 3) picture itself, or, where it does not pass, grey or the last one that did (grey before any)."""
        if self.instead == "off":
            self._safe = None
            return picture
        if not self._checker.unsafe(picture):
            self._safe = picture
            return picture
        self.hidden += 1
        if self.instead == "previous" and self._safe is not None and self._safe.shape == picture.shape:
            return self._safe
        return np.full_like(picture, GREY)

    def reset(self) -> None:
        """Forget the last safe picture, which would be out of place after a cut or other settings."""
        self._safe = None


def safety_folder(folder: Folder) -> Path:
    """Where a model's checker is: its own safety_checker/, else the fetched add-on; UserError says how to get it."""
    own = folder.path / "safety_checker"
    if weight_files(own):
        return own
    from models.addons import addon

    return addon("safety")


def safety_graph(path: Path) -> Graph:
    """The network of a checker's folder, to be compiled; UserError where its configuration cannot be read."""
    side = int(_config(path).vision_config.image_size)
    digest = hashlib.sha256()
    for file in (path / "config.json", *weight_files(path)):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return Graph(
        lambda: Concepts(read_checker(path)),
        EngineSpec(
            "safety",
            (TensorSpec("pixels", (1, 3, side, side)),),
            (TensorSpec("special", (1, 3)), TensorSpec("concepts", (1, 17))),
            digest.hexdigest(),
            "fp32",  # bf16 is as coarse as the verdict's three decimals
        ),
    )


def read_checker(path: Path) -> nn.Module:
    """diffusers' checker of a folder, float32; UserError where it is not whole: a random one would pass anything."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    read: Any = StableDiffusionSafetyChecker.from_pretrained
    try:
        checker, told = read(
            path, dtype=torch.float32, local_files_only=True, output_loading_info=True, **form_of(path)
        )
    except Exception as error:  # what broken files raise, safetensors' own class among it, is not told
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the safety checker in {path} cannot be read ({reason})", hint=f"`{FETCH}`") from error
    if told["missing_keys"]:
        raise UserError(f"the safety checker in {path} has no {min(told['missing_keys'])}", hint=f"`{FETCH}`")
    found: nn.Module = checker.eval().requires_grad_(False)
    return found


def _config(path: Path) -> Any:
    from transformers import CLIPConfig

    try:
        return CLIPConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"the safety checker in {path} has no readable config.json", hint=f"`{FETCH}`") from error
