"""Other weights for an engine: every one that changes is reached in the file, and what goes wrong is built instead."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from torch import Tensor, nn

from accel import cache, export, tensorrt_backend, tensorrt_engine
from accel.engine import EngineSpec, TensorSpec
from accel.refit import NAME, Refused, WeightMap, laid_out, weight_map
from accel.tensorrt_backend import TensorRTBackend
from accel.tensorrt_build import TensorRTBuilder
from accel.tensorrt_compiler import NETWORK, Recipe
from accel.tensorrt_provider import RTX
from models.folder import Folder
from models.loras import merge_lora
from models.networks import graphs
from tests.exported import inputs_of
from tests.folders import random_folder
from tests.test_tensorrt import Raw, why_no_gpu

SIZE = (64, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(random_folder(tmp_path_factory.mktemp("model"), "sd"))


def random_lora(unet: nn.Module, rank: int = 4) -> dict[str, Tensor]:
    """One for every linear layer and convolution."""
    generator, found = torch.Generator().manual_seed(7), {}
    for path, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            out, into, *kernel = layer.weight.shape
            down = torch.randn((rank, into, *kernel), generator=generator) / into**0.5
            up = torch.randn((out, rank, *[1] * len(kernel)), generator=generator) / rank**0.5
            found |= {f"unet.{path}.lora.down.weight": down, f"unet.{path}.lora.up.weight": 0.3 * up}
    return found


@pytest.mark.parametrize(("precision", "within"), [("fp32", 1e-5), ("fast", 8e-3)])
def test_a_lora_reaches_every_weight_of_the_file(precision: str, within: float, folder: Folder, tmp_path: Path) -> None:
    graph = graphs(folder, SIZE, refit=True)["unet"]
    spec = replace(graph.spec, precision=precision)
    plain: Any = graph.build()
    exported = export.export(plain, spec, tmp_path / NETWORK)
    before = WeightMap.of_json(weight_map(tmp_path / NETWORK, plain).to_json())  # as it is read again beside an engine

    worn: Any = graph.build()
    layers = merge_lora(worn.unet, random_lora(worn.unet))
    inputs = inputs_of(spec)
    with torch.inference_mode():
        wanted, was = ([output.clone() for output in net.float()(*inputs.values())] for net in (worn, plain))
    worn.to(torch.float32 if precision == "fp32" else torch.float16)
    after = before.changed(worn.state_dict())
    assert sum(origin != before.tensors[name] for name, origin in after.tensors.items()) == layers > 50
    assert any(origin.turned for origin in after.tensors.values())  # the exporter transposes linear layers

    model = onnx_ir.load(tmp_path / NETWORK)
    for name, origin in after.tensors.items():
        model.graph.initializers[name].const_value = onnx_ir.tensor(laid_out(origin, worn.state_dict()).numpy())
    exported = replace(exported, path=tmp_path / "worn.onnx")
    onnx_ir.save(model, exported.path)
    assert export.parity(exported, wanted, inputs) < within < export.parity(exported, was, inputs) / 10


def test_what_cannot_be_told_apart_is_out_of_reach(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    for layer in net:
        nn.init.zeros_(layer.bias)
    export.export(net, SPEC, tmp_path / NETWORK)
    found = weight_map(tmp_path / NETWORK, net)
    assert {origin.parameter for origin in found.tensors.values()} == {"0.weight", "1.weight"}
    assert set(found.rest) == {"0.bias", "1.bias"}
    state = net.state_dict()
    assert found.changed(state) == found
    with pytest.raises(Refused, match=r"1\.bias changes and cannot be reached"):
        found.changed({**state, "1.bias": torch.ones(4).half()})
    with pytest.raises(Refused, match=r"2\.weight is not in both"):
        found.changed({**state, "2.weight": torch.ones(4).half()})


# --- in the cache, by a stand-in for the library: no engine that takes weights is built without a card ---

X, Y = TensorSpec("x", (1, 4, 8, 8)), TensorSpec("y", (1, 4, 8, 8))
SPEC = EngineSpec("net", (X,), (Y,), "seed 0", architecture="one convolution")


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


@dataclass
class Fake:
    """What TensorRT gives, with the net's weights as its engine; `calls` are those of its refitter."""

    calls: list[str] = field(default_factory=list)
    refuses: str = ""  # a weight that it does not take
    joined: tuple[str, ...] = ()  # weights that it asks for besides
    drops: bool = False  # the bias, as in NVIDIA's notes
    takes: bool = True
    ERROR = 1
    FLOAT, HALF, BF16 = "float32", "float16", "bfloat16"
    INCLUDE_REFIT = USER_MANAGED = "user managed"

    @property
    def DataType(self) -> Any:
        return self

    Logger = SerializationFlag = ExecutionContextAllocationStrategy = DataType

    def __call__(self, severity: int) -> None:
        pass

    def Runtime(self, logger: None) -> Any:
        return self

    def deserialize_cuda_engine(self, blob: bytes) -> FakeEngine:
        return FakeEngine(json.loads(blob) if blob.startswith(b"{") else {})

    @staticmethod
    def Weights(kind: str, address: int, count: int) -> list[float]:
        bits = {"float16": np.float16, "float32": np.float32}[kind]
        read = (np.ctypeslib.ctypes.c_char * (count * np.dtype(bits).itemsize)).from_address(address)
        return [float(value) for value in np.frombuffer(read, bits)]

    def Refitter(self, engine: FakeEngine, logger: None) -> FakeRefitter:
        return FakeRefitter(self, engine)


