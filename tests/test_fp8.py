"""8-bit floats: the file computes what was judged, and what would spoil the picture stays in halves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from accel import cache, export, fp8, tensorrt_backend
from accel.engine import EngineSpec, TensorSpec
from accel.errors import UserError
from accel.fp8 import calibrated, fit, outputs, quantised, reached
from accel.openvino_backend import OpenVINOBackend
from accel.quantised import Refused, difference
from accel.refit import NAME
from accel.tensorrt_backend import TensorRTBackend
from accel.tensorrt_build import Built, TensorRTBuilder
from accel.tensorrt_compiler import NETWORK
from accel.tensorrt_provider import RTX, has_fp8
from accel.torch_backend import TorchBackend
from models.folder import Folder
from models.networks import graphs
from models.params import Engines, Params
from models.structure import structure_of
from tests.folders import random_folder, random_xl_folder
from tests.test_tensorrt import why_no_gpu

SPEC = EngineSpec("net", (TensorSpec("x", (1, 16, 8, 8)),), (TensorSpec("y", (1, 8, 8, 32)),), "seed 0", "fp8")
SIZE = (64, 64)


class Net(nn.Module):
    """A convolution and a linear layer, both of 16s, and samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in, self.conv, self.out = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 32, 3, padding=1), nn.Linear(32, 32)
        self.narrow = nn.Linear(32, 8)
        nn.init.zeros_(self.conv.weight[3])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.relu(self.conv(self.conv_in(x))).permute(0, 2, 3, 1))
        return y

    def samples(self, inputs: tuple[TensorSpec, ...]) -> Iterator[tuple[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            yield (torch.randn(inputs[0].shape, generator=generator),)


class Unsampled(Net):
    samples = None  # type: ignore[assignment]


def run(file: Path, **inputs: Tensor) -> tuple[Tensor, ...]:
    """What ONNX Runtime makes of it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return tuple(map(torch.from_numpy, session.run(None, {name: t.numpy() for name, t in inputs.items()})))


@pytest.mark.parametrize(("opset", "precision", "within"), [(23, "fp32", 1e-5), (21, "fp32", 1e-5), (23, "fp8", 16e-3)])
def test_the_file_computes_what_was_judged(opset: int, precision: str, within: float, tmp_path: Path) -> None:
    net, spec = Net().eval(), replace(SPEC, precision=precision)
    samples = list(net.samples(SPEC.inputs))
    reaches, exact = reached(net, samples), outputs(net, samples[:1])
    with quantised(net, reaches):
        judged = outputs(net, samples[:1])
    assert 0.005 < difference(judged, exact) < 0.06
    export.export(net, spec, tmp_path / NETWORK, opset, eighths=reaches)
    assert difference([run(tmp_path / NETWORK, x=samples[0][0])], judged) < within
    held = {value.name: value.dtype for value in onnx_ir.load(tmp_path / NETWORK).graph.initializers.values()}
    assert [dtype for dtype in held.values()].count(onnx_ir.DataType.FLOAT8E4M3FN) == 2
    assert "module.conv.weight" not in held  # its halves are not in the file as well


def test_ends_and_narrow_layers_stay_as_they_are() -> None:
    assert [path for path, _ in fit(Net())] == ["conv", "out"]


def test_layers_that_samples_show_nothing_stay_as_they_are() -> None:
    net = Net().eval()
    nn.init.zeros_(net.conv.weight)
    nn.init.zeros_(net.conv.bias)
    assert set(reached(net, list(net.samples(SPEC.inputs)))) == {"conv"}


def test_layers_are_the_same_objects_and_as_before_afterwards() -> None:
    net = Net().eval()
    layer, state, seen = net.conv, set(net.state_dict()), list[Tensor]()
    handle = layer.register_forward_hook(lambda layer, given, y: seen.append(given[0]))  # as room for LoRAs has them
    samples = list(net.samples(SPEC.inputs))
    exact = outputs(net, samples)
    with quantised(net, {"conv": 1.0, "out": 1.0}):
        assert net.conv is layer
        outputs(net, samples)
    handle.remove()
    assert torch.equal(seen[0], seen[-len(samples)])  # they see what came in, not its rounding
    assert set(net.state_dict()) == state
    assert difference(outputs(net, samples), exact) == 0
    assert not any(hook for part in net.modules() for hook in part._forward_hooks)


def test_what_is_beyond_the_samples_is_cut_off_and_headroom_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net().eval()
    samples = list(net.samples(SPEC.inputs))
    reaches = reached(net, samples)
    errors = []
    for headroom in (1.0, 2.0, 8.0):
        monkeypatch.setattr(fp8, "HEADROOM", headroom)
        exact = outputs(net, samples)
        with quantised(net, reaches):
            errors.append(difference(outputs(net, samples), exact))
            wild = outputs(net, [(1e4 * samples[0][0],)])
        assert wild[0][0].isfinite().all()  # the format has no infinity, and a conversion without a bound makes NaN
    assert max(errors) < 1.2 * min(errors)


def test_the_samples_that_judge_do_not_calibrate(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = fp8.reached
    monkeypatch.setattr(fp8, "reached", lambda net, samples: seen.append(len(samples)) or real(net, samples))
    reaches, error = calibrated(Net().eval(), SPEC)
    assert seen == [4]
    assert set(reaches) == {"conv", "out"}
    assert 0.005 < error < fp8.LARGEST_ERROR


@pytest.mark.parametrize("lack", ["samples", "closeness", "numbers"])
def test_what_it_would_spoil_is_refused(lack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Unsampled() if lack == "samples" else Net()
    if lack == "closeness":
        monkeypatch.setattr(fp8, "LARGEST_ERROR", 1e-3)
    if lack == "numbers":
        net.out.weight.data.fill_(torch.nan)
    words = {"samples": "nothing to judge it by", "closeness": "% from float32", "numbers": "nan% from float32"}
    with pytest.raises(Refused, match=words[lack]):
        calibrated(net.eval(), SPEC)


@pytest.mark.parametrize("target", ["sm_89", "sm_120"])
def test_cards_that_have_it_get_it_and_the_manifest_keeps_the_error(target: str, tmp_path: Path) -> None:
    said: list[str] = []
    TensorRTBuilder(target, say=said.append).load(Net, SPEC, tmp_path)
    assert "net: fp8 in 2 layers" in "\n".join(said)
    (entry,) = cache.verify(tmp_path)
    assert entry.problem is None
    manifest = json.loads((tmp_path / entry.digest / "manifest.json").read_text())
    assert 0.005 < manifest["error"] < fp8.LARGEST_ERROR


def test_too_far_is_said_in_one_line_and_built_in_halves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fp8, "LARGEST_ERROR", 1e-3)
    said: list[str] = []
    TensorRTBuilder("sm_89", say=said.append).load(Net, SPEC, tmp_path)
    (line,) = (line for line in said if "no fp8" in line)
    assert line.endswith("too far), float16 instead")
    (entry,) = cache.verify(tmp_path)
    assert json.loads((tmp_path / entry.digest / "manifest.json").read_text())["error"] is None


@pytest.mark.parametrize("target", ["sm_75", "sm_86"])
def test_other_cards_are_refused_before_anything_is_read(target: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{target} has no 8-bit floats") as caught:
        TensorRTBuilder(target).load(lambda: pytest.fail("read"), SPEC, tmp_path)
    assert "engine.fp8=false" in caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


def test_other_engines_take_it_as_fast() -> None:
    x = torch.randn(SPEC.inputs[0].shape)
    for backend in (TorchBackend(), OpenVINOBackend(threads=1)):
        plain = backend.load(Net, replace(SPEC, precision="fast"))(x)[0].clone()
        assert torch.equal(backend.load(Net, SPEC)(x)[0], plain)


# --- the UNet ---


@pytest.mark.parametrize("kind", ["sd", "ip2p", "lcm", "xl"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_unet_knows_what_its_inputs_look_like(kind: str, rows: int, tmp_path: Path) -> None:
    make = random_xl_folder if kind == "xl" else lambda path: random_folder(path, kind)
    graph = graphs(Folder(make(tmp_path)), SIZE, rows=rows, fp8=True)["unet"]
    assert graph.spec.precision == "fp8"
    net = graph.build()
    first, second = (list(net.samples(graph.spec.inputs)) for _ in range(2))
    assert len(first) == 6
    times = set[float]()
    for one, other in zip(first, second, strict=True):
        for tensor, again, spec in zip(one, other, graph.spec.inputs, strict=True):
            assert (tuple(tensor.shape), str(tensor.dtype)) == (spec.shape, f"torch.{spec.dtype}")
            assert torch.equal(tensor, again)
        times |= {float(t) for t in one[1]}
    assert len(times) == 4  # noise levels
    shown = net.shown(first[0], tuple(o[0] for o in [outputs(net, first[:1])[0]]))
    assert [tuple(picture.shape) for picture in shown] == [(1, 3, 64, 64)] * rows


def test_a_random_unet_paints_the_same(tmp_path: Path) -> None:
    folder = Folder(random_folder(tmp_path / "sd", "sd"))
    graph = graphs(folder, SIZE, fp8=True)["unet"]
    net = graph.build()
    reaches, error = calibrated(net, graph.spec)
    assert len(reaches) > 50
    assert 1e-3 < error < fp8.LARGEST_ERROR
    samples = list(net.samples(graph.spec.inputs))[:2]
    wanted = fp8.shown(net, samples)
    export.export(net, graph.spec, tmp_path / NETWORK, eighths=reaches)
    names = [spec.name for spec in graph.spec.inputs]
    found = [run(tmp_path / NETWORK, **dict(zip(names, sample, strict=True))) for sample in samples]
    pictures = [net.shown(*each) for each in zip(samples, found, strict=True)]
    assert difference(pictures, wanted) < fp8.LARGEST_ERROR


def test_mini_paints_the_same() -> None:
    graph = graphs(Folder(Path(__file__).parent.parent / "models" / "mini"), (128, 128), fp8=True)["unet"]
    net = graph.build()
    reaches, error = calibrated(net, graph.spec)
    assert error < 0.02
    samples = list(net.samples(graph.spec.inputs))
    wanted = fp8.shown(net, samples)
    with quantised(net, reaches):
        found = fp8.shown(net, samples)
    for (one,), (other,) in zip(found, wanted, strict=True):
        assert -10 * torch.log10((one - other).square().mean()) > 36  # dB


def test_it_is_a_setting_of_its_own_engines() -> None:
    asked = structure_of(Params(engine=Engines(fp8=True)))
    assert asked.fp8
    assert not asked.covers(structure_of(Params()))
    assert not structure_of(Params()).covers(asked)
    refit = structure_of(Params(engine=Engines(refit=True)))
    assert refit.covers(structure_of(Params()))
    assert not structure_of(Params()).covers(refit)


def test_whatever_decides_about_it_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(random_folder(tmp_path, "sd"))
    found = {graphs(folder, SIZE)["unet"].spec.fingerprint, graphs(folder, SIZE, fp8=True)["unet"].spec.fingerprint}
    monkeypatch.setattr("models.sampled_unet.VERSION", "samples 2")
    found.add(graphs(folder, SIZE, fp8=True)["unet"].spec.fingerprint)
    (tmp_path / "vae" / "more.json").write_text("{}")
    found.add(graphs(folder, SIZE, fp8=True)["unet"].spec.fingerprint)
    assert len(found) == 4


# --- on the card ---


PLAIN = replace(SPEC, precision="fast")
OPEN = replace(PLAIN, architecture="a convolution and a linear layer")


class Opened:
    """An engine that is so far from the network."""

    def __init__(self, off: float) -> None:
        self.off = off

    def __call__(self, x: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            return ((1 + self.off) * Net()(x),)

    def keep(self, folder: Path) -> None:
        pass


@pytest.fixture
def built_specs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[EngineSpec]:
    """A card of which nothing is asked: what is built is noted."""
    found: list[EngineSpec] = []

    @contextmanager
    def built(module: Any, spec: EngineSpec, recipe: Any, root: Path, say: Any, look: Any) -> Iterator[Built]:
        found.append(spec)
        look(module())
        (tmp_path / "engine").touch()
        error = 0.01 if spec.precision == "fp8" else None
        yield Built(tmp_path / "engine", error, {NAME: b"{}"} if spec.architecture else {})

    library = type("Trt", (), {"Logger": type("L", (), {"ERROR": 1, "__init__": lambda self, level: None})})
    library.Runtime = lambda logger: None  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    monkeypatch.setattr(tensorrt_backend, "lack", lambda sm: None)
    monkeypatch.setattr(tensorrt_backend, "provider_for", lambda sm: RTX)
    monkeypatch.setattr(type(RTX), "library", lambda self: library)
    monkeypatch.setattr(tensorrt_backend, "built", built)
    return found


@pytest.mark.parametrize(("spec", "off"), [(SPEC, 0.3), (SPEC, torch.nan), (OPEN, 0.02)])
def test_an_engine_that_is_off_gives_way_to_a_plain_one(
    spec: EngineSpec, off: float, built_specs: list[EngineSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(TensorRTBackend, "_opened", lambda self, blob, of, folder: Opened(0 if of == PLAIN else off))
    said: list[str] = []
    TensorRTBackend("cpu", say=said.append).load(Net, spec, tmp_path / "engines")
    assert built_specs == [spec, PLAIN]
    assert said[0].endswith("% from the network it was made of, building a plain one")
    (entry,) = cache.verify(tmp_path / "engines")
    assert entry.key["spec"]["precision"] == spec.precision  # as asked for: found again, and not tried again


def test_a_plain_engine_that_is_off_is_not_used(
    built_specs: list[EngineSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(TensorRTBackend, "_opened", lambda self, blob, of, folder: Opened(0.1))
    with pytest.raises(UserError, match=r"10\.0% from the network") as caught:
        TensorRTBackend("cpu").load(Net, PLAIN, tmp_path / "engines")
    assert "torch-cuda" in caught.value.hint
    assert cache.entries(tmp_path / "engines") == []


@pytest.mark.gpu
def test_the_card_computes_what_was_judged(tmp_path: Path) -> None:
    if reason := why_no_gpu():
        pytest.skip(reason)
    backend = TensorRTBackend()
    if not has_fp8(backend.recipe.target):
        pytest.skip(f"needs a gpu with 8-bit floats, not {backend.recipe.target}")
    net = Net().eval()
    x = next(net.samples(SPEC.inputs))[0]
    with quantised(net, calibrated(net, SPEC)[0]):
        (wanted,) = outputs(net, [(x,)])
    assert difference([(backend.load(Net, SPEC, tmp_path)(x)[0].cpu(),)], [wanted]) < 16e-3
