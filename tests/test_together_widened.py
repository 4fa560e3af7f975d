"""What widens the UNet, in launches that streams share: each stream's memory and pictures stay its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from models.load import load
from models.structure import structure_of
from tests.addons import lora, random_adapter, random_controlnet, random_picture
from tests.folders import random_folder
from tests.test_stylizer_rolling import with_adapter
from tests.test_together import GUIDED, INK, SIZE, Change, agree, image, settings


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a motion adapter and an IP-Adapter, two LoRAs, a style picture and a ControlNet."""
    home = tmp_path_factory.mktemp("home")
    model = with_adapter(random_folder(home / "model", "sd"))
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    layer = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    for seed, name in enumerate(("ink", "oil")):
        save_file(lora(unet, (layer,), seed=seed), home / f"{name}.safetensors")
        random_picture(home / f"{name}.png", seed)
    random_adapter(model / "ip_adapter", unet, "base")
    random_controlnet(home / "canny", model, seed=3)
    return home


def worn(home: Path, name: str) -> list[list[Change | None]]:
    picture, tile, ink = str(home / "ink.png"), f"tile={home / 'canny'}", f"{home / 'ink.safetensors'}"
    window, bank = {"temporal.window": 4}, {"temporal.bank": 2, "temporal.bank_every": 1, "temporal.fusion": 0.5}
    four_way = {"style.guidance_mode": "four-way", "style.guidance": 2.0}
    scripts: dict[str, list[list[Change | None]]] = {
        "controls": [[{"style.control": f"{tile}:{weight}"}] * 2 for weight in (0.5, 1.5, 0)],
        "pictures": [
            [{"style.picture": picture}] * 2,
            [{"style.picture": str(home / "oil.png"), **GUIDED}],
            [{"style.picture": picture, "style.picture_scale": 1.0}],
        ],
        "windows": [
            [{**window, "cut": n == 2} for n in range(4)],
            [None, {**window, **GUIDED}, {**window, **GUIDED}],
            [window, None, window],
            [{**window, "temporal.motion_scale": 0.5}] * 2,  # which a launch has one of
        ],
        "refreshed windows": [[{**window, "temporal.refresh": 1, "style.seed": seed}] * 3 for seed in range(2)],
        "banks": [
            [{**bank, "cut": n == 2} for n in range(4)],
            [{**bank, "temporal.fusion": 0.2, "temporal.bank_every": 2, **INK}] * 4,
        ],
        "masks": [[{**four_way, "style.mask_guidance": 0.5}], [four_way]],
        "LoRAs": [
            [{"style.lora": f"{ink}:0.5"}] * 2,
            [{"style.lora": f"{ink}:0.5", **INK}] * 2,
            [{"style.lora": f"{ink}:1.5"}] * 2,  # its own scale: another launch
            [{"style.lora": f"{ink}:0.5"}, {"style.lora": f"{home / 'oil.safetensors'}:1"}],
        ],
    }
    return scripts[name]


@pytest.mark.parametrize("name", ["controls", "pictures", "windows", "refreshed windows", "banks", "masks", "LoRAs"])
def test_what_widens_the_unet_stays_its_streams_own(home: Path, name: str) -> None:
    scripts = worn(home, name)
    structure = structure_of(settings(scripts[0][0] or {}))
    model = load(str(home / "model"), SIZE, engine="torch", structure=structure)
    model.widen(4)
    agree(model, scripts)


def test_frames_of_another_company_are_refused_and_never_mixed(home: Path) -> None:
    ink = [settings({"style.lora": f"{home / 'ink.safetensors'}:{scale}"}) for scale in (0.5, 1.0)]
    model = load(str(home / "model"), SIZE, engine="torch", structure=structure_of(ink[0]))
    model.widen(2)
    frames = [(model.open(params), image(0), params) for params in ink]
    with pytest.raises(ValueError, match="cannot share"):
        model.step_together(frames)
    with pytest.raises(ValueError, match="cannot share"):
        model.step_together([(model.open(ink[0]), image(0), ink[0]) for _ in range(3)])
