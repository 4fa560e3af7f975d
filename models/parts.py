"""The features that a structure asks for, at work: what each needs at load, per change of settings and per frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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

    from accel.engine import Engine
    from models.loras import Loras
    from models.networks import Graph
    from models.slots import Slots


@dataclass(frozen=True, slots=True)
class Part:
    """A feature at work in a loaded model."""

    feature: Feature
    companion: Callable[[int], Companion]  # rows of memory → a stream's own
    guide: Callable[[NDArray[np.uint8], Params], Mapping[str, Any]]  # of each frame, for `Seen.guides`
    ready: Callable[[Params], None] = lambda params: None  # works ahead, in any thread; UserError for what cannot be
    graphs: Mapping[str, Graph] = field(default_factory=dict)  # networks of its own
    engines: dict[str, Engine] = field(default_factory=dict)  # they, compiled: `load` puts them here


def parts_of(
    folder: Folder, structure: Structure, latent: tuple[int, int, int, int], slots: Slots | None, loras: Loras[Any]
) -> list[Part]:
    """What the UNet is widened by, for latents (1, C, h, w); UserError where the model cannot have it."""
    parts = []
    if slots:  # the first, since it finds layers by their places in the plain UNet
        parts.append(_lora(slots, loras))
    if window := window_of(folder, structure):
        parts.append(_motion(folder, window, latent[2:], structure.rows))
    if structure.bank:
        parts.append(_bank(folder, structure, latent[2:]))
    if structure.masked:
        parts.append(_masked(structure))
    if structure.picture:
        parts.append(_picture(folder, structure))
    if structure.controls:
        parts.append(_controls(folder, structure, latent))
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


def _bank(folder: Folder, structure: Structure, size: tuple[int, int]) -> Part:
    from models.bank import FUSED, Bank, BankMemory, bank_layers

    layers = bank_layers(folder.config("unet"), size, fused=FUSED if structure.fused else ())
    bank = Bank(layers, structure.bank, structure.rows)
    return Part(
        bank,
        companion=lambda memory: BankMemory(bank, memory),
        guide=lambda image, params: {"bank_every": params.temporal.bank_every, "fusion": params.temporal.fusion},
    )


def _masked(structure: Structure) -> Part:
    from models.self_attention import Masking, SelfMask

    return Part(SelfMask(structure.rows), companion=lambda memory: Masking(), guide=lambda image, params: {})


def _picture(folder: Folder, structure: Structure) -> Part:
    from models.addons import addon, family_of
    from models.image_prompt import BLEND, GUIDE, ImagePrompt, Pictures
    from models.ip_adapter import find_adapter
    from models.picture_encoder import PictureEncoder

    unet, own = folder.config("unet"), folder.path / "ip_adapter"
    path = Path(structure.picture_adapter) if structure.picture_adapter else own if own.is_dir() else None
    adapter = find_adapter(path or addon("picture", family_of(unet)), int(unet["cross_attention_dim"]))
    prompt, encoder = ImagePrompt(adapter, structure.rows), PictureEncoder(adapter)

    def ready(params: Params) -> None:
        if params.style.picture:
            encoder.embed_file(params.style.picture)

    def guide(image: NDArray[np.uint8], params: Params) -> Mapping[str, Any]:
        style = params.style
        return {GUIDE: encoder.shown(style.picture, style.picture_scale), BLEND: style.blend_frames}

    return Part(prompt, companion=lambda memory: Pictures(prompt), guide=guide, ready=ready)


def slots_of(folder: Folder, structure: Structure) -> Slots | None:
    """Room for LoRAs, where it is asked for."""
    from models.slots import Slots

    if not structure.lora_rank:
        return None
    return Slots(folder.config("unet"), structure.lora_rank, everywhere=structure.lora_everywhere)


def _lora(slots: Slots, loras: Loras[Any]) -> Part:
    from models.slots import NAME, WornSlots
    from models.worn import last_set

    return Part(
        slots,
        companion=lambda memory: WornSlots(slots),
        guide=lambda image, params: {NAME: loras.tensors(last_set(params.style.lora))},
    )


def _controls(folder: Folder, structure: Structure, latent: tuple[int, int, int, int]) -> Part:
    from models.addons import addon
    from models.control import ready
    from models.controlnet import control_folder, control_graph
    from models.depth import DISTANCES, depth_graph
    from models.residuals import GUIDE, Controls, Residuals
    from models.text_xl import size_ids
    from models.units import units_of

    size, rows = (8 * latent[3], 8 * latent[2]), structure.rows
    found = {name: control_folder(name, folder) for name in structure.controls}
    hints = max(control.hints for control in found.values())
    residuals = Residuals(folder.config("unet"), (latent[2], latent[3]), rows, hints)
    engines: dict[str, Engine] = {}
    ids = size_ids(size) if folder.pooled_width() else None
    graphs = {}
    for control in found.values():
        ready(control.kind)
        if control.kind == "depth":
            graphs[DISTANCES] = depth_graph(addon("distances"), size)
    graphs |= {name: control_graph(control, folder, latent, rows) for name, control in found.items()}
    return Part(
        residuals,
        companion=lambda memory: Controls(engines, residuals, ids),
        guide=lambda image, params: {GUIDE: units_of(params.style.control)},
        graphs=graphs,
        engines=engines,
    )