class FakeRefitter:
    def __init__(self, trt: Fake, engine: FakeEngine) -> None:
        self.trt, self.engine = trt, engine

    def set_named_weights(self, name: str, weights: list[float]) -> bool:
        self.trt.calls.append(f"set {name}")
        if name == self.trt.refuses:
            return False
        if not (self.trt.drops and "bias" in name):
            self.engine.weights[name] = weights
        return True

    def get_missing_weights(self) -> list[str]:
        self.trt.calls.append("missing")
        return [name for name in self.trt.joined if name not in self.engine.weights]

    def refit_cuda_engine_async(self, stream: int) -> bool:
        self.trt.calls.append("refit")
        return self.trt.takes


class FakeEngine(Raw):
    """Computes what the net does, by the weights that it was given."""

    def __init__(self, weights: dict[str, list[float]]) -> None:
        super().__init__()
        self.weights = weights

    def execute_async_v3(self, stream: int) -> bool:
        if {"x", "y"} != set(self.bound) or not self.weights:
            return bool(self.bound)
        net = Net()
        for name, value in self.weights.items():
            parameter = net.get_parameter(name.removeprefix("module."))
            parameter.data = torch.tensor(value).view(parameter.shape)
        x, y = (tensor_at(self.bound[name]) for name in ("x", "y"))
        with torch.no_grad():
            y.copy_(net(x))
        return True

    def create_serialization_config(self) -> FakeEngine:
        return self

    def set_flag(self, flag: str) -> None:
        assert flag == Fake.INCLUDE_REFIT

    def serialize_with_config(self, config: Any) -> bytes:
        return json.dumps(self.weights).encode()


def tensor_at(address: int) -> Tensor:
    count = 4 * 8 * 8
    return torch.from_numpy(
        np.frombuffer((np.ctypeslib.ctypes.c_float * count).from_address(address), np.float32)
    ).view(X.shape)


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    monkeypatch.setattr(tensorrt_backend, "lack", lambda sm: None)
    monkeypatch.setattr(tensorrt_engine, "ALIGNED", 1)
    monkeypatch.setattr(tensorrt_backend, "provider_for", lambda sm: RTX)
    monkeypatch.setattr(type(RTX), "library", lambda self: fake)
    return fake


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[float]], bytes]:
    """The first net's engine, and its map."""
    net, file = Net().half(), tmp_path_factory.mktemp("first") / NETWORK
    export.export(net, SPEC, file)
    weights = weight_map(file, net)
    return {n: laid_out(o, net.state_dict()).flatten().tolist() for n, o in weights.tensors.items()}, weights.to_json()


@pytest.fixture
def root(trt: Fake, first: tuple[dict[str, list[float]], bytes], tmp_path: Path) -> Path:
    """A cache with that engine."""
    stored(tmp_path, *first)
    return tmp_path


def stored(root: Path, blob: dict[str, list[float]], weights: bytes) -> None:
    key = cache.key_of(Recipe(RTX, "sm_89").fingerprint, SPEC)
    cache.write(root, key, json.dumps(blob).encode(), 1.0, beside={NAME: weights})


def loaded(root: Path, said: list[str], spec: EngineSpec, seed: int) -> Any:
    backend = TensorRTBackend("cpu", record=None, say=said.append)
    return backend.load(lambda: Net(seed), spec, root)


def test_an_engine_takes_other_weights_and_is_stored_as_theirs(trt: Fake, root: Path) -> None:
    said: list[str] = []
    spec = replace(SPEC, fingerprint="seed 1")
    engine = loaded(root, said, spec, 1)
    x = torch.randn(X.shape)
    assert torch.allclose(engine(x)[0], Net(1)(x), atol=1e-2)
    assert trt.calls == ["set module.conv.weight", "set module.conv.bias", "missing", "refit"]
    assert len(said) == 1
    assert said[0].startswith("net: other weights for engine")

    trt.calls.clear()
    again = loaded(root, said, spec, 2)  # from the cache: it asks for no module
    assert torch.equal(again(x)[0], engine(x)[0])
    assert trt.calls == []
    (other,) = (e for e in cache.verify(root) if e.key["spec"]["fingerprint"] == "seed 1")
    assert other.problem is None
    third = loaded(root, said, replace(SPEC, fingerprint="seed 3"), 3)  # made of one that was made of one
    assert torch.allclose(third(x)[0], Net(3)(x), atol=1e-2)


