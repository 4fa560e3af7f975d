"""What a row of the tables of models and add-ons says: where its files come from, and how it is run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

LIST = "fetched.json"  # in a fetched folder: the row it is of, and where each file came from


@dataclass(frozen=True, slots=True)
class Source:
    """Which hub repository gives one part of a model, and which of its files.

    A file goes into the folder `part` under its own name, "fp16." taken out.
    """

    part: str  # unet, vae, text_encoder, …; also lora and motion_adapter; "" = the row's own folder
    repo: str  # or an address, where its files are not on the hub
    files: tuple[str, ...]  # paths in the repository
    kind: tuple[str, str] | None = None  # (library, class) for model_index.json
    revision: str | None = None  # None = the newest: no commit of these could be checked where this was written
    sha256: tuple[tuple[str, str], ...] = ()  # (file, digest or how it begins) beyond what the hub itself states
    own: bool = False  # a checkpoint of the user's may stand in for it

    @property
    def elsewhere(self) -> bool:
        """Whether its files are not on the hub."""
        return "://" in self.repo


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model was made to be run; None where its makers fix nothing."""

    steps: int = 1
    strength: float = 1.0
    guidance: float = 1.0  # ≤ 1 = off
    prediction: str | None = None
    timesteps: tuple[int, ...] | None = None  # that it was distilled on, noisiest first
    sampler: Literal["lcm", "euler", "ancestral"] = "lcm"  # how much of the noise each step renews: all, none, some
    scheduler: tuple[tuple[str, Any], ...] = ()  # written over the base's scheduler_config.json
    lora_scale: float = 1.0
    window: int = 0  # frames of the rolling buffer, where the model has motion of its own

    @property
    def settings(self) -> dict[str, Any]:
        """What it comes to in settings: the layer under presets, files and flags.

        >>> MODELS["sd-turbo"].recipe.settings["style.strength"]
        0.5
        """
        found = {"style.steps": self.steps, "style.strength": self.strength, "style.guidance": self.guidance}
        return found | ({"temporal.window": self.window} if self.window else {})


PLAIN = Recipe()


@dataclass(frozen=True, slots=True)
class Row:
    """What `livestyle fetch` brings, where it is put, and what a user should know before choosing it."""

    name: str
    about: str
    licence: str
    megabytes: float
    sources: tuple[Source, ...] = ()

    @property
    def folder(self) -> Path:
        """Its place among the fetched ones; not there until then."""
        return models_root() / self.name


def models_root() -> Path:
    """The folder of fetched models: `$LIVESTYLE_MODELS`, else `models` beside the stored engines."""
    from platformdirs import user_cache_dir

    # An empty variable means unset, as in the XDG specification.
    cache = Path(os.environ.get("LIVESTYLE_CACHE") or user_cache_dir("livestyle"))
    return Path(os.environ.get("LIVESTYLE_MODELS") or cache / "models")
