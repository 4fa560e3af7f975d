"""How a model is best run: the recipe of its row, or one that fits a folder of the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.rows import LIST, PLAIN, Recipe
from models.spec import MODELS

FEW = ("LCMScheduler", "TCDScheduler")  # what models of few steps are saved with


def recipe_of(model: str | Path) -> Recipe:
    """How a model's name, folder or checkpoint is best run: its row's recipe, or one that fits what is in the folder.

    A folder that was fetched says of which row it is, wherever it was copied to. Never fails: what is wrong with a
    model is said when it is loaded.
    """
    if str(model) in MODELS:
        return MODELS[str(model)].recipe
    folder = Path(model).expanduser()
    for spec in MODELS.values():
        if spec.packaged and _same(spec.packaged, folder):
            return spec.recipe
    row = str(_told(folder / LIST).get("model"))
    if row in MODELS:
        return MODELS[row].recipe
    return _fitting(folder)


def remark(model: str | Path) -> str:
    """One line where a model was made for many steps, and what makes it do with few; else ""."""
    folder = Path(model).expanduser()
    if str(model) in MODELS or (folder / LIST).is_file() or (folder / "lora").is_dir():
        return ""
    if folder.is_dir():
        unet, scheduler = _told(folder / "unet/config.json"), _told(folder / "scheduler/scheduler_config.json")
        few = scheduler.get("_class_name") in FEW or scheduler.get("timestep_spacing") == "trailing"
        sd15 = unet.get("cross_attention_dim") == 768 and unet.get("in_channels") == 4
        if few or not sd15 or unet.get("time_cond_proj_dim"):
            return ""
    elif not folder.is_file():
        return ""
    return f"{folder.name} was made for many steps: `livestyle fetch sd15-lcm --base {model}` makes one for few of it"


def _fitting(folder: Path) -> Recipe:
    """A recipe for a folder of unknown origin, by its networks and its scheduler."""
    unet, scheduler = _told(folder / "unet/config.json"), _told(folder / "scheduler/scheduler_config.json")
    if not unet:
        return MODELS["sd15-lcm"].recipe if folder.is_file() else PLAIN
    if unet.get("in_channels") == 2 * unet.get("out_channels", 0):  # InstructPix2Pix's form begins with noise alone
        return PLAIN
    sampler = scheduler.get("_class_name")
    if sampler == "TCDScheduler":
        return MODELS["sd15-hyper"].recipe
    if (folder / "lora").is_dir():  # what makes it one for few steps is beside it, most often LCM's
        return MODELS["sd15-lcm"].recipe
    if scheduler.get("timestep_spacing") == "trailing" and sampler != "LCMScheduler":  # as turbo models are saved
        return MODELS["sdxl-turbo" if sampler == "EulerAncestralDiscreteScheduler" else "sd-turbo"].recipe
    return MODELS["sd15-lcm"].recipe


def _told(path: Path) -> dict[str, Any]:
    """A JSON file's table; empty where there is none."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