def test_weights_that_the_compiler_has_joined_are_given_too(trt: Fake, first, tmp_path: Path) -> None:
    class OtherBias(Net):
        def __init__(self) -> None:
            super().__init__(0)
            nn.init.ones_(self.conv.bias)

    trt.joined = ("module.conv.weight",)
    blob, weights = first
    stored(tmp_path, {"module.conv.bias": blob["module.conv.bias"]}, weights)
    spec = replace(SPEC, fingerprint="another bias")
    TensorRTBackend("cpu", record=None).load(OtherBias, spec, tmp_path)
    assert trt.calls == ["set module.conv.bias", "missing", "set module.conv.weight", "refit"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"drops": True}, "% from the network"),
        ({"refuses": "module.conv.bias"}, "TensorRT does not take module.conv.bias"),
        ({"takes": False}, "TensorRT does not take the weights"),
        ({"joined": ("",)}, "weights without a name"),
    ],
)
def test_what_does_not_take_them_is_built(
    change: dict[str, Any], reason: str, trt: Fake, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    monkeypatch.setattr(TensorRTBackend, "_built", lambda self, module, spec, root, key: built.append(spec.fingerprint))
    for name, value in change.items():
        setattr(trt, name, value)
    said: list[str] = []
    loaded(root, said, replace(SPEC, fingerprint="seed 1"), 1)
    assert built == ["seed 1"]
    assert reason in said[0]
    assert said[0].endswith("building another")
    assert [e.key["spec"]["fingerprint"] for e in cache.verify(root)] == ["seed 0"]


@pytest.mark.parametrize("what", ["architecture", "shape", "precision", "map", "unasked"])
def test_no_other_engine_is_touched(what: str, trt: Fake, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorRTBackend, "_built", lambda self, module, spec, root, key: "built")
    (entry,) = cache.entries(root)
    spec = {
        "architecture": replace(SPEC, architecture="two convolutions"),
        "shape": replace(SPEC, inputs=(replace(X, shape=(1, 4, 8, 16)),)),
        "precision": replace(SPEC, precision="fp32"),
        "unasked": replace(SPEC, architecture=""),
    }.get(what, SPEC)
    if what == "map":
        (root / entry.digest / NAME).write_text("[]")
    assert loaded(root, [], replace(spec, fingerprint="seed 1"), 1) == "built"
    assert trt.calls == []


def test_without_a_card_the_engine_is_built_for_its_weights_alone(tmp_path: Path) -> None:
    said: list[str] = []
    TensorRTBuilder("sm_89", say=said.append).load(Net, SPEC, tmp_path)
    (entry,) = cache.verify(tmp_path)
    assert entry.problem is None
    assert torch.cuda.is_available() or "alone" in "".join(said)
    assert (tmp_path / entry.digest / NAME).exists() == (not any("alone" in line for line in said))


def test_the_architecture_is_everything_but_the_weights(folder: Folder, tmp_path: Path) -> None:
    def spec(path: Path, **more: Any) -> EngineSpec:
        return graphs(Folder(path), SIZE, refit=True, **more)["unet"].spec

    here, there = folder.path, tmp_path / "there"
    shutil.copytree(here, there)
    with next((there / "unet").glob("*.safetensors")).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert spec(there).fingerprint != spec(here).fingerprint
    assert spec(there).architecture == spec(here).architecture != ""
    config = json.loads((there / "unet" / "config.json").read_text())
    (there / "unet" / "config.json").write_text(json.dumps(config | {"_name_or_path": "elsewhere"}))
    assert spec(there).architecture == spec(here).architecture
    (there / "unet" / "config.json").write_text(json.dumps(config | {"act_fn": "gelu"}))
    assert spec(there).architecture != spec(here).architecture
    assert graphs(folder, SIZE)["unet"].spec.architecture == ""
    assert "architecture" not in cache.key_of("x", graphs(folder, SIZE)["unet"].spec)["spec"]  # old keys stay


@pytest.mark.gpu
def test_an_engine_on_the_card_takes_other_weights(tmp_path: Path) -> None:
    if reason := why_no_gpu():
        pytest.skip(reason)
    said: list[str] = []
    x = torch.randn(X.shape)
    for seed in range(3):
        spec = replace(SPEC, fingerprint=f"seed {seed}")
        engine = TensorRTBackend(say=said.append).load(lambda seed=seed: Net(seed), spec, tmp_path)
        wanted = Net(seed)(x).detach()
        assert (engine(x)[0].cpu() - wanted).norm() < 1e-2 * wanted.norm()
    assert any("other weights" in line for line in said), said
