"""IP-Adapter's files: which of a folder's fit a model, and what is in them.

Ye et al. 2023 (arXiv 2308.06721): keys and values of its own for each cross-attention of the UNet, and a projection
from what a CLIP image encoder gives to the tokens they are made of. The base kind projects the picture's one embedding,
the plus kind lets its tokens look at all patches.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import UserError
from models.tensor_file import FAMILIES, FETCH, read_safetensors

LAYOUT = "it holds weights such as ip-adapter_sd15.safetensors, and image_encoder/ beside them, as h94/IP-Adapter does"
KINDS = "the base and the plus kind of IP-Adapter are known, such as ip-adapter_sd15 and ip-adapter-plus_sd15"
FACES = ("_lora.", "perceiver_resampler", "image_proj.proj.0.")  # in the names of weights of FaceID and full-face
DEFAULTS = {"hidden_size": 768, "projection_dim": 512, "image_size": 224}  # of transformers' CLIPVisionConfig
KEY = re.compile(r"ip_adapter\.(\d+)\.to_[kv]_ip\.weight")


def find_adapter(path: Path, width: int) -> Adapter:
    """The adapter at a path for a UNet whose words are so wide; UserError where there is none that fits.

    The path is a file of weights, a folder of them, or a folder that has theirs under h94/IP-Adapter's names. Of
    several that fit it is the one with the shortest name, the plain one.
    """
    files = weight_files(path.expanduser())
    if not files:
        raise UserError(f"no IP-Adapter at {path}", hint=LAYOUT)
    misfits = []
    for file in files:
        above = file.parent.parent
        beside = dict.fromkeys(folder / "image_encoder" for folder in (file.parent, above / "models", above))
        encoders = [folder for folder in beside if folder.is_dir()]
        if not encoders:
            raise UserError(f"no image_encoder/ beside {file}", hint=LAYOUT)
        for adapter in (Adapter(file, encoder) for encoder in encoders):
            if not (misfit := adapter.misfit(width)):
                return adapter
            misfits.append(misfit)
    raise UserError(misfits[0], hint=KINDS)


def weight_files(path: Path) -> list[Path]:
    """What may be weights at a path, the plain ones first."""
    if path.is_file():
        return [path]
    found: list[Path] = []
    for folder in (path, path / "models", path / "sdxl_models"):
        for ending in (".safetensors", ".bin"):
            named = sorted(folder.glob(f"ip-adapter*{ending}"), key=lambda file: (len(file.name), file.name))
            found += [file for file in named if file.with_suffix(".safetensors") not in found]
    return found


@dataclass(frozen=True)
class Adapter:
    """An IP-Adapter's files, read when they are first needed; UserError where they are not whole or of another kind."""

    path: Path  # the weights
    encoder: Path  # folder of the image encoder

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All weights by their names in the published files, "image_proj." or "ip_adapter." first."""
        tensors = read_safetensors(self.path)[0] if self.path.suffix == ".safetensors" else read_pickle(self.path)
        if not {"image_proj", "ip_adapter"} <= {key.partition(".")[0] for key in tensors}:
            raise UserError(f"{self.path.name} is not an IP-Adapter", hint=LAYOUT)
        return tensors

    @property
    def plus(self) -> bool:
        """Whether its tokens look at all patches of the picture."""
        return "image_proj.latents" in self.tensors

    @property
    def shape(self) -> tuple[int, int, int]:
        """How many tokens, how wide they are, and how wide is what the projection takes: (T, D, E)."""
        taken, given = ("proj_in", "proj_out") if self.plus else ("proj", "norm")
        width, takes = self._tensor(f"image_proj.{given}.weight"), self._tensor(f"image_proj.{taken}.weight")
        tokens = self._tensor("image_proj.latents").shape[1] if self.plus else takes.shape[0] // width.shape[0]
        return tokens, width.shape[0], takes.shape[1]

    @cached_property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Weights of keys and values, (C, D) each, of every cross-attention in the order of the UNet's processors.

        The files count all attentions from 0, of which the odd ones are these.
        """
        last = max((int(found[1]) for key in self.tensors if (found := KEY.fullmatch(key))), default=0)
        names = [[f"ip_adapter.{i}.to_{part}_ip.weight" for part in "kv"] for i in range(1, last + 1, 2)]
        pairs = [(self._tensor(k), self._tensor(v)) for k, v in names]
        if not pairs or any(k.shape != v.shape or k.shape[1:] != (self.shape[1],) for k, v in pairs):
            raise UserError(f"{self.path.name} has layers that do not belong together", hint=FETCH)
        return pairs

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the weights' file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def misfit(self, width: int) -> str:
        """Why it cannot be used where the UNet's words are so wide, or ""."""
        if any(mark in key for key in self.tensors for mark in FACES):
            return f"{self.path.name} is for faces, and needs more than a picture"
        _, own, takes = self.shape
        if own != width:
            return f"{self.path.name} is for {family(own)}, this model is {family(width)}"
        field = "hidden_size" if self.plus else "projection_dim"
        if (gives := self.vision_config()[field]) != takes:
            return f"{self.path.name} does not fit the image encoder beside it ({field} {gives}, not {takes})"
        return ""

    def vision_config(self) -> dict[str, Any]:
        """The image encoder's configuration."""
        return DEFAULTS | read_json(self.encoder / "config.json")

    def vision(self) -> nn.Module:
        """The image encoder, float32."""
        from safetensors import SafetensorError
        from transformers import CLIPVisionModelWithProjection

        read: Any = CLIPVisionModelWithProjection.from_pretrained
        try:
            model, told = read(self.encoder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{self.encoder} cannot be read ({reason})", hint=FETCH) from error
        if told["missing_keys"]:  # they would be random
            raise UserError(f"{self.encoder} has no {min(told['missing_keys'])}", hint=FETCH)
        found: nn.Module = model.eval().requires_grad_(False)
        return found

    def projection(self) -> nn.Module:
        """From what the image encoder gives to tokens, (1, E) or (1, patches, E) → (1, T, D), float32."""
        from diffusers.loaders.unet import UNet2DConditionLoadersMixin

        weights = {k.removeprefix("image_proj."): t.float() for k, t in self.tensors.items() if k.startswith("image_")}
        convert: Any = UNet2DConditionLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers
        try:
            found: nn.Module = convert(weights, low_cpu_mem_usage=False)
        except (KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{self.path.name} is not whole ({reason})", hint=FETCH) from error
        return found.eval().requires_grad_(False)

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise UserError(f"{self.path.name} has no {name}", hint=f"{FETCH}; {KINDS}")
        return self.tensors[name]


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, nested as IP-Adapter's are, by flat names; code in it is not run."""
    try:
        nested = torch.load(path, map_location="cpu", weights_only=True)
        return {f"{part}.{name}": tensor for part, tensors in nested.items() for name, tensor in tensors.items()}
    except (OSError, EOFError, RuntimeError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path.name} cannot be read ({type(error).__name__})", hint=f"{FETCH}, as .safetensors"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A configuration; UserError where it is missing or broken."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"cannot read {path} ({type(error).__name__})", hint=FETCH) from error


def family(width: int) -> str:
    """What models whose words are so wide are called."""
    return FAMILIES.get(width, f"one with words {width} wide")
