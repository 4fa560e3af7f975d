"""Every backend against the torch reference, over small networks of the classes that the product runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from accel import cache
from accel.engine import Backend, EngineSpec, TensorSpec
from accel.null_backend import NullBackend
from accel.openvino_backend import OpenVINOBackend
from accel.torch_backend import TorchBackend
from models.load import compiled_graphs


class Unet(nn.Module):
    """diffusers' UNet, 24 channels in and 12 out, head size 16."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.unet = UNet2DConditionModel(
            in_channels=24,
            out_channels=12,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=4,  # diffusers' name for the number of heads: 64 / 4 = 16
            norm_num_groups=8,
        )

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.unet(latents, timestep, text, return_dict=False)[0]


class Codec(nn.Module):
    """A uint8 picture through `PatchAutoencoder` and back: latents (float32) and a picture (uint8)."""

    def __init__(self) -> None:
        super().__init__()
        from models.autoencoder import PatchAutoencoder

        self.autoencoder = PatchAutoencoder(latent_channels=12, quarter_channels=16, eighth_channels=32)

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        x = picture.permute(0, 3, 1, 2).to(self.autoencoder.dtype) / 127.5 - 1  # (B, 3, H, W)
        latents = self.autoencoder.encode(x).latents
        sample = self.autoencoder.decode(latents).sample
        return latents, ((sample.permute(0, 2, 3, 1) + 1) * 127.5).clamp(0, 255).to(torch.uint8)


