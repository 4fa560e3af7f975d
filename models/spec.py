"""The table of models: a Stable-Diffusion-family model is one row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.rows import PLAIN, Recipe, Row, Source, models_root

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
WEIGHTS = "diffusion_pytorch_model.safetensors"
HALF = "diffusion_pytorch_model.fp16.safetensors"
WORDS = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True, slots=True)
class ModelSpec(Row):
    """One model; its folder is in diffusers' format."""

    size: tuple[int, int] = (512, 288)  # (width, height) that suits it
    packaged: Path | None = None  # its folder, where it comes with livestyle
    pipeline: str = "StableDiffusionPipeline"  # the class in diffusers that the folder is of
    recipe: Recipe = PLAIN

    @property
    def folder(self) -> Path:
        return self.packaged or models_root() / self.name


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
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
HYPER, LIGHTNING = "ByteDance/Hyper-SD", "ByteDance/SDXL-Lightning"
# Hyper-SD's one-step LoRAs are run with TCD's sampler at eta 1, one to eight steps (Ren et al. 2024, arXiv 2404.13686):
# on LCM's timesteps, x0 and then noise anew, which but for timestep 0's noise is multistep consistency sampling.
HYPER_RECIPE = Recipe(steps=1, strength=0.5, prediction="epsilon", scheduler=(("_class_name", "TCDScheduler"),))
BASE_XL = (
    _unet(SDXL),
    *_words(SDXL),
    *_words(SDXL, "CLIPTextModelWithProjection", "_2"),
    _schedule(SDXL),
    _tiny("madebyollin/taesdxl"),
)
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
            recipe=Recipe(steps=1, strength=0.5, prediction="epsilon", timesteps=TURBO_STEPS, sampler="euler"),
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
            name="sd15-hyper",
            about="Stable Diffusion 1.5, or a checkpoint of yours (fetch --base), in one step; wants a GPU",
            licence="CreativeML OpenRAIL-M, Hyper-SD OpenRAIL++, TAESD MIT",
            megabytes=2246,
            size=(512, 512),
            sources=(
                *BASE15,
                _tiny("madebyollin/taesd"),
                Source("lora", HYPER, ("Hyper-SD15-1step-lora.safetensors",)),
            ),
            recipe=HYPER_RECIPE,
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
            recipe=Recipe(steps=1, strength=0.5, prediction="epsilon", timesteps=TURBO_STEPS, sampler="ancestral"),
        ),
        ModelSpec(
            name="sdxl-hyper",
            about="Stable Diffusion XL in one step; wants a big GPU",
            licence="OpenRAIL++, Hyper-SD OpenRAIL++, TAESDXL MIT",
            megabytes=7571,
            size=(512, 512),
            pipeline="StableDiffusionXLPipeline",
            sources=(*BASE_XL, Source("lora", HYPER, ("Hyper-SDXL-1step-lora.safetensors",))),
            recipe=HYPER_RECIPE,
        ),
        ModelSpec(
            name="sdxl-lightning",
            about="Stable Diffusion XL in two steps of four; wants a big GPU",
            licence="OpenRAIL++, SDXL-Lightning OpenRAIL++, TAESDXL MIT",
            megabytes=7178,
            size=(512, 512),
            pipeline="StableDiffusionXLPipeline",
            sources=(*BASE_XL, Source("lora", LIGHTNING, ("sdxl_lightning_4step_lora.safetensors",))),
            recipe=Recipe(
                steps=2,
                strength=0.5,
                prediction="epsilon",
                timesteps=TURBO_STEPS,  # trailing, of four
                sampler="euler",
                scheduler=(("timestep_spacing", "trailing"),),
            ),
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
                window=8,
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
