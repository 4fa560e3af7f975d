"""Streams through a model with a motion adapter: what a frame may know of those before it, and what never."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import MotionAdapter
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from accel.engine import EngineSpec, Pending, Ready
from accel.errors import UserError
from accel.openvino_backend import OpenVINOBackend
from models.folder import Folder
from models.load import load
from models.motion import Motion
from models.networks import graphs
from models.params import Params, Style, Temporal
from models.rolling import Rolling, Window, Windowed
from models.state import State
from models.structure import Structure
from models.stylizer import LatentStylizer
from tests.folders import random_folder

SIZE = (64, 48)
WINDOW = 5
KINDS = ("sd", "ip2p", "lcm")


def with_adapter(folder: Path, only: list[str] | None = None) -> Path:
    """Put a random motion adapter into a folder, cut down to some of its modules."""
    torch.manual_seed(1)
    path = folder / "motion_adapter"
    options = {"motion_num_attention_heads": 4, "motion_norm_num_groups": 8, "motion_max_seq_length": 12}
    MotionAdapter(block_out_channels=(32, 64), motion_layers_per_block=1, **options).save_pretrained(path)
    if only is not None:
        keep(path, only, only)
    return folder


def keep(path: Path, named: list[str], saved: list[str]) -> None:
    """Name some modules in an adapter's configuration and leave the weights of some in the file."""
    weights = path / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if k.startswith(tuple(saved))}, weights)
    config = path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "only": named}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {kind: with_adapter(random_folder(root / kind, kind)) for kind in KINDS}
    return {**found, "bare": random_folder(root / "bare", "sd")}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> Callable[..., LatentStylizer]:
    known: dict[tuple[str, int], LatentStylizer] = {}

    def get(kind: str = "ip2p", window: int = WINDOW) -> LatentStylizer:
        if (kind, window) not in known:
            known[kind, window] = load(str(folders[kind]), SIZE, engine="torch", structure=Structure(window=window))
        return known[kind, window]

    return get


@pytest.fixture(scope="module")
def photograph() -> NDArray[np.uint8]:
    from skimage import data

    return np.ascontiguousarray(data.astronaut()[:192, 128:320])


def picture(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)


def params(scale: float = 1.0, **style: object) -> Params:
    told = {"prompt": "oil painting", "seed_mode": "per-frame", **style}
    return Params(style=Style.model_validate(told), temporal=Temporal(motion_scale=scale))


def played(model: LatentStylizer, state: State, settings: Params, seeds: range) -> list[NDArray[np.uint8]]:
    return [model.step(state, picture(i), settings).image() for i in seeds]


def fresh(model: LatentStylizer, settings: Params, seeds: range) -> list[NDArray[np.uint8]]:
    return played(model, model.open(settings), settings, seeds)