class Text(nn.Module):
    """transformers' CLIP text tower: token ids → hidden states."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        config = CLIPTextConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            eos_token_id=2,
        )
        self.text = CLIPTextModel(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.text(ids).last_hidden_state


class Scalars(nn.Module):
    """Every small dtype, and a 0-d input."""

    def forward(self, gain: Tensor, step: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gain * step.to(gain.dtype), step + 1, ids * 2


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def module(self) -> nn.Module:
        torch.manual_seed(7)
        return self.build()

    def spec(self, precision: str = "fp32", fingerprint: str = "seed-7") -> EngineSpec:
        return EngineSpec(self.build.__name__, self.inputs, self.outputs, fingerprint, precision)

    def example(self, seed: int = 1) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randn(s.shape, generator=generator)
            if s.dtype == "float32"
            else torch.randint(0, 100, s.shape, generator=generator, dtype=getattr(torch, s.dtype))
            for s in self.inputs
        )


UNET = Case(
    Unet,
    (
        TensorSpec("latents", (1, 24, 8, 16)),
        TensorSpec("timestep", (1,), "int64"),
        TensorSpec("text", (1, 7, 32)),
    ),
    (TensorSpec("sample", (1, 12, 8, 16)),),
)
CODEC = Case(
    Codec,
    (TensorSpec("picture", (1, 32, 64, 3), "uint8"),),
    (TensorSpec("latents", (1, 12, 4, 8)), TensorSpec("rgb", (1, 32, 64, 3), "uint8")),
)
TEXT = Case(Text, (TensorSpec("ids", (1, 16), "int64"),), (TensorSpec("hidden", (1, 16, 32)),))
SCALARS = Case(
    Scalars,
    (TensorSpec("gain", ()), TensorSpec("step", (1,), "int64"), TensorSpec("ids", (2, 3), "int32")),
    (TensorSpec("product", (1,)), TensorSpec("next", (1,), "int64"), TensorSpec("double", (2, 3), "int32")),
)
CASES = [UNET, CODEC, TEXT, SCALARS]

TIGHT, LOOSE = 1e-4, 5e-2  # relative L2
BACKENDS: dict[str, tuple[Callable[[], Backend], str, float | None]] = {
    "torch-fp32": (TorchBackend, "fp32", TIGHT),
    "torch-bf16": (lambda: TorchBackend(dtype="bfloat16"), "fast", LOOSE),
    "openvino-fp32": (lambda: OpenVINOBackend(threads=1), "fp32", TIGHT),
    "openvino-fast": (lambda: OpenVINOBackend(threads=1), "fast", LOOSE),
    "openvino-int8": (lambda: OpenVINOBackend(threads=1), "int8", LOOSE),  # no samples: as "fast"
    "null": (NullBackend, "fast", None),  # shapes only
}
if torch.cuda.is_available():
    from accel.cuda_backend import CudaBackend

    BACKENDS["torch-cuda-fast"] = (lambda: CudaBackend(mode=None), "fast", LOOSE)


def relative_l2(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.cpu().double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.build.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_agrees_with_the_torch_reference(backend: str, case: Case) -> None:
    make, precision, tolerance = BACKENDS[backend]
    example = case.example()
    with torch.inference_mode():
        wanted = case.module().eval()(*example)
    wanted = (wanted,) if isinstance(wanted, Tensor) else wanted

    engine = make().load(case.module, case.spec(precision))
    pending = engine.launch(*example)
    found = pending.wait()

    assert pending.done()
    assert len(found) == len(wanted)
    for a, b, spec in zip(found, wanted, case.outputs, strict=True):
        assert (tuple(a.shape), a.dtype) == (spec.shape, getattr(torch, spec.dtype))
        if tolerance is not None:
            assert relative_l2(a, b) < tolerance


@pytest.mark.parametrize("make", [TorchBackend, lambda: OpenVINOBackend(threads=1), NullBackend])
def test_engine_refuses_another_shape_dtype_or_count(make: Callable[[], Backend]) -> None:
    engine = make().load(SCALARS.module, SCALARS.spec())
    gain, step, ids = SCALARS.example()
    for wrong in [(gain, step), (gain[None], step, ids), (gain, step.int(), ids)]:
        with pytest.raises(ValueError, match="Scalars"):
            engine(*wrong)


@pytest.mark.parametrize("make", [TorchBackend, lambda: OpenVINOBackend(threads=1)])
def test_spec_that_is_not_the_modules_is_refused_at_load(make: Callable[[], Backend]) -> None:
    wrong = EngineSpec("Text", TEXT.inputs, (TensorSpec("hidden", (1, 16, 31)),), "seed-7", "fp32")
    with pytest.raises(ValueError, match="Text"):
        make().load(TEXT.module, wrong)


def test_openvino_reads_strided_inputs_and_reuses_its_outputs() -> None:
    engine = OpenVINOBackend(threads=1).load(CODEC.module, CODEC.spec())
    (picture,) = CODEC.example()
    strided = picture.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    first = engine(picture)
    kept = first[0].clone()
    second = engine(strided)
    assert torch.equal(second[0], kept)
    assert second[0].data_ptr() == first[0].data_ptr()  # valid until the next launch, as the protocol says


def test_launching_again_waits_for_the_launch_before() -> None:
    engine = OpenVINOBackend(threads=1).load(CODEC.module, CODEC.spec())
    one, two = CODEC.example(1), CODEC.example(2)
    wanted = engine(*two)[0].clone()
    engine.launch(*one)
    assert torch.equal(engine.launch(*two).wait()[0], wanted)


class Counted:
    """A factory that counts its calls."""

    def __init__(self, case: Case) -> None:
        self.case, self.calls = case, 0

    def __call__(self) -> nn.Module:
        self.calls += 1
        return self.case.module()


@pytest.mark.parametrize("precision", ["fp32", "fast"])
def test_second_load_comes_from_the_cache_and_computes_the_same(tmp_path, precision: str) -> None:
    factory, backend = Counted(CODEC), OpenVINOBackend(threads=1)
    first = backend.load(factory, CODEC.spec(precision), tmp_path)
    second = OpenVINOBackend(threads=1).load(factory, CODEC.spec(precision), tmp_path)
    assert factory.calls == 1
    assert torch.equal(first(*CODEC.example())[0], second(*CODEC.example())[0])


def test_other_weights_or_precision_are_other_entries(tmp_path) -> None:
    factory, backend = Counted(CODEC), OpenVINOBackend(threads=1)
    for spec in [CODEC.spec(), CODEC.spec(fingerprint="seed-8"), CODEC.spec("fast")]:
        backend.load(factory, spec, tmp_path)
    assert factory.calls == 3
    assert len(cache.entries(tmp_path)) == 3


@pytest.mark.parametrize("valid_checksum", [False, True])
def test_damaged_engine_is_rebuilt_and_said_once(tmp_path, caplog, valid_checksum: bool) -> None:
    factory, backend = Counted(CODEC), OpenVINOBackend(threads=1)
    backend.load(factory, CODEC.spec(), tmp_path)
    (entry,) = cache.entries(tmp_path)
    if valid_checksum:  # a blob that OpenVINO itself refuses
        cache.drop(tmp_path, entry.digest)
        cache.write(tmp_path, entry.key, b"not an engine", 0.0)
    else:
        (tmp_path / entry.digest / "engine.bin").write_bytes(b"not an engine")
    with caplog.at_level(logging.WARNING):
        engine = backend.load(factory, CODEC.spec(), tmp_path)
    assert factory.calls == 2
    assert len(caplog.records) == 1
    assert "building it again" in caplog.text
    assert "\n" not in caplog.messages[0]
    assert engine(*CODEC.example())[1].dtype == torch.uint8
    backend.load(factory, CODEC.spec(), tmp_path)
    assert factory.calls == 2


def test_unwritable_cache_costs_one_warning_and_no_engine(tmp_path, caplog) -> None:
    blocked = tmp_path / "file" / "engines"
    (tmp_path / "file").write_text("a file where the folder should be")
    backend = OpenVINOBackend(threads=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            engine = backend.load(CODEC.module, CODEC.spec(), blocked)
            assert len(engine(*CODEC.example())) == 2
    assert len([r for r in caplog.records if "cannot be written" in r.message]) == 1


def test_the_embedded_model_runs_in_float32_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without bf16, where OpenVINO's fused subgraphs ended the process."""
    graph = compiled_graphs("mini", (128, 64))["unet"]
    backend = OpenVINOBackend(threads=1)
    monkeypatch.setattr(backend, "_has_bf16", False)
    inputs = tuple(torch.full(s.shape, 0.5, dtype=getattr(torch, s.dtype)) for s in graph.spec.inputs)
    (found,) = backend.load(graph.build, graph.spec)(*inputs)
    (wanted,) = TorchBackend().load(graph.build, graph.spec)(*inputs)
    assert (found - wanted).abs().max() <= 1e-3
