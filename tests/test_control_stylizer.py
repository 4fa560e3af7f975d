"""ControlNets through the stylizer: equal to diffusers, live from frame to frame, the same in a stream batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accel.errors import UserError
from models.load import load
from models.params import Params, Style, Temporal
from models.structure import structure_of
from models.stylizer import LatentStylizer
from tests.folders import random_folder, random_xl_folder
from tests.test_controlnet import (
    NEGATIVE,
    PROMPT,
    SIZE,
    TOLERANCE,
    floats,
    named,
    picture,
    random_controlnet,
    theirs,
)


def params(control: str, steps: int = 1, guidance: float = 1.0, *, batch: bool = False, **style: Any) -> Params:
    wanted = Style(prompt=PROMPT, negative=NEGATIVE, steps=steps, guidance=guidance, seed=5, control=control, **style)
    return Params(style=wanted, temporal=Temporal(stream_batch=batch))


def made(folder: Path, settings: Params, *, as_bytes: bool = True) -> LatentStylizer:
    return load(str(folder), SIZE, engine="torch", structure=structure_of(settings), as_bytes=as_bytes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_folder(tmp_path_factory.mktemp("sd"), "sd")


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("nets")
    return {kind: random_controlnet(root / kind, folder, seed) for seed, kind in enumerate(("canny", "tile"))}


@pytest.mark.parametrize("xl", [False, True])
def test_the_stylizer_equals_diffusers(tmp_path: Path, folder: Path, nets: dict[str, Path], xl: bool) -> None:
    if xl:
        folder = random_xl_folder(tmp_path / "xl")
        nets = {kind: random_controlnet(tmp_path / kind, folder, seed) for seed, kind in enumerate(nets)}
    settings = params(named("canny:0.7@0-0.5, tile:1.5@0.25-1", nets), 4, 3.0)
    ours = made(folder, settings, as_bytes=False)
    with torch.inference_mode():
        state = ours.open(settings)
        picture_ = ours.stylize(state, floats(picture()), settings)
        expected = theirs(
            folder,
            nets,
            4,
            guidance_scale=3.0,
            controlnet_conditioning_scale=[0.7, 1.5],
            control_guidance_start=[0.0, 0.25],
            control_guidance_end=[0.5, 1.0],
        )
        assert (picture_ - ours.networks.decode(expected)[0]).abs().max() <= TOLERANCE


def test_a_stream_batch_gives_the_same_pictures_while_weights_change(folder: Path, nets: dict[str, Path]) -> None:
    settings = ["canny:0.7, tile:0@0.5-1", "tile:1", "", "canny:0.2!prompt, tile:0.4", "canny:0", "canny", "tile:0.2"]
    pictures = [np.random.default_rng(i).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8) for i in range(7)]
    found = []
    for batch in (False, True):
        first = params(named("canny, tile", nets), 4, batch=batch)
        ours = made(folder, first)
        state = ours.open(first)
        shown = []
        for text, image in zip(settings, pictures, strict=True):
            now = params(named(text, nets), 4, batch=batch)
            ours.prepare(now)
            shown.append(ours.step(state, image, now).image())
        found.append([image for image in (*shown, *ours.drain(state)) if image is not None])
    assert len(found[0]) == len(found[1]) == len(pictures)
    for one, other in zip(*found, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_weights_are_live_and_0_is_none(folder: Path, nets: dict[str, Path]) -> None:
    ours, bare = made(folder, params(named("tile", nets))), made(folder, params(""))
    state, other = ours.open(params("")), bare.open(params(""))
    plain = bare.step(other, picture(), params("")).image()
    steered = {}
    for weight in (0, 1, 0.3, 0):
        image = ours.step(state, picture(), params(named(f"tile:{weight}", nets))).image()
        assert image is not None
        assert (image == plain).all() == (weight == 0)
        steered[weight] = image.tobytes()
    assert len(set(steered.values())) == 3


def test_bad_settings_are_told_before_the_first_frame(
    folder: Path, nets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path / "models"))
    for control, message in [
        ("sketch:1", "no such control"),
        ("canny:3", "weight"),
        (f"canny={tmp_path}", "is no ControlNet"),
        ("canny", "no ControlNet for"),
        (f"openpose={nets['tile']}", "rtmo-small is not here yet"),
    ]:
        with pytest.raises(UserError, match=message):
            made(folder, params(control)).open(params(control))
