"""The table of models: a Stable-Diffusion-family model is one row."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
WEIGHTS = "diffusion_pytorch_model.safetensors"
HALF = "diffusion_pytorch_model.fp16.safetensors"
WORDS = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True, slots=True)
class Source:
    """Which hub repository gives one part of a model, and which of its files.

    A file goes into the folder `part` under its own name, "fp16." taken out.
    """

    part: str  # unet, vae, text_encoder, …; also lora and motion_adapter
    repo: str
    files: tuple[str, ...]  # paths in the repository
    kind: tuple[str, str] | None = None  # (library, class) for model_index.json
    revision: str | None = None  # None = the newest: no commit of these could be checked where this was written
    sha256: tuple[tuple[str, str], ...] = ()  # (file, digest) beyond the digests that the hub itself states
    own: bool = False  # a checkpoint of the user's may stand in for it


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model was made to be run; None where its makers fix nothing."""

    steps: int = 1
    strength: float = 1.0
    guidance: float = 1.0  # ≤ 1 = off
    prediction: str | None = None
    timesteps: tuple[int, ...] | None = None  # that it was distilled on, noisiest first
    scheduler: tuple[tuple[str, Any], ...] = ()  # written over the base's scheduler_config.json
    lora_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One row: where the folder is and what a user should know before choosing it."""

    name: str
    about: str
    licence: str
    megabytes: float
    size: tuple[int, int] = (512, 288)  # (width, height) that suits it
    packaged: Path | None = None  # its folder, where it comes with livestyle
    pipeline: str = "StableDiffusionPipeline"  # the class in diffusers that the folder is of
    sources: tuple[Source, ...] = ()  # what `livestyle fetch` brings
    recipe: Recipe = Recipe()

    @property
    def folder(self) -> Path:
        """In diffusers' format; not there until the model is fetched."""
        return self.packaged or models_root() / self.name


def models_root() -> Path:
    """The folder of fetched models: `$LIVESTYLE_MODELS`, else `models` beside the stored engines."""
    from platformdirs import user_cache_dir

    # An empty variable means unset, as in the XDG specification.
    cache = Path(os.environ.get("LIVESTYLE_CACHE") or user_cache_dir("livestyle"))
    return Path(os.environ.get("LIVESTYLE_MODELS") or cache / "models")


def _unet(repo: str, *, own: bool = False) -> Source:
    return Source("unet", repo, ("unet/config.json", f"unet/{HALF}"), ("diffusers", "UNet2DConditionModel"), own=own)


def _words(repo: str, kind: str = "CLIPTextModel", suffix: str = "", *, own: bool = False) -> tuple[Source, Source]:
    """A text encoder and its tokenizer."""
    text, words = f"text_encoder{suffix}", f"tokenizer{suffix}"
    return (
        Source(text, repo, (f"{text}/config.json", f"{text}/model.fp16.safetensors"), ("transformers", kind), own=own),
        Source(words, repo, tuple(f"{words}/{file}" for file in WORDS), ("transformers", "CLIPTokenizer"), own=own),
    )


def _schedule(repo: str, *, own: bool = False) -> Source:
    return Source("scheduler", repo, ("scheduler/scheduler_config.json",), own=own)  # the file names its class


def _tiny(repo: str) -> Source:
    return Source("vae", repo, ("config.json", WEIGHTS), ("diffusers", "AutoencoderTiny"))


BASE15 = (_unet(SD15, own=True), *_words(SD15, own=True), _schedule(SD15, own=True))
TURBO_STEPS = (999, 749, 499, 249)  # adversarial diffusion distillation, Sauer et al. 2023, §3

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="mini",
            packaged=Path(__file__).parent / "mini",
            about="the embedded default: thirteen painted styles, one step, real time on two CPU cores",
            licence="Apache-2.0",
            megabytes=13.8,
        ),
        ModelSpec(
            name="sd-turbo",
            about="any prompt in one step; wants a GPU",
            licence="Stability AI (commercial use: stability.ai/license), TAESD MIT",
            megabytes=2424,
            size=(512, 512),
            sources=(
                _unet("stabilityai/sd-turbo"),
                *_words("stabilityai/sd-turbo"),
                _schedule("stabilityai/sd-turbo"),
                _tiny("madebyollin/taesd"),
            ),
            recipe=Recipe(steps=1, strength=0.5, prediction="epsilon", timesteps=TURBO_STEPS),
        ),
        ModelSpec(
            name="sd15-lcm",
            about="Stable Diffusion 1.5, or a checkpoint of yours (fetch --base), in four steps; wants a GPU",
            licence="CreativeML OpenRAIL-M, LCM-LoRA OpenRAIL++, TAESD MIT",
            megabytes=2112,
            size=(512, 512),
            sources=(
                *BASE15,
                _tiny("madebyollin/taesd"),
                Source("lora", "latent-consistency/lcm-lora-sdv1-5", ("pytorch_lora_weights.safetensors",)),
            ),
            recipe=Recipe(steps=4, strength=0.5, prediction="epsilon"),
        ),
        ModelSpec(
            name="sdxl-turbo",
            about="the larger Turbo: finer pictures, one step; wants a big GPU",
            licence="Stability AI non-commercial (else: stability.ai/license), TAESDXL MIT",
            megabytes=6784,
            size=(512, 512),
            pipeline="StableDiffusionXLPipeline",
            sources=(
                _unet("stabilityai/sdxl-turbo"),
                *_words("stabilityai/sdxl-turbo"),
                *_words("stabilityai/sdxl-turbo", "CLIPTextModelWithProjection", "_2"),
                _schedule("stabilityai/sdxl-turbo"),
                _tiny("madebyollin/taesdxl"),
            ),
            recipe=Recipe(steps=1, strength=0.5, prediction="epsilon", timesteps=TURBO_STEPS),
        ),
        ModelSpec(
            name="animatediff-lcm",
            about="Stable Diffusion 1.5 with AnimateLCM's motion: frames that see each other; wants a GPU",
            licence="CreativeML OpenRAIL-M, TAESD MIT; AnimateLCM's weights declare none",
            megabytes=3020,
            size=(512, 512),
            sources=(
                *BASE15,
                _tiny("madebyollin/taesd"),
                Source("motion_adapter", "wangfuyun/AnimateLCM", ("config.json", HALF)),
                Source("lora", "wangfuyun/AnimateLCM", ("AnimateLCM_sd15_t2v_lora.safetensors",)),
            ),
            recipe=Recipe(
                steps=4,
                strength=0.5,
                prediction="epsilon",
                scheduler=(("beta_schedule", "linear"),),
                lora_scale=0.8,
            ),
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
