"""Per-stream memory, settings and errors of the stylizer, on a small random folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from accel.errors import UserError
from models.load import load
from models.noise import drifted, fed_back
from models.params import Params, Style, Temporal
from models.stylizer import LatentStylizer
from tests.folders import random_folder

SIZE = (64, 48)


@pytest.fixture(scope="module")
def stylizer(tmp_path_factory: pytest.TempPathFactory) -> LatentStylizer:
    return load(str(random_folder(tmp_path_factory.mktemp("model"), "ip2p")), SIZE, engine="torch")


def picture(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)


def params(**style: object) -> Params:
    return Params(style=Style.model_validate({"prompt": "oil painting", "steps": 2, **style}))


def test_output_is_a_picture_of_the_same_shape_and_its_own_memory(stylizer: LatentStylizer) -> None:
    state = stylizer.open(params())
    first = stylizer.step(state, picture(0), params()).image()
    kept = first.copy()
    stylizer.step(state, picture(1), params()).image()
    assert first.shape == (SIZE[1], SIZE[0], 3)
    assert first.dtype == np.uint8
    assert first.flags["C_CONTIGUOUS"]
    assert np.array_equal(first, kept)


def test_the_source_picture_is_not_changed(stylizer: LatentStylizer) -> None:
    image = picture(0)
    kept = image.copy()
    stylizer.step(stylizer.open(params()), image, params())
    assert np.array_equal(image, kept)


def test_two_streams_on_one_model_do_not_see_each_other(stylizer: LatentStylizer) -> None:
    a, b = params(seed=1, seed_mode="per-frame"), params(seed=2, prompt="ink", seed_mode="per-frame")

    def alone(settings: Params, seeds: range) -> list[NDArray[np.uint8]]:
        state = stylizer.open(settings)
        return [stylizer.step(state, picture(i), settings).image() for i in seeds]

    wanted_a, wanted_b = alone(a, range(3)), alone(b, range(10, 13))
    state_a, state_b = stylizer.open(a), stylizer.open(b)
    for i in range(3):
        assert np.array_equal(stylizer.step(state_a, picture(i), a).image(), wanted_a[i])
        assert np.array_equal(stylizer.step(state_b, picture(10 + i), b).image(), wanted_b[i])


def test_fixed_seed_repeats_and_per_frame_seed_does_not(stylizer: LatentStylizer) -> None:
    for mode, same in (("fixed", True), ("per-frame", False)):
        settings = params(seed_mode=mode)
        state = stylizer.open(settings)
        frames = [stylizer.step(state, picture(0), settings).image() for _ in range(2)]
        assert np.array_equal(*frames) is same, mode


@pytest.mark.parametrize("change", [{"prompt": "ink"}, {"seed": 9}, {"steps": 3}, {"strength": 0.4}, {"guidance": 4.0}])
def test_a_live_change_equals_a_fresh_start(stylizer: LatentStylizer, change: dict[str, object]) -> None:
    before, after = params(), params(**change)
    state = stylizer.open(before)
    stylizer.step(state, picture(0), before)
    changed = stylizer.step(state, picture(0), after).image()
    fresh = stylizer.step(stylizer.open(after), picture(0), after).image()
    assert np.array_equal(changed, fresh)
    assert not np.array_equal(changed, stylizer.step(stylizer.open(before), picture(0), before).image())


def test_stages_account_for_the_frame(stylizer: LatentStylizer) -> None:
    launched = stylizer.step(stylizer.open(params()), picture(0), params())
    launched.wait()
    stages = launched.stages_ms
    assert set(stages) == {"pixels", "schedule", "encode", "unet", "decode"}
    assert all(ms >= 0 for ms in stages.values())


def test_another_size_is_refused(stylizer: LatentStylizer) -> None:
    with pytest.raises(ValueError, match="size"):
        stylizer.step(stylizer.open(params()), np.zeros((8, 8, 3), np.uint8), params())


@pytest.mark.parametrize("broken", ["missing", "empty", "garbage"])
def test_a_bad_folder_is_the_users_error(tmp_path: Path, broken: str) -> None:
    folder = tmp_path / broken
    if broken != "missing":
        folder.mkdir()
    if broken == "garbage":
        (folder / "model_index.json").write_text("not json")
    with pytest.raises(UserError) as caught:
        load(str(folder), SIZE, engine="torch")
    assert caught.value.hint


def test_a_truncated_weight_file_is_the_users_error(tmp_path: Path) -> None:
    folder = random_folder(tmp_path, "sd")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="unet"):
        load(str(folder), SIZE, engine="torch")


def still(dx: float = 0.0, dy: float = 0.0) -> Tensor:
    """A motion of the whole scene, in pixels of the picture."""
    return torch.tensor([dx, dy]).view(1, 2, 1, 1).expand(1, 2, SIZE[1], SIZE[0])


class TestNoiseThatMoves:
    def test_it_is_the_fixed_noise_while_nothing_moves(self, stylizer: LatentStylizer) -> None:
        fixed, moving = params(seed_mode="fixed"), params(seed_mode="flow")
        wanted = stylizer.step(stylizer.open(fixed), picture(0), fixed).image()
        state = stylizer.open(moving)
        for _ in range(3):
            assert np.array_equal(stylizer.step(state, picture(0), moving).image(), wanted)
            stylizer.moved(state, still())

    def test_it_goes_with_the_scene_whole(self) -> None:
        noise = torch.randn(1, 4, 6, 8)
        travel = torch.zeros(1, 2, 6, 8)
        travel[:, 0], travel[:, 1] = 2, -1
        assert torch.equal(drifted(noise, travel), noise.roll((1, -2), (2, 3)))
        assert torch.equal(drifted(noise, 0.4 * travel / 2), noise)

    def test_slow_motion_adds_up(self, stylizer: LatentStylizer) -> None:
        state = stylizer.open(params())
        for _ in range(16):
            stylizer.moved(state, still(1, 0))  # an eighth of a latent pixel
        assert state.travel is not None
        assert torch.equal(drifted(state.noises[0], state.travel), state.noises[0].roll(-2, 3))

    def test_its_statistics_stay(self) -> None:
        noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
        moved = drifted(noise, 20 * torch.randn(1, 2, 1, 1).expand(1, 2, 32, 32))
        assert torch.equal(moved.flatten().sort().values, noise.flatten().sort().values)


class TestFeedback:
    def test_none_is_the_model_as_it_is_and_a_cut_forgets(self, stylizer: LatentStylizer) -> None:
        plain = params(strength=0.5)
        fed = plain.model_copy(update={"temporal": Temporal(feedback=0.3)})
        first = stylizer.step(stylizer.open(plain), picture(0), plain).image()
        state = stylizer.open(fed)
        assert np.array_equal(stylizer.step(state, picture(0), fed).image(), first)
        assert not np.array_equal(stylizer.step(state, picture(0), fed).image(), first)
        stylizer.forget(state)
        assert np.array_equal(stylizer.step(state, picture(0), fed).image(), first)

    def test_the_last_result_is_carried_along_the_motion(self) -> None:
        source, before = torch.zeros(1, 5, 6, 8), torch.randn(1, 5, 6, 8)
        moved = torch.zeros(1, 2, 6, 8)
        moved[:, 0] = 2
        mixed = fed_back(source, before, moved, 0.25)
        torch.testing.assert_close(mixed[..., :-2], 0.25 * before[..., 2:])

    def test_at_strength_1_it_is_said_to_do_nothing(self, stylizer: LatentStylizer) -> None:
        settings = params().model_copy(update={"temporal": Temporal(feedback=0.3)})
        assert "strength 1" in stylizer.advice(settings)
