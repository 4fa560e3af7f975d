"""A LoRA or style picture that is deleted while it is worn goes on; one that is written over counts from a change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from safetensors.torch import save_file

from accel.errors import UserError
from models.load import load
from models.params import Params
from models.structure import structure_of
from stream.config import patched
from tests.addons import lora, random_adapter, random_picture
from tests.folders import random_folder

SIZE = (64, 48)  # width, height
LAYER = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def frame() -> NDArray[np.uint8]:
    return np.random.default_rng(9).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)


def test_a_stream_goes_on_with_what_it_wears_and_takes_other_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a live change goes: what engines it needs, the work ahead, the next frame."""
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path))
    model = random_folder(tmp_path / "model", "sd")
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    random_adapter(model / "ip_adapter", unet, "base")
    worn = tmp_path / "loras" / "ink.safetensors", tmp_path / "pictures" / "ink.png"
    for file in worn:
        file.parent.mkdir()

    def written(seed: int) -> None:
        save_file(lora(unet, (LAYER,), seed=seed), worn[0])
        random_picture(worn[1], seed)
        for file in worn:
            os.utime(file, ns=(seed, seed))  # clocks of file systems are coarse

    written(1)

    def settings(**changes: Any) -> Params:
        first = {"strength": 0.6, "lora": "ink:0.5", "picture": "ink.png"}
        return patched(Params(), {f"style.{key}": value for key, value in {**first, **changes}.items()})

    before = settings()
    built = structure_of(before)
    stylizer = load(str(model), SIZE, engine="torch", structure=built)
    state = stylizer.open(before)
    wanted = stylizer.step(state, frame(), before).image()

    def turned(**changes: Any) -> NDArray[np.uint8] | None:
        params = settings(**changes)
        assert built.covers(structure_of(params))
        stylizer.prepare(params)
        return stylizer.step(state, frame(), params).image()

    for file in worn:
        file.unlink()
    assert np.array_equal(turned(), wanted)
    for change in ({"prompt": "ink"}, {"guidance": 2.0}, {"lora": "ink:0.9"}, {"picture_scale": 1.0}):
        assert not np.array_equal(turned(**change), wanted)
    turned(lora="", picture="")
    assert np.array_equal(turned(), wanted)  # put on again: it is still known
    for change in ({"lora": "ink, oil"}, {"picture": "oil.png"}):
        with pytest.raises(UserError, match="oil"):
            turned(**change)
    assert np.array_equal(turned(), wanted)

    written(2)
    assert np.array_equal(stylizer.step(state, frame(), before).image(), wanted)  # frames look at no files
    for change in ({"picture": ""}, {"lora": ""}):
        written(1)
        first = turned(**change)
        written(2)
        assert not np.array_equal(turned(**change), first)
