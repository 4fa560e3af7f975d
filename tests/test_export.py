"""Every network as an ONNX file: near eager in ONNX Runtime, and built by the real compiler for every card."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch
from torch import Tensor, nn

from accel import export
from accel.engine import EngineSpec, TensorSpec
from accel.export import OLDER, OPSET, Exported
from accel.refit import laid_out, weight_map
from accel.tensorrt_compiler import NETWORK, Recipe, compile_network
from accel.tensorrt_provider import RTX
from models.folder import Folder
from models.networks import graphs
from tests.exported import NETWORKS, SPELT_OUT, checked, inputs_of, part, sd

TOLERANCE = 8e-3  # of the largest value; half precision, and one or two of 255 in pictures of bytes
ENGINE_LEAST = 100_000  # bytes
RECIPE = Recipe(RTX, "sm_89")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@dataclass(frozen=True)
class Plain:
    """The UNet exported."""

    folder: Path
    exported: Exported
    error: float


@pytest.fixture(scope="module")
def unet(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    folder = tmp_path_factory.mktemp("unet")
    return Plain(folder, *checked("unet", root, folder / NETWORK))


def test_exported_unet_agrees_with_eager(unet: Plain) -> None:
    assert unet.exported.opset == OPSET
    assert unet.error < TOLERANCE


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "unet"])
def test_exported_network_agrees_with_eager_and_is_built(name: str, root: Path, tmp_path: Path) -> None:
    exported, error = checked(name, root, tmp_path / NETWORK)
    assert exported.opset == (OLDER if name in SPELT_OUT else OPSET)
    assert 0 < exported.nodes < 1500
    assert error < TOLERANCE
    assert compile_network(RECIPE, name, tmp_path).stat().st_size > ENGINE_LEAST


@pytest.mark.parametrize("target", ["sm_86", "sm_89", "sm_120"])
def test_one_machine_builds_for_every_card(target: str, unet: Plain) -> None:
    assert compile_network(Recipe(RTX, target), "unet", unet.folder).stat().st_size > ENGINE_LEAST


def test_and_for_turing_with_wider_residuals_of_equal_sums(root: Path, unet: Plain, tmp_path: Path) -> None:
    graph = part("unet", root)
    wide = export.export(graph.build(), graph.spec, tmp_path / NETWORK, wide=True)
    assert wide.nodes > unet.exported.nodes
    inputs = inputs_of(graph.spec)
    with torch.inference_mode():
        wanted = graph.build()(*inputs.values())
    assert export.parity(wide, [tensor.clone() for tensor in wanted], inputs) < TOLERANCE
    assert compile_network(Recipe(RTX, "sm_75"), "unet", tmp_path).stat().st_size > ENGINE_LEAST


def test_weights_are_found_again_by_their_contents(unet: Plain, root: Path) -> None:
    module = part("unet", root).build().half()
    found = weight_map(unet.folder / NETWORK, module)
    held = onnx_ir.load(unet.folder / NETWORK).graph.initializers
    state = module.state_dict()
    for name, origin in found.tensors.items():
        assert torch.equal(torch.from_numpy(held[name].const_value.numpy().copy()), laid_out(origin, state))
    matrices = {name for name, weight in state.items() if weight.dim() >= 2}
    assert matrices <= {origin.parameter for origin in found.tensors.values()}
    assert any(origin.turned for origin in found.tensors.values())  # the exporter transposes linear layers


def test_the_timestep_is_never_half(unet: Plain) -> None:
    graph = onnx_ir.load(unet.folder / NETWORK).graph
    behind = [graph.inputs[1]]
    assert behind[0].name == "t"
    while behind:  # up to the sinusoids, everything is float32
        for node, _ in behind.pop().uses():
            assert node.op_type != "Cast" or node.attributes["to"].as_int() == onnx_ir.DataType.FLOAT
            behind += [] if node.op_type in ("Sin", "Cos") else list(node.outputs)
    assert onnx_ir.DataType.FLOAT16 in {value.dtype for value in graph.initializers.values()}


def test_bfloat16_is_built_too(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU())
    spec = EngineSpec("net", (TensorSpec("x", (1, 3, 8, 8)),), (TensorSpec("y", (1, 8, 6, 6)),), "f")
    export.export(module, spec, tmp_path / NETWORK, half="bfloat16")
    compile_network(RECIPE, "net", tmp_path)
    assert onnx_ir.DataType.BFLOAT16 in {v.dtype for v in onnx_ir.load(tmp_path / NETWORK).graph.initializers.values()}


class Net(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


def test_outputs_that_are_not_the_specs_are_refused(tmp_path: Path) -> None:
    x = TensorSpec("x", (1, 3))
    spec = EngineSpec("net", (x,), (TensorSpec("y", (1, 4)),), "f")
    with pytest.raises(ValueError, match="net: output"):
        export.export(Net(), spec, tmp_path / NETWORK)
    with pytest.raises(ValueError, match="float8"):
        export.export(Net(), spec, tmp_path / NETWORK, half="float8")


def test_an_output_named_like_an_input_gets_a_name_of_its_own(tmp_path: Path) -> None:
    x = TensorSpec("x", (1, 3))
    spec = EngineSpec("net", (x,), (x,), "f", "fp32")
    exported = export.export(Net(), spec, tmp_path / NETWORK)
    assert export.output_names(spec) == ["x_out"]
    assert export.parity(exported, [torch.tensor([[0.0, 1.0, 0.0]])], {"x": torch.tensor([[-1.0, 1.0, 0.0]])}) == 0


def test_what_the_export_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert export.missing() is None
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else real(name))
    lack: Any = export.missing()
    assert "onnxscript" in lack.message
    assert "livestyle[rtx]" in lack.hint


def test_a_folders_lora_and_weights_are_in_the_key_and_its_place_is_not(root: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        return graphs(Folder(path), (64, 64))["unet"].spec.fingerprint

    here, there = sd(root).path, tmp_path / "there"
    shutil.copytree(here, there)
    assert fingerprint(there) == fingerprint(here)
    found = {fingerprint(here)}
    (there / "lora").mkdir()
    for scale in (0.5, 1.0):
        (there / "lora" / "lora.json").write_text(json.dumps({"file": "a.safetensors", "scale": scale}))
        found.add(fingerprint(there))
    with next((there / "unet").glob("*.safetensors")).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    found.add(fingerprint(there))
    assert len(found) == 4
