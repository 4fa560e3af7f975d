"""How models are run unless the user says otherwise: by their rows, and by what is in a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from models.files import form_of, missing, weight_files
from models.folder import Folder
from models.load import load
from models.memory import weights
from models.params import Params
from models.recipe import recipe_of, remark
from models.rows import PLAIN
from models.schedule import consistency_schedule
from models.spec import MODELS
from models.weights import chosen
from stream.config import flatten, load_params, patched
from tests.folders import random_folder
from tests.hub import FakeHub, published

SIZE = (96, 64)  # width, height


@pytest.mark.parametrize("name", MODELS)
def test_every_recipe_is_settings_that_exist_and_may_be(name: str) -> None:
    recipe = recipe_of(name)
    params = load_params(model=name)
    assert recipe == MODELS[name].recipe
    assert (params.style.steps, params.style.strength) == (recipe.steps, recipe.strength)
    assert params.temporal.window == recipe.window
    assert recipe.steps <= len(recipe.timesteps or range(8))
    touched = {"style.steps", "style.strength", "style.guidance", "temporal.window"}
    rest = {k: v for k, v in flatten(params.model_dump()).items() if k not in touched}
    assert rest == {k: v for k, v in flatten(Params().model_dump()).items() if k in rest}


def test_turbo_runs_one_step_at_half_strength_and_mini_as_it_always_did() -> None:
    turbo = load_params(model="sd-turbo")
    assert (turbo.style.steps, turbo.style.strength, turbo.style.guidance) == (1, 0.5, 1.0)
    assert load_params(model="mini") == Params()
    assert recipe_of(MODELS["mini"].folder) == recipe_of("mini") == PLAIN


def test_a_fetched_folder_keeps_its_recipe_wherever_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.weights import fetch

    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with FakeHub(published("sd15-hyper", tmp_path / "published")) as hub:
        folder = fetch("sd15-hyper", endpoint=hub.url)
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert recipe_of(copy) == recipe_of(str(copy)) == MODELS["sd15-hyper"].recipe
    assert json.loads((copy / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "TCDScheduler"
    assert Folder(copy).scheduler().config["original_inference_steps"] == 50


@pytest.mark.parametrize(
    ("scheduler", "row"),
    [
        (EulerDiscreteScheduler(timestep_spacing="trailing"), "sd-turbo"),
        (EulerAncestralDiscreteScheduler(timestep_spacing="trailing"), "sdxl-turbo"),
        (TCDScheduler(), "sd15-hyper"),
        (PNDMScheduler(), "sd15-lcm"),
        (DDIMScheduler(timestep_spacing="leading"), "sd15-lcm"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_folder_of_unknown_origin_is_run_as_its_scheduler_says(scheduler: Any, row: str, tmp_path: Path) -> None:
    folder = random_folder(tmp_path, "sd")
    scheduler.save_pretrained(folder / "scheduler")
    assert recipe_of(folder) == MODELS[row].recipe
    if row != "sd15-hyper":
        (folder / "lora").mkdir()
        assert recipe_of(folder) == MODELS["sd15-lcm"].recipe


def test_other_folders_and_files_have_a_recipe_too(tmp_path: Path) -> None:
    assert recipe_of(random_folder(tmp_path / "ip2p", "ip2p")) == PLAIN  # as mini: from noise alone
    assert recipe_of(random_folder(tmp_path / "lcm", "lcm")) == MODELS["sd15-lcm"].recipe
    (tmp_path / "toon.safetensors").touch()
    assert recipe_of(tmp_path / "toon.safetensors") == MODELS["sd15-lcm"].recipe
    assert recipe_of(tmp_path / "nothing") == recipe_of("") == PLAIN
    (tmp_path / "lcm" / "scheduler" / "scheduler_config.json").write_text("[")
    (tmp_path / "lcm" / "fetched.json").write_text('{"model": ["a list"]}')
    assert recipe_of(tmp_path / "lcm") == MODELS["sd15-lcm"].recipe


def resaved(folder: Path, form: str) -> None:
    """The UNet's and the text model's weights in another form."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", **form_of(folder / "unet"))
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", **form_of(folder / "text_encoder"))
    shutil.rmtree(folder / "unet")
    for file in (folder / "text_encoder").glob("*.safetensors"):
        file.unlink()
    variant, shards = ("fp16" if "fp16" in form else None), ("40KB" if "sharded" in form else "1GB")
    if form == "pickled":
        unet.save_pretrained(folder / "unet", safe_serialization=False)
        torch.save(text.state_dict(), folder / "text_encoder" / "pytorch_model.bin")
        return
    if variant:
        unet, text = unet.half(), text.half()
    unet.save_pretrained(folder / "unet", variant=variant, max_shard_size=shards)
    text.save_pretrained(folder / "text_encoder", variant=variant, max_shard_size=shards)


