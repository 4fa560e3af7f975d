from __future__ import annotations

from pathlib import Path

import pytest

from accel.errors import UserError
from models.params import Params
from stream.config import PRESETS, keys, load_params, moved, parse_size, patched


def test_a_later_layer_wins(tmp_path: Path) -> None:
    toml = tmp_path / "my.toml"
    toml.write_text('[style]\nprompt = "from toml"\nseed = 5\nsteps = 3\n')
    params = load_params("quality", toml, ["style.seed=6", "style.prompt=from set"], {"style.prompt": "from flag"})
    assert params.style.prompt == "from flag"
    assert params.style.seed == 6
    assert params.style.steps == 3  # the preset says 4
    assert params.sink.crf == PRESETS["quality"]["sink.crf"]
    assert params.style.negative == Params().style.negative


def test_every_preset_is_valid() -> None:
    for name in PRESETS:
        load_params(name)


def test_dotted_and_nested_toml_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('style.prompt = "ink"')
    (tmp_path / "b.toml").write_text('[style]\nprompt = "ink"')
    assert load_params(config=tmp_path / "a.toml") == load_params(config=tmp_path / "b.toml")


@pytest.mark.parametrize(
    ("key", "nearest"), [("style.promt", "style.prompt"), ("prompt", "style.prompt"), ("sink.codek", "sink.codec")]
)
def test_an_unknown_key_is_named_with_the_nearest_one(key: str, nearest: str) -> None:
    with pytest.raises(UserError) as caught:
        load_params(sets=[f"{key}=x"])
    assert key in caught.value.message
    assert nearest in caught.value.hint


@pytest.mark.parametrize("pair", ["style.steps=many", "style.steps=99", "sink.codec=divx", "style.strength=nan"])
def test_a_bad_value_names_its_key(pair: str) -> None:
    with pytest.raises(UserError) as caught:
        load_params(sets=[pair])
    assert pair.partition("=")[0] in caught.value.message
    assert caught.value.hint


def test_a_set_without_a_value_and_an_unknown_preset_are_refused() -> None:
    for wrong in ({"sets": ["style.steps"]}, {"preset": "fsat"}):
        with pytest.raises(UserError):
            load_params(**wrong)  # type: ignore[arg-type]


def test_a_value_may_contain_an_equals_sign() -> None:
    assert load_params(sets=["style.prompt=a=b"]).style.prompt == "a=b"


def test_a_missing_or_broken_file_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("[style\n")
    for name in ("missing.toml", "broken.toml"):
        with pytest.raises(UserError, match=name):
            load_params(config=tmp_path / name)


def test_a_table_where_a_value_belongs_and_the_reverse_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("style = 3")
    (tmp_path / "b.toml").write_text("[style.prompt]\nx = 1")
    for name in ("a.toml", "b.toml"):
        with pytest.raises(UserError):
            load_params(config=tmp_path / name)


def test_patching_makes_new_settings() -> None:
    old = Params()
    new = patched(old, {"style.seed": 9})
    assert new.style.seed == 9
    assert old.style.seed != 9
    assert "style.prompt" in keys()


@pytest.mark.parametrize(
    ("text", "size", "noted"),
    [
        ("512x288", (512, 288), False),
        ("513x77", (512, 80), True),
        ("10x10", (64, 64), True),
        ("640X360", (640, 360), False),
    ],
)
def test_sizes_become_multiples_of_eight_with_one_line(text: str, size: tuple[int, int], noted: bool) -> None:
    got, note = parse_size(text)
    assert got == size
    assert bool(note) == noted
    assert "\n" not in note


@pytest.mark.parametrize("text", ["512", "axb", "512x", "-8x8", "99999x8", "0x0", "0x64", ""])
def test_a_bad_size_is_the_users_error(text: str) -> None:
    with pytest.raises(UserError):
        parse_size(text)


def test_the_models_recipe_lies_under_every_other_layer(tmp_path: Path) -> None:
    toml = tmp_path / "my.toml"
    toml.write_text("[style]\nstrength = 0.4\n")
    assert load_params() == Params()
    bare = load_params(model="sd15-lcm")
    assert (bare.style.steps, bare.style.strength) == (4, 0.5)
    assert load_params(model="sd15-lcm", config=toml).style.strength == 0.4
    assert load_params("fast", toml, model="sd15-lcm").style.steps == 1
    assert load_params("fast", toml, ["style.steps=3"], model="sd15-lcm").style.steps == 3
    assert load_params("fast", toml, ["style.steps=3"], {"style.steps": 2}, model="sd15-lcm").style.steps == 2
    assert load_params(model="no such model") == Params()  # said where it is loaded


def test_settings_follow_to_another_model_where_nobody_has_touched_them() -> None:
    turbo = load_params(model="sd-turbo", sets=["style.prompt=ink"])
    there = moved(turbo, "sd-turbo", "animatediff-lcm")
    assert (there.style.steps, there.temporal.window, there.style.prompt) == (4, 8, "ink")
    assert moved(there, "animatediff-lcm", "sd-turbo") == turbo
    assert moved(turbo, "sd-turbo", "mini").style.strength == 1.0
    touched = patched(turbo, {"style.strength": 0.3})
    assert moved(touched, "sd-turbo", "mini").style.strength == 0.3
    assert moved(turbo, "sd-turbo", "sd-turbo") is not None
