"""The features that a structure asks for, put to work: what each needs at load, per change of settings and per frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import UserError
from models.folder import Folder
from models.params import Params
from models.rolling import Window, Windowed
from models.structure import Structure
from models.unet import Companion, Feature

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Part:
    """A feature at work in a loaded model."""

    feature: Feature
    companion: Callable[[int], Companion]  # rows of memory → a stream's own
    guide: Callable[[NDArray[np.uint8], Params], Mapping[str, Any]]  # of each frame, for `Seen.guides`
    ready: Callable[[Params], None] = lambda params: None  # works ahead, in any thread; UserError for what cannot be


def parts_of(folder: Folder, structure: Structure, latent: tuple[int, int, int, int]) -> list[Part]:
    """What the UNet is widened by, for latents (1, C, h, w); UserError where the model cannot have it."""
    parts = []
    if window := window_of(folder, structure):
        parts.append(_motion(folder, window, latent[2:], structure.rows))
    if structure.picture:
        parts.append(_picture(folder, structure))
    return parts


def window_of(folder: Folder, structure: Structure) -> Window | None:
    """The rolling window that is asked for, None where none is; UserError where the model cannot have it."""
    length, refresh = structure.window, structure.refresh
    if not length:
        return None
    if folder.pooled_width():
        raise UserError("no window of frames for SDXL's kind of model", hint="temporal.window=0")
    if not folder.has_adapter:
        raise UserError(
            f"{folder.path.name} has no motion adapter, so no window of frames",
            hint="temporal.window=0, or put a MotionAdapter made for this model into its folder as motion_adapter/",
        )
    if length == 1:
        raise UserError("a window of one frame shows nothing of the past", hint="temporal.window=0, or 2 and more")
    if refresh > length // 2:
        raise UserError(
            f"temporal.refresh = {refresh} of a window of {length} frames", hint="at most half of temporal.window"
        )
    return Window.of(length, refresh=refresh)


def _motion(folder: Folder, window: Window, size: tuple[int, int], rows: int) -> Part:
    from models.motion import Motion

    motion = Motion(folder, size, window, rows)
    return Part(
        motion,
        companion=lambda memory: Windowed(motion, window, memory),
        guide=lambda image, params: {"motion_scale": params.temporal.motion_scale},
    )


def _picture(folder: Folder, structure: Structure) -> Part:
    from models.addons import addon, family_of
    from models.image_prompt import GUIDE, ImagePrompt, Pictures
    from models.ip_adapter import find_adapter
    from models.picture_encoder import PictureEncoder

    unet, own = folder.config("unet"), folder.path / "ip_adapter"
    path = Path(structure.picture_adapter) if structure.picture_adapter else own if own.is_dir() else None
    adapter = find_adapter(path or addon("picture", family_of(unet)), int(unet["cross_attention_dim"]))
    prompt, encoder = ImagePrompt(adapter, structure.rows), PictureEncoder(adapter)

    def ready(params: Params) -> None:
        if params.style.picture:
            encoder.embed_file(params.style.picture)

    return Part(
        prompt,
        companion=lambda memory: Pictures(prompt),
        guide=lambda image, params: {GUIDE: encoder.shown(params.style.picture, params.style.picture_scale)},
        ready=ready,
    )
