"""The table of models: a Stable-Diffusion-family model is one row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One row: where the folder is and what a user should know before choosing it."""

    name: str
    folder: Path
    about: str
    licence: str
    megabytes: float
    size: tuple[int, int] = (512, 288)  # (width, height) that suits it


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="mini",
            folder=Path(__file__).parent / "mini",
            about="the embedded default: thirteen painted styles, one step, real time on two CPU cores",
            licence="Apache-2.0",
            megabytes=13.8,
        ),
    )
}


def style_names(folder: Path) -> dict[str, list[str]]:
    """The styles that a small-vocabulary model was made for, each with its synonyms; empty for any other model."""
    path = folder / "styles.json"
    return dict(json.loads(path.read_text())["styles"]) if path.is_file() else {}


def available() -> list[dict[str, Any]]:
    """A row per model for `livestyle models`: name, about, licence, megabytes, ready, styles (prompts it knows)."""
    return [
        {
            "name": spec.name,
            "about": spec.about,
            "licence": spec.licence,
            "megabytes": spec.megabytes,
            "ready": (spec.folder / "model_index.json").is_file(),
            "styles": [names[0] for names in style_names(spec.folder).values()],
        }
        for spec in MODELS.values()
    ]
