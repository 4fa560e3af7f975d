"""The tables of models and add-ons say what can be fetched, and what is here."""

from __future__ import annotations

from pathlib import Path

import pytest

from accel.errors import UserError
from models.addons import ADDONS, AddOn, addon, addons, family_of
from models.rows import models_root
from models.spec import MODELS, ModelSpec, available
from models.units import KINDS

FETCHED = [spec for spec in MODELS.values() if spec.sources]


XL = ("sdxl-turbo", "sdxl-hyper", "sdxl-lightning")


def test_the_published_models_and_the_embedded_one_are_rows() -> None:
    assert list(MODELS) == ["mini", "sd-turbo", "sd15-lcm", "sd15-hyper", *XL, "animatediff-lcm"]


def test_a_model_that_is_not_fetched_is_listed_and_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path))
    ready = {row["name"]: row["ready"] for row in available()}
    assert ready == {name: name == "mini" for name in MODELS}
    (tmp_path / "sd-turbo").mkdir()
    assert not available()[1]["ready"]  # an empty folder is no model
    (tmp_path / "sd-turbo" / "model_index.json").write_text("{}")
    assert available()[1]["ready"]


def test_the_folder_of_models_is_the_users_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path))
    assert models_root() == tmp_path
    monkeypatch.setenv("LIVESTYLE_MODELS", "")
    monkeypatch.setenv("LIVESTYLE_CACHE", str(tmp_path / "cache"))
    assert models_root() == tmp_path / "cache" / "models"
    monkeypatch.setenv("LIVESTYLE_CACHE", "")
    assert models_root().parts[-2:] == ("livestyle", "models")


@pytest.mark.parametrize("spec", FETCHED, ids=lambda spec: spec.name)
def test_every_row_names_all_parts_of_a_folder(spec: ModelSpec) -> None:
    parts = [source.part for source in spec.sources]
    assert len(set(parts)) == len(parts)
    assert {"unet", "vae", "text_encoder", "tokenizer", "scheduler"} <= set(parts)
    assert ("tokenizer_2" in parts) == (spec.name in XL)
    assert ("tokenizer_2" in parts) == (spec.pipeline == "StableDiffusionXLPipeline")
    assert spec.licence
    assert spec.size == (512, 512)


@pytest.mark.parametrize("spec", FETCHED, ids=lambda spec: spec.name)
def test_only_half_width_safetensors_are_fetched(spec: ModelSpec) -> None:
    """Full-width and pickled copies would double the download; TAESD and the LoRAs are published in one form."""
    for source in spec.sources:
        weights = [file for file in source.files if "/" in file and file.endswith(".safetensors")]
        assert all(".fp16." in file for file in weights)
        assert not [file for file in source.files if file.endswith((".bin", ".ckpt", ".onnx"))]


def test_animatediff_runs_on_linear_betas_with_its_lora_at_four_fifths() -> None:
    recipe = MODELS["animatediff-lcm"].recipe
    assert dict(recipe.scheduler) == {"beta_schedule": "linear"}
    assert recipe.lora_scale == 0.8


def test_turbo_models_know_four_noise_levels_and_their_own_samplers() -> None:
    """`EulerDiscreteScheduler` and `EulerAncestralDiscreteScheduler` of their published folders."""
    for name, sampler in (("sd-turbo", "euler"), ("sdxl-turbo", "ancestral"), ("sdxl-lightning", "euler")):
        assert MODELS[name].recipe.timesteps == (999, 749, 499, 249)
        assert MODELS[name].recipe.sampler == sampler
    assert MODELS["sd15-hyper"].recipe.timesteps is None


@pytest.mark.parametrize("row", ADDONS.values(), ids=lambda row: row.name)
def test_every_add_on_is_one_folder_that_loaders_read(row: AddOn) -> None:
    targets = [f"{source.part}/{file}" for source in row.sources for file in source.files]
    assert len({Path(target).name for target in targets} - {"config.json", "model.safetensors"}) >= len(targets) - 3
    weights = [target for target in targets if Path(target).suffix in (".safetensors", ".bin", ".onnx", ".pth")]
    assert len(weights) == 1 + (row.kind == "picture")
    assert row.name not in MODELS
    assert row.licence
    assert row.megabytes > 0
    assert row.family in ("", "sd15", "sd21", "sdxl")


def test_add_ons_are_listed_apart_with_their_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path))
    assert not {row["name"] for row in addons()} & {row["name"] for row in available()}
    assert not any(row["ready"] for row in addons())
    with pytest.raises(UserError, match=r"controlnet-sd15-canny is not here yet \(723 MB\)") as caught:
        addon("canny", family_of({"cross_attention_dim": 768}))
    assert caught.value.hint == "`livestyle fetch controlnet-sd15-canny`"
    with pytest.raises(UserError, match=r"ip-adapter-sdxl is not here yet \(3.2 GB\)"):
        addon("picture", family_of({"cross_attention_dim": 2048}))
    for kind in ("safety", "distances", "bodies"):
        with pytest.raises(UserError, match="not here yet"):
            addon(kind)


def test_where_no_add_on_is_known_one_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path))
    with pytest.raises(UserError, match="no ControlNet for tile is known for Stable Diffusion XL") as caught:
        addon("tile", "sdxl")
    assert caught.value.hint == "there are ones for canny, depth; one of yours: style.control=tile=FOLDER"
    with pytest.raises(UserError, match="this kind of model") as caught:
        addon("picture", family_of({"cross_attention_dim": 96}))
    assert caught.value.hint == "one of yours: style.picture_adapter=FOLDER"


def test_every_control_that_pictures_are_drawn_for_has_a_control_net() -> None:
    assert {row.kind for row in ADDONS.values() if row.name.startswith("controlnet-")} == {*KINDS}