def same(a: list[NDArray[np.uint8]], b: list[NDArray[np.uint8]]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


STYLES: list[tuple[str, dict[str, Any]]] = [
    ("sd", {}),
    ("sd", {"steps": 3, "guidance": 3.0, "strength": 0.6}),
    ("ip2p", {"steps": 2}),
    ("ip2p", {"steps": 2, "guidance": 3.0}),
    ("ip2p", {"guidance": 3.0, "image_guidance": 1.5}),
    ("lcm", {"steps": 2, "guidance": 5.0}),
]


@pytest.mark.parametrize(("kind", "style"), STYLES)
def test_motion_scale_zero_is_the_model_without_a_window(
    loaded: Callable[..., LatentStylizer], kind: str, style: dict[str, Any]
) -> None:
    wanted = fresh(loaded(kind, 0), params(**style), range(7))
    assert same(fresh(loaded(kind), params(scale=0.0, **style), range(7)), wanted)
    assert not same(fresh(loaded(kind), params(**style), range(7)), wanted)


@pytest.mark.parametrize(("kind", "style"), STYLES)
def test_a_row_per_step_and_guidance_pass(
    loaded: Callable[..., LatentStylizer], kind: str, style: dict[str, Any]
) -> None:
    model, settings = loaded(kind), params(**style)
    state = model.open(settings)
    played(model, state, settings, range(3))
    calls = settings.style.steps
    if settings.style.guidance > 1 and kind != "lcm":  # whose guidance is an input
        calls *= 3 if settings.style.image_guidance != 1 else 2
    assert rolling(state).seen == [3] * calls


def test_without_a_window_nothing_is_stored_and_the_network_is_the_plain_one(folders: dict[str, Path]) -> None:
    plain, bare = graphs(Folder(folders["sd"]), SIZE), graphs(Folder(folders["bare"]), SIZE)
    assert plain["unet"].spec == bare["unet"].spec  # the adapter beside it changes no engine
    model = load(str(folders["sd"]), SIZE, engine="torch")
    state = model.open(params())
    played(model, state, params(), range(2))
    model.forget(state)
    assert not state.calls.companions


def test_every_frame_gives_a_picture_and_memory_is_constant(loaded: Callable[..., LatentStylizer]) -> None:
    model, settings = loaded(), params(steps=2)
    state = model.open(settings)
    first = played(model, state, settings, range(1))
    held = [cache.data_ptr() for cache in rolling(state).caches], rolling(state).nbytes
    rest = played(model, state, settings, range(1, 40))
    assert len(first + rest) == 40
    assert all(p.shape == (SIZE[1], SIZE[0], 3) for p in rest)
    assert ([cache.data_ptr() for cache in rolling(state).caches], rolling(state).nbytes) == held


def test_two_streams_share_no_memory(loaded: Callable[..., LatentStylizer]) -> None:
    model, a, b = loaded(), params(seed=1), params(seed=2, prompt="ink")
    wanted_a, wanted_b = fresh(model, a, range(8)), fresh(model, b, range(20, 28))
    state_a, state_b = model.open(a), model.open(b)
    for i in range(8):
        assert same(played(model, state_a, a, range(i, i + 1)), [wanted_a[i]])
        assert same(played(model, state_b, b, range(20 + i, 21 + i)), [wanted_b[i]])
    addresses = [{cache.untyped_storage().data_ptr() for cache in rolling(s).caches} for s in (state_a, state_b)]
    assert not addresses[0] & addresses[1]


CHANGES = [{"prompt": "ink"}, {"strength": 0.4}, {"guidance": 4.0}, {"seed": 9}, {"steps": 3}]
CHANGES += [{"guidance": 3.0, "negative": "ink"}, {"guidance": 3.0, "image_guidance": 1.5}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_change_of_what_is_painted_starts_the_window_anew(
    loaded: Callable[..., LatentStylizer], change: dict[str, Any]
) -> None:
    """With a fixed seed, so that no noise remembers how many frames there were."""
    model, before, after = loaded(), params(seed_mode="fixed"), params(seed_mode="fixed", **change)
    state = model.open(before)
    played(model, state, before, range(4))
    assert same(played(model, state, after, range(4, 8)), fresh(model, after, range(4, 8)))


def test_a_change_of_motion_alone_keeps_the_window(loaded: Callable[..., LatentStylizer]) -> None:
    model = loaded()
    state = model.open(params())
    played(model, state, params(), range(4))
    played(model, state, params(scale=0.5), range(4, 6))
    assert rolling(state).seen == [6]


def test_after_a_cut_nothing_of_before_is_seen(loaded: Callable[..., LatentStylizer]) -> None:
    model, settings = loaded(), params(seed_mode="fixed")
    state = model.open(settings)
    played(model, state, settings, range(4))
    kept = played(model, state, settings, range(4, 8))
    model.forget(state)
    cut = played(model, state, settings, range(4, 8))
    assert same(cut, fresh(model, settings, range(4, 8)))
    assert not same(cut, kept)


class Overflowing:
    """An engine whose keys and values overflow on some calls, as in half precision."""

    def __init__(self, engine: Any, when: set[int]) -> None:
        self.engine, self.when, self.calls = engine, when, 0

    @property
    def spec(self) -> EngineSpec:
        spec: EngineSpec = self.engine.spec
        return spec

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        output, *new = self.engine(*tensors)
        self.calls += 1
        if self.calls - 1 in self.when:
            new[3] = torch.full_like(new[3], float("inf"))
        return output, *new

    def launch(self, *tensors: Tensor) -> Pending:
        return Ready(self(*tensors))


def test_a_frame_whose_keys_overflow_is_delivered_and_forgotten(loaded: Callable[..., LatentStylizer]) -> None:
    model, settings = loaded(), params(seed_mode="fixed")
    networks = replace(model.networks, unet=Overflowing(model.networks.unet, {3}))
    broken = LatentStylizer(networks)
    found = fresh(broken, settings, range(8))
    assert same(found[:4], fresh(model, settings, range(4)))
    assert same(found[4:], fresh(model, settings, range(4, 8)))


def test_only_named_modules_are_used_and_need_weights(tmp_path: Path) -> None:
    folder = with_adapter(random_folder(tmp_path, "ip2p"), ["up_blocks.1.motion_modules.1"])
    model = load(str(folder), SIZE, engine="torch", structure=Structure(window=WINDOW))
    assert [s.shape[1::2] for s in model.networks.unet.spec.outputs[1:]] == [
        (4 * 6 * 8, 8)
    ] * 4  # k and v of two attentions
    assert not same(fresh(model, params(), range(2)), fresh(model, params(scale=0.0), range(2)))


def test_missing_weights_and_modules_are_the_users_error(tmp_path: Path) -> None:
    folder = with_adapter(random_folder(tmp_path, "sd"))
    keep(folder / "motion_adapter", ["up_blocks.1", "mid_block"], ["up_blocks.1"])
    with pytest.raises(UserError, match="mid_block"):
        load(str(folder), SIZE, engine="torch", structure=Structure(window=WINDOW))
    keep(folder / "motion_adapter", ["up_blocks.7"], ["up_blocks.1"])
    with pytest.raises(UserError, match=r"up_blocks\.7"):
        load(str(folder), SIZE, engine="torch", structure=Structure(window=WINDOW))


def test_frames_computed_again_change_what_is_seen_of_them_and_cost_no_frame(folders: dict[str, Path]) -> None:
    model = load(str(folders["sd"]), SIZE, engine="torch", structure=Structure(window=WINDOW, refresh=2))
    plain = load(str(folders["sd"]), SIZE, engine="torch", structure=Structure(window=WINDOW))
    assert len(fresh(model, params(), range(9))) == 9
    assert not same(fresh(model, params(), range(9)), fresh(plain, params(), range(9)))
    off = zip(fresh(model, params(0.0), range(5)), fresh(plain, params(0.0), range(5)), strict=True)
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in off)  # a batch of three rounds otherwise


def test_no_more_than_half_of_a_window_is_computed_again(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"temporal\.refresh"):
        load(str(folders["sd"]), SIZE, engine="torch", structure=Structure(window=WINDOW, refresh=WINDOW // 2 + 1))


@pytest.mark.parametrize(
    ("kind", "window", "message"), [("bare", 8, "no motion adapter"), ("sd", 1, "one frame"), ("sd", 13, "positions")]
)
def test_a_window_that_cannot_be_is_the_users_error(
    folders: dict[str, Path], kind: str, window: int, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(str(folders[kind]), SIZE, engine="torch", structure=Structure(window=window))
    assert caught.value.hint


def rolling(state: State) -> Rolling:
    (companion,) = state.calls.companions
    assert isinstance(companion, Windowed)
    return companion.rolling


def unet_spec(path: Path, length: int) -> EngineSpec:
    folder = Folder(path)
    motion = Motion(folder, (SIZE[1] // 8, SIZE[0] // 8), Window.of(length))
    return graphs(folder, SIZE, features=[motion])["unet"].spec


def test_another_adapter_or_window_is_another_engine(folders: dict[str, Path], tmp_path: Path) -> None:
    one = unet_spec(folders["sd"], 4)
    longer = unet_spec(folders["sd"], 6)
    other = with_adapter(random_folder(tmp_path, "sd"), ["up_blocks.0", "up_blocks.1"])
    fewer = unet_spec(other, 4)
    assert len({one, longer, fewer}) == 3
    assert one.fingerprint != fewer.fingerprint


def test_openvino_paints_the_same(folders: dict[str, Path], loaded: Callable[..., LatentStylizer]) -> None:
    wanted = fresh(loaded("sd"), params(), range(6))
    structure = Structure(window=WINDOW)
    compiled = load(str(folders["sd"]), SIZE, backend=OpenVINOBackend(int8=False), structure=structure)
    found = fresh(compiled, params(), range(6))
    apart = [np.abs(a.astype(int) - b.astype(int)).mean() for a, b in zip(found, wanted, strict=True)]
    still = fresh(loaded("sd"), params(scale=0.0), range(6))
    moved = [np.abs(a.astype(int) - b.astype(int)).mean() for a, b in zip(still, wanted, strict=True)]
    assert max(apart) < 0.2 * min(moved)


def test_mini_keeps_one_wash_under_fresh_noise(photograph: NDArray[np.uint8]) -> None:
    """A still camera, new noise for every frame: steadier by far with a window, and as detailed."""
    size = photograph.shape[1], photograph.shape[0]
    settings = params(prompt="oil painting")
    flicker, detail = [], []
    for window in (0, 8):
        model = load("mini", size, engine="torch", structure=Structure(window=window))
        state = model.open(settings)
        frames = [model.step(state, photograph, settings).image().astype(np.float32) / 255 for _ in range(12)]
        flicker.append(np.mean([np.square(b - a).mean() for a, b in pairwise(frames)]))
        detail.append(np.mean([np.abs(np.diff(f, axis=1)).mean() for f in frames]))
    assert flicker[1] < 0.2 * flicker[0]
    assert detail[1] > 0.95 * detail[0]


def test_mini_with_a_window_still_has_a_wash_for_every_seed(photograph: NDArray[np.uint8]) -> None:
    size = photograph.shape[1], photograph.shape[0]
    model = load("mini", size, engine="torch", structure=Structure(window=8))
    ends = []
    for seed in (1, 2):
        settings = params(prompt="watercolour", seed=seed)
        state = model.open(settings)
        ends.append([model.step(state, photograph, settings).image().astype(float) for _ in range(10)][-1])
    assert np.abs(ends[0] - ends[1]).mean() > 2
