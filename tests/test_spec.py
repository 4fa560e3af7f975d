"""The table of models says what can be fetched, and what is here."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.spec import MODELS, ModelSpec, available, models_root

FETCHED = [spec for spec in MODELS.values() if spec.sources]


def test_the_four_published_models_and_the_embedded_one_are_rows() -> None:
    assert list(MODELS) == ["mini", "sd-turbo", "sd15-lcm", "sdxl-turbo", "animatediff-lcm"]


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
