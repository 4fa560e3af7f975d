"""RAFT-small: what torchvision's answers, exported and built, fetched, and as a stream's flow."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from accel.cuda_backend import CudaBackend
from accel.engine import Engine, EngineSpec
from accel.errors import UserError
from accel.openvino_backend import OpenVINOBackend
from accel.torch_backend import TorchBackend
from models import addons, flow
from models import hub as hub_module
from models.addons import ADDONS, addon
from models.filters import CPU, to_picture
from models.flow import Dis, Raft, chosen_flow, flow_estimator
from models.lane import frame_lane
from models.params import Temporal
from models.raft import LEAST, RaftNet, flow_engine, looked_up, places, pyramid, read_net
from models.weights import fetch
from tests.hub import FakeHub
from tests.scenes import sliding
from tests.test_cuda_backend import Tape

META = torch.device("meta")
ROW = ADDONS["raft-small"]
SIZE = (160, 128)  # width, height
FETCHED = "raft_small_C_T_V2-01064c6d.safetensors"


def drawn(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Random weights of these shapes that depend on nothing but names and shapes."""
    chance, found = torch.Generator().manual_seed(0), {}
    for name in sorted(like):
        scale = like[name][0].numel() ** -0.5 if like[name].dim() == 4 else 0.1
        found[name] = torch.randn(like[name].shape, generator=chance) * scale
    return found