@pytest.mark.parametrize("form", ["plain", "fp16", "sharded", "sharded fp16", "pickled"])
def test_weights_are_read_in_whatever_form_a_folder_has_them(form: str, tmp_path: Path) -> None:
    folder = random_folder(tmp_path, "sd")
    wanted = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    resaved(folder, form)
    assert missing(folder) == ""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32, **form_of(folder / "unet"))
    part = folder / "text_encoder"
    text = CLIPTextModel.from_pretrained(part, torch_dtype=torch.float32, **form_of(part))
    assert text.dtype == unet.dtype == torch.float32
    for name, tensor in unet.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-3)
    counts = [sum(p.numel() for p in network.parameters()) for network in (unet, text)]
    assert [weights(folder / "unet"), weights(part)] == [pytest.approx(count, rel=0.2) for count in counts]


def test_plain_weights_go_before_half_width_ones(tmp_path: Path) -> None:
    for name in ("model.fp16.safetensors", "model.non_ema.safetensors", "pytorch_model.bin", "other.safetensors"):
        (tmp_path / name).touch()
    assert form_of(tmp_path) == {"variant": "fp16", "use_safetensors": True}
    (tmp_path / "model.safetensors").touch()
    assert form_of(tmp_path) == {"variant": None, "use_safetensors": True}
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]


def test_a_model_made_for_many_steps_is_told_how_to_do_with_few(tmp_path: Path) -> None:
    folder = random_folder(tmp_path / "toon", "sd")
    PNDMScheduler().save_pretrained(folder / "scheduler")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 768}))
    assert f"`livestyle fetch sd15-lcm --base {folder}`" in remark(folder)
    (tmp_path / "toon.safetensors").touch()
    assert "--base" in remark(tmp_path / "toon.safetensors")
    TCDScheduler().save_pretrained(folder / "scheduler")
    assert remark(folder) == remark("sd-turbo") == remark(MODELS["mini"].folder) == remark(tmp_path / "none") == ""


def test_a_base_in_shards_of_half_width_keeps_its_names(tmp_path: Path) -> None:
    folder = random_folder(tmp_path, "sd")
    resaved(folder, "sharded fp16")
    kept = chosen(folder / "unet")
    assert "config.json" in kept
    assert all(name == file.name for name, file in kept.items())
    resaved(folder, "fp16")
    assert set(chosen(folder / "unet")) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert "tokenizer.json" in chosen(folder / "tokenizer")


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_hyper_sd_is_run_as_tcds_sampler_at_eta_one(steps: int, tmp_path: Path) -> None:
    """As its makers run it, in diffusers' pipeline. TCD leaves each step's x0 with the noise of timestep 0, σ = 0.029;
    without that, which comes to 0.02 of a picture's range at most, the pictures are the same.
    """
    folder = random_folder(tmp_path, "sd")
    theirs = TCDScheduler.from_config(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()))
    theirs.save_pretrained(folder / "scheduler")
    model = load(str(folder), SIZE, engine="torch", as_bytes=False)
    params = patched(load_params(model=str(folder)), {"style.prompt": "ink", "style.seed": 5, "style.strength": 1.0})
    params = patched(params, {"style.steps": steps})
    picture = torch.rand(1, 3, SIZE[1], SIZE[0], generator=torch.Generator().manual_seed(7))
    parts = {
        "vae": AutoencoderTiny.from_pretrained(folder / "vae"),
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    }
    pipeline = StableDiffusionImg2ImgPipeline(
        **parts, scheduler=theirs, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    told = {"num_inference_steps": steps, "strength": 1.0, "guidance_scale": 1.0, "eta": 1.0, "output_type": "pt"}
    with torch.inference_mode():
        found = model.stylize(model.open(params), picture, params)
    for first, most in ((theirs.alphas_cumprod[0].item(), 0.02), (1.0, 1e-3)):
        theirs.alphas_cumprod[0] = first
        wanted = pipeline("ink", image=picture, generator=torch.Generator().manual_seed(5), **told).images
        assert (found - wanted).abs().max() <= most
    theirs.set_timesteps(steps, strength=0.5)
    half = consistency_schedule(Folder(folder).scheduler(), steps, 0.5)
    assert [step.t for step in half.steps] == theirs.timesteps.tolist()
