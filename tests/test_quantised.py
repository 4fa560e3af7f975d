"""8-bit engines: quick where they are close, judged by samples, kept in the cache, and never at the picture's cost."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from accel import cache, openvino_backend, quantised
from accel.engine import EngineSpec, TensorSpec
from accel.openvino_backend import OpenVINOBackend
from accel.torch_backend import TorchBackend
from models.folder import Folder
from models.networks import SAMPLES, graphs
from models.pictures import photographs
from tests.folders import random_folder

SPEC = EngineSpec("blur", (TensorSpec("x", (1, 3, 32, 48)),), (TensorSpec("y", (1, 8, 32, 48)),), "seed 3", "int8")

MEANS = [115.0, 65.9, 19.3, 117.9, 99.4, 133.8]  # of the photographs


class Blur(nn.Module):
    """Two convolutions, and samples; `calls` counts how often those are asked for."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y

    def samples(self, inputs: tuple[TensorSpec, ...]) -> Iterator[tuple[Tensor]]:
        type(self).calls += 1
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            yield (torch.rand(inputs[0].shape, generator=generator),)


class Unsampled(Blur):
    samples = None  # type: ignore[assignment]


@pytest.fixture
def backend() -> OpenVINOBackend:
    return OpenVINOBackend(threads=1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands for NNCF: the model as it is; what it was called with, in numbers of samples."""
    called: list[int] = []

    def same(model, samples):
        called.append(len(samples))
        return model

    monkeypatch.setattr(openvino_backend, "quantised", same)
    return called


def test_int8_engine_is_close_computes_in_integers_and_is_made_once(backend, tmp_path: Path, caplog) -> None:
    Blur.calls = 0
    with caplog.at_level(logging.INFO, logger="accel"):
        engine = backend.load(Blur, SPEC, tmp_path)
    assert [r.message.split(",")[0] for r in caplog.records if r.name.startswith("accel")] == ["blur: int8"]
    x = torch.rand(SPEC.inputs[0].shape)
    (wanted,) = TorchBackend().load(Blur, replace(SPEC, precision="fp32"))(x)
    found = engine(x)[0].clone()
    error = float((found - wanted).norm() / wanted.norm())
    assert 1e-4 < error < quantised.LARGEST_ERROR
    (entry,) = cache.entries(tmp_path)
    manifest = json.loads((tmp_path / entry.digest / "manifest.json").read_text())
    assert 1e-4 < manifest["error"] < quantised.LARGEST_ERROR
    again = OpenVINOBackend(threads=1).load(lambda: pytest.fail("built again"), SPEC, tmp_path)
    assert torch.equal(again(x)[0], found)
    assert Blur.calls == 1


def test_what_int8_would_spoil_stays_in_floats_and_is_said_once(backend, fake, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(openvino_backend, "LARGEST_ERROR", 0.0)
    with caplog.at_level(logging.INFO, logger="accel"):
        for _ in range(2):
            engine = backend.load(Blur, SPEC, tmp_path)
    told = [record.message for record in caplog.records if "no int8" in record.message]
    assert len(told) == 1
    assert "too far" in told[0]
    assert fake == [4]  # of six: two judge
    x = torch.rand(SPEC.inputs[0].shape)
    fast = backend.load(Blur, replace(SPEC, precision="fast"))
    assert torch.equal(engine(x)[0], fast(x)[0])


@pytest.mark.parametrize("lack", ["package", "device", "samples"])
def test_without_the_means_int8_is_as_fast(backend, monkeypatch, caplog, lack: str) -> None:
    if lack == "package":
        monkeypatch.setattr(quantised, "library_version", lambda: None)
    if lack == "device":
        monkeypatch.setattr(backend, "_has_int8", False)
    with caplog.at_level(logging.INFO, logger="accel"):
        engine = backend.load(Unsampled if lack == "samples" else Blur, SPEC)
    hints = {"package": "livestyle[quantise]", "device": "this device", "samples": "nothing to judge it by"}
    assert hints[lack] in caplog.text
    x = torch.rand(SPEC.inputs[0].shape)
    assert torch.equal(engine(x)[0], backend.load(Blur, replace(SPEC, precision="fast"))(x)[0])


def test_int8_can_be_left_out(fake) -> None:
    engine = OpenVINOBackend(threads=1, int8=False).load(Blur, SPEC)
    assert engine.spec == replace(SPEC, precision="fast")
    assert fake == []


def test_a_quantiser_that_fails_costs_a_line_and_not_the_engine(backend, monkeypatch, caplog) -> None:
    monkeypatch.setattr(quantised.sys, "executable", "/bin/false")
    with caplog.at_level(logging.INFO, logger="accel"):
        assert backend.load(Blur, SPEC)(torch.rand(SPEC.inputs[0].shape))[0].isfinite().all()
    assert "no int8 (exit status 1)" in caplog.text


def test_another_version_of_nncf_or_other_samples_are_other_engines(tmp_path, monkeypatch, backend) -> None:
    keys = {cache.digest_of(cache.key_of(backend.fingerprint, SPEC))}
    keys.add(cache.digest_of(cache.key_of(backend.fingerprint, replace(SPEC, precision="fast"))))
    keys.add(cache.digest_of(cache.key_of(backend.fingerprint, replace(SPEC, fingerprint="seed 3 other pictures"))))
    monkeypatch.setattr(openvino_backend, "library_version", lambda: "4.0.0")
    keys.add(cache.digest_of(cache.key_of(OpenVINOBackend(threads=1).fingerprint, SPEC)))
    assert len(keys) == 4


def test_difference_is_of_the_worst_output() -> None:
    one, other = torch.ones(4), torch.full((4,), 2, dtype=torch.uint8)
    assert quantised.difference([(one, other)], [(one, other)]) == 0
    assert quantised.difference([(one, other), (one, other)], [(one, other), (2 * one, other)]) == pytest.approx(
        0.2**0.5
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(random_folder(tmp_path_factory.mktemp("folder"), "sd"))


@pytest.mark.parametrize("as_bytes", [True, False])
def test_autoencoders_know_what_their_inputs_look_like(folder: Folder, as_bytes: bool) -> None:
    found = graphs(folder, (64, 40), as_bytes=as_bytes)
    for name in ("encode", "decode"):
        build, spec = found[name].build, found[name].spec
        assert spec.precision == "int8"
        assert spec.fingerprint.endswith(SAMPLES)
        first, second = (list(build().samples(spec.inputs)) for _ in range(2))
        assert len(first) >= 6
        for (a,), (b,) in zip(first, second, strict=True):
            assert (tuple(a.shape), str(a.dtype)) == (spec.inputs[0].shape, f"torch.{spec.inputs[0].dtype}")
            assert torch.equal(a, b)
    assert found["unet"].spec.precision == "fast"


def test_samples_have_not_changed_without_their_version() -> None:
    pictures = list(photographs((64, 40)))
    assert all(picture.shape == (1, 40, 64, 3) for picture in pictures)
    means = [float(picture.float().mean()) for picture in pictures]
    assert (SAMPLES, means) == ("samples 1", pytest.approx(MEANS, abs=1))  # decoders differ a little


def test_small_decoder_paints_the_same_in_int8(folder: Folder, backend, caplog) -> None:
    graph = graphs(folder, (64, 64))["decode"]
    latents = torch.randn(graph.spec.inputs[0].shape, generator=torch.Generator().manual_seed(1))
    with caplog.at_level(logging.INFO, logger="accel"):
        found = backend.load(graph.build, graph.spec)(latents)[0].float()
    assert "decode: int8" in caplog.text
    wanted = TorchBackend().load(graph.build, graph.spec)(latents)[0].float()
    psnr = 20 * torch.log10(255 / (found - wanted).square().mean().sqrt())
    assert psnr > 38