def pictures(size: tuple[int, int] = SIZE) -> tuple[Tensor, Tensor]:
    """Soft noise, and it moved a little."""
    chance = torch.Generator().manual_seed(1)
    wide = F.interpolate(torch.rand(1, 3, size[1] // 4 + 2, size[0] // 4 + 2, generator=chance), scale_factor=4.0)
    return wide[..., : size[1], : size[0]].contiguous(), wide[..., 2 : size[1] + 2, 3 : size[0] + 3].contiguous()


def net() -> RaftNet:
    made = RaftNet().eval().requires_grad_(False)
    made.load_state_dict(drawn(made.state_dict()))
    return made


@pytest.fixture(autouse=True)
def places_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's is read or written."""
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("LIVESTYLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_module, "TIMEOUT", 0.5)


@pytest.fixture
def weights() -> Path:
    """As if they were fetched."""
    ROW.folder.mkdir(parents=True)
    save_file(net().state_dict(), ROW.folder / FETCHED)
    return ROW.folder / FETCHED


def test_it_has_the_published_weights_names_and_number() -> None:
    state = RaftNet().state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == 990_162
    assert len(state) == 106
    names = (
        "feature_encoder.convnormrelu.0.weight",
        "context_encoder.layer2.0.downsample.0.weight",
        "update_block.motion_encoder.convcorr1.0.bias",
        "update_block.recurrent_block.convgru1.convq.weight",
        "update_block.flow_head.conv2.weight",
    )
    assert [tuple(state[name].shape) for name in names] == [
        (32, 3, 7, 7),
        (64, 32, 1, 1),
        (96,),
        (96, 242, 3, 3),
        (2, 128, 3, 3),
    ]


def test_it_answers_as_torchvisions() -> None:
    """With five rounds, by torchvision 0.29.2's `raft_small` each way; the largest flow is 34 px."""
    with torch.inference_mode():
        flows = net()(*pictures())
    found = flows[:, :, [0, 64, 127, 101], [0, 80, 159, 13]].permute(0, 2, 1)
    there = [[11.8432, 6.0433], [2.188, -6.4503], [-3.1739, 0.781], [7.5658, 6.4851]]
    back = [[9.4535, 5.4483], [4.3043, -12.6558], [0.9457, 3.9148], [5.9167, 4.6027]]
    torch.testing.assert_close(found, torch.tensor([there, back]), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        flows.mean((2, 3)), torch.tensor([[3.0474, 2.3888], [3.4203, 1.5910]]), rtol=0, atol=1e-3
    )


def test_a_correlation_is_looked_up_where_the_flow_leads() -> None:
    """Each feature is like itself alone: all that is found is where one looks at oneself."""
    height, width = 16, 24
    features = torch.eye(height * width).reshape(1, height * width, height, width)
    levels = list(pyramid(features, features))
    assert [tuple(level.shape[2:]) for level in levels] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    shift = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1)
    found = looked_up(levels, places(features) + shift)[0, :49].reshape(7, 7, height, width) * (height * width) ** 0.5
    wanted = torch.zeros(7, 7)
    wanted[3 - 2, 3 + 1] = 1  # x outermost
    torch.testing.assert_close(found[:, :, 8, 12], wanted)


@pytest.mark.parametrize("size", [(150, 100), (96, 64), (131, 129)])
def test_any_size_is_that_of_the_next_larger_one_with_its_edges_repeated(size: tuple[int, int]) -> None:
    now, before = pictures(size)
    width, height = (max(LEAST, -(-side // 8) * 8) for side in size)
    larger = [F.pad(p, (0, width - size[0], 0, height - size[1]), mode="replicate") for p in (now, before)]
    with torch.inference_mode():
        found, wanted = net()(now, before), net()(*larger)[..., : size[1], : size[0]]
    assert found.shape == (2, 2, size[1], size[0])
    torch.testing.assert_close(found, wanted)


def test_openvino_agrees_with_torch(weights: Path) -> None:
    shape = (1, 3, SIZE[1], SIZE[0])
    (wanted,), (found,) = (
        flow_engine(weights, shape, backend)(*pictures()) for backend in (TorchBackend(), OpenVINOBackend(threads=1))
    )
    assert float((found - wanted).abs().max()) < 1e-3


def test_on_any_other_device_it_stays_there(weights: Path) -> None:
    engine = flow_engine(weights, (1, 3, 136, 150), TorchBackend("meta"))
    assert engine.spec.precision == "fast"
    (flows,) = engine(*(p.to(META) for p in pictures((150, 136))))
    assert (flows.shape, flows.device) == ((2, 2, 136, 150), META)


def test_one_run_gives_both_ways_and_another_size_another_engine(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "engines_on", lambda device: TorchBackend())
    runs: list[Counted] = []
    monkeypatch.setattr(flow, "flow_engine", lambda *given: Counted(flow_engine(*given), runs))
    estimator = flow_estimator("raft")
    assert isinstance(estimator, Raft)
    now, before = pictures()
    assert not runs
    back, forth = estimator(now, before), estimator(before, now)
    assert len(runs) == 1
    with torch.inference_mode():
        torch.testing.assert_close(torch.cat([back, forth]), net()(now, before), rtol=0, atol=1e-3)
    estimator(now.clone(), before)
    assert runs == [runs[0]] * 2
    assert estimator(*pictures((150, 136))).shape == (1, 2, 136, 150)
    assert runs[2] is not runs[0]


def test_flows_outlive_the_engines_next_launch(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a recorded engine's outputs do not."""
    backend = CudaBackend("cpu", mode=None, record=lambda call, device: Tape()(call, device))
    monkeypatch.setattr(flow, "engines_on", lambda device: backend)
    estimator, (now, before) = Raft(weights), pictures()
    back, forth = estimator(now, before), estimator(before, now)
    kept = back.clone(), forth.clone()
    estimator(now.flip(3), before.flip(3))
    assert torch.equal(back, kept[0])
    assert torch.equal(forth, kept[1])


@dataclass(eq=False)
class Counted:
    """An engine that notes its calls."""

    engine: Engine
    runs: list[Counted]

    @property
    def spec(self) -> EngineSpec:
        return self.engine.spec

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.runs.append(self)
        return self.engine(*tensors)


def test_a_lane_with_raft_shows_what_it_is_given(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights know no motion; every stage runs, and a diffused frame is shown as it is."""
    monkeypatch.setattr(flow, "engines_on", lambda device: TorchBackend())
    lane = frame_lane(Temporal(flow="raft", refiner="off"), SIZE)
    for image in sliding(3, size=SIZE):
        lane.advance(image)
        lane.answer(lane.ask(), image)
        assert (lane.show() == image).all()
    lane.advance(sliding(4, size=SIZE)[3])
    assert lane.show().shape == (SIZE[1], SIZE[0], 3)
    assert lane.motion is not None
    assert lane.motion.flow.shape == (1, 2, SIZE[1] // 2, SIZE[0] // 2)


def test_auto_is_raft_where_a_gpu_has_its_weights(weights: Path) -> None:
    assert [chosen_flow("auto", device) for device in (CPU, META)] == ["dis", "raft"]
    weights.unlink()
    assert [chosen_flow(name, META) for name in ("auto", "dis", "raft")] == ["dis", "dis", "raft"]
    assert isinstance(flow_estimator("auto"), Dis)


def test_without_weights_the_command_is_said() -> None:
    with pytest.raises(UserError, match=r"raft-small is not here yet \(4 MB\)") as caught:
        frame_lane(Temporal(flow="raft"), SIZE)
    assert caught.value.hint == "`livestyle fetch raft-small`"


def test_another_networks_weights_are_the_users_error(weights: Path) -> None:
    save_file({"weight": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match="not RAFT-small's") as caught:
        read_net(weights)
    assert caught.value.hint


@dataclass
class Elsewhere(FakeHub):
    """A server that is not the hub, and notes who came."""

    tokens: list[str | None] = field(default_factory=list)

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        self.tokens.append(request.headers.get("Authorization"))
        super().answer(request, body=body)


def published(monkeypatch: pytest.MonkeyPatch, server: Elsewhere, digest: str = "") -> None:
    """Put small weights on the server, and the row's address there."""
    pickled = io.BytesIO()
    torch.save(net().state_dict(), pickled)
    (source,) = ROW.sources
    (file,) = source.files
    server.files["models", "raft"] = b""  # so that the server has ("models", "raft")
    server.files["models/raft", file] = pickled.getvalue()
    digest = digest or hashlib.sha256(pickled.getvalue()).hexdigest()[:8]
    row = replace(ROW, sources=(replace(source, repo=f"{server.url}/models/raft/-/-", sha256=((file, digest),)),))
    monkeypatch.setitem(addons.ADDONS, ROW.name, row)


def test_it_is_fetched_from_where_it_is_published_and_the_hubs_token_stays_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ROW.sources[0].repo == "https://download.pytorch.org/models"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Elsewhere() as server:
        published(monkeypatch, server)
        assert fetch("raft-small") == addon("flow")
        server.asked.clear()
        fetch("raft-small")
        assert {method for method, _, _ in server.asked} == {"HEAD"}  # nothing twice
    assert set(server.tokens) == {None}
    state = net().state_dict()
    read = read_net(addon("flow") / FETCHED).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_what_is_not_what_its_name_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with Elsewhere() as server:
        published(monkeypatch, server, "01064c6d")
        with pytest.raises(UserError, match="SHA-256 is not the published one"):
            fetch("raft-small")
    assert not ROW.folder.exists()


def test_the_pictures_of_a_lane_are_the_networks(weights: Path) -> None:
    """A camera's bytes come as channels-last floats; engines take them as they are."""
    shape = (1, 3, SIZE[1], SIZE[0])
    image = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    engine = flow_engine(weights, shape, TorchBackend())
    picture = to_picture(image)
    (one,), (other,) = engine(picture, picture), engine(picture.contiguous(), picture.contiguous())
    torch.testing.assert_close(one.clone(), other, rtol=0, atol=1e-4)
