"""Style pictures to tokens that the UNet's cross-attentions read: IP-Adapter's half outside the UNet."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accel.errors import UserError
from accel.machine import giving_way
from models.assets import GONE, asset, stamp_of
from models.ip_adapter import Adapter, read_json
from models.kept import Kept
from models.tensor_file import FETCH

KEPT = 192  # entries of what is remembered: a picture has three, which share 130 kB at most
LONG = 8  # times its width that a picture is looked at: only the middle counts, and a strip would fill the memory
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, Radford et al. 2021


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """A picture to what a CLIP image encoder takes, as transformers' `CLIPImageProcessor` does it."""

    edge: int = 224  # pixels of the shorter side, by cubic interpolation with antialiasing
    crop: int = 224  # pixels of the square out of its middle
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, picture: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) RGB → (1, 3, crop, crop), to the bit: resized by Pillow, since torch's bytes are up to 2 off."""
        from PIL import Image

        height, width = (min(side, LONG * min(picture.shape[:2])) for side in picture.shape[:2])
        seen = middle(picture, height, width)
        size = [self.edge * side // min(height, width) for side in (height, width)]
        resized = np.asarray(Image.fromarray(seen).resize((size[1], size[0]), Image.Resampling.BICUBIC))
        pixels = torch.from_numpy(middle(resized, self.crop, self.crop).astype(np.float32) / 255)  # (crop, crop, 3)
        return ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1)[None].contiguous()


@dataclass(frozen=True, slots=True)
class StylePicture:
    """A style picture as the UNet's cross-attentions see it.

    Two of them can be interpolated tensor by tensor, on the way from one picture to another:

    >>> way = Transition(old.tensors, new.tensors, frames=30)
    >>> shown = StylePicture(*way.at(7))

    From none, or to none, it is the same picture at scale 0: `faded`.
    """

    words: Tensor  # (1, T, D)
    negative: Tensor  # (1, T, D) for the passes that guidance leads away from
    scale: Tensor  # (1,) or (layers,), one per cross-attention; 0 = it has no say

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Its fields in their order."""
        return self.words, self.negative, self.scale

    @property
    def faded(self) -> StylePicture:
        """The same with no say."""
        return replace(self, scale=torch.zeros_like(self.scale))


class PictureEncoder:
    """An adapter's image encoder and projection on the CPU; each picture is encoded once. For any thread.

    The published encoders are large: 2.5 GB in memory for SD 1.x and seconds per picture on few cores, so pictures are
    encoded where settings change, and frames ask for what is `shown`.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._plus = adapter.plus
        self._prepared = preprocessing(adapter)
        self._projection = adapter.projection()
        self._model: Any = adapter.vision()
        self._known: Kept[Hashable, Tensor] = Kept(KEPT)
        self.negative = self._tokens(None)  # (1, T, D)

    def embed(self, picture: NDArray[np.uint8]) -> Tensor:
        """The tokens (1, T, D) of an (H, W, 3) RGB picture."""
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            raise ValueError(f"picture of shape {picture.shape}, {picture.dtype}; a style picture is (H, W, 3) uint8")
        content = hashlib.sha256(picture.tobytes()).digest(), picture.shape

        def encoded() -> Tensor:
            return giving_way(lambda: self._tokens(self._prepared(picture)))  # streams run meanwhile

        return self._known.get(content, encoded)

    def embed_file(self, path: str | Path) -> Tensor:
        """The tokens of a picture file, or of a name in the user's folder, as it is now; UserError where it is none.

        One that has gone since it was last embedded is taken as it was: what is worn is not in the way of changes.
        """
        file = asset(str(path), "pictures")
        stamp = stamp_of(file)
        found = self._known.known(str(path) if stamp == GONE else (file, stamp))
        if found is None:
            found = self.embed(read_picture(file))
            self._known.put((file, stamp), found)
        self._known.put(str(path), found)
        return found

    def shown(self, path: str | Path, scale: float) -> StylePicture | None:
        """A picture file as it was last embedded, without a look at the disk; None for no path.

        One that was never embedded, or so many others ago that it is forgotten, is embedded now.
        """
        if not str(path):
            return None
        found = self._known.known(str(path))
        return StylePicture(self.embed_file(path) if found is None else found, self.negative, torch.tensor([scale]))

    def _tokens(self, pixels: Tensor | None) -> Tensor:
        """Tokens of a prepared picture (1, 3, H, W), or of none, as diffusers' pipelines have it for guidance.

        None is an embedding of zeros to the base kind, and what the encoder sees in zeros to the plus kind.
        """
        config = self._model.config
        with torch.inference_mode():
            if pixels is None and not self._plus:
                return self._projected(torch.zeros(1, config.projection_dim))
            if pixels is None:
                pixels = torch.zeros(1, 3, config.image_size, config.image_size)
            found = self._model(pixels, output_hidden_states=self._plus)
            return self._projected(found.hidden_states[-2] if self._plus else found.image_embeds)

    def _projected(self, embedding: Tensor) -> Tensor:
        tokens: Tensor = self._projection(embedding)
        return tokens


def preprocessing(adapter: Adapter) -> Preprocessing:
    """How an adapter's pictures are made ready: as a preprocessor_config.json beside it says, else CLIP's own way."""
    side = int(adapter.vision_config()["image_size"])
    folders = (adapter.path.parent / "feature_extractor", adapter.encoder, adapter.path.parent)
    file = next((f for folder in folders if (f := folder / "preprocessor_config.json").is_file()), None)
    config = read_json(file) if file else {}
    try:
        edge, crop = config.get("size", side), config.get("crop_size", side)
        found = Preprocessing(
            int(edge["shortest_edge"] if isinstance(edge, dict) else edge),
            int(crop["height"] if isinstance(crop, dict) else crop),
            tuple(map(float, config.get("image_mean", MEAN))),
            tuple(map(float, config.get("image_std", STD))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not CLIP's kind of preprocessing ({error!r})", hint="remove or mend it") from error
    if found.crop != side or found.edge < side:
        raise UserError(f"{file} makes pictures of {found.crop} pixels, the encoder takes {side}", hint=FETCH)
    return found


def middle(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """The part (height, width, 3) out of the middle of a picture."""
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return np.ascontiguousarray(picture[top : top + height, left : left + width])


def read_picture(path: Path) -> NDArray[np.uint8]:
    """A picture file as (H, W, 3) RGB, turned upright; UserError where it is none, or not whole."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            return np.array(ImageOps.exif_transpose(file).convert("RGB"))
    except (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
        raise UserError(
            f"{path} cannot be read as a picture ({reason})", hint="style.picture is a PNG, JPEG or WebP file, whole"
        ) from error
