"""T2I-Adapters equal diffusers' own pipelines (≤ 1e-3 in float32), beside ControlNets as well as alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    LCMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionXLAdapterPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from accel.errors import UserError
from accel.openvino_backend import OpenVINOBackend
from models.control import control_picture
from models.controlnet import control_folder, control_graph
from models.folder import Folder
from models.residuals import Residuals, hint_specs
from tests.folders import random_folder, random_xl_folder
from tests.test_controlnet import NEGATIVE, PROMPT, TOLERANCE, Ours, floats, picture, random_controlnet

CHANNELS = {"sd": [32, 64, 64], "xl": [16, 32, 64, 64]}


def random_adapter(path: Path, seed: int, **settings: Any) -> Path:
    """An adapter whose hints are as large as what they are added to."""
    torch.manual_seed(seed)
    net = T2IAdapter(num_res_blocks=1, **settings)
    for name, weight in net.named_parameters():
        if name.endswith("weight"):
            weight.data.mul_(2)
    net.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose blocks stand as the published ones do: attention in all but the lowest."""
    path = random_folder(tmp_path_factory.mktemp("sd"), "sd")
    config = dict(UNet2DConditionModel.load_config(path / "unet"))
    kinds = {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config | kinds).save_pretrained(path / "unet")
    return path


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "canny": random_adapter(root / "canny", 0, in_channels=1, channels=CHANNELS["sd"]),
        "tile": random_adapter(root / "tile", 1, channels=CHANNELS["sd"][:2], adapter_type="light_adapter"),
    }


@pytest.fixture(scope="module")
def ours(folder: Path, nets: dict[str, Path]) -> Ours:
    return Ours(Folder(folder), nets)


def theirs(folder: Path, nets: dict[str, Path], weights: list[float], steps: int, **arguments: Any) -> Tensor:
    """diffusers' latents; its adapters start from noise alone."""
    xl = (folder / "text_encoder_2").is_dir()
    adapters = [T2IAdapter.from_pretrained(path) for path in nets.values()]
    parts: dict[str, Any] = {
        "vae": AutoencoderTiny.from_pretrained(folder / "vae"),
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": LCMScheduler.from_pretrained(folder / "scheduler"),
        "adapter": adapters if len(adapters) > 1 else adapters[0],
    }
    if xl:
        second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
        parts |= {"text_encoder_2": second, "tokenizer_2": CLIPTokenizer.from_pretrained(folder / "tokenizer_2")}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    kinds: Any = StableDiffusionXLAdapterPipeline if xl else StableDiffusionAdapterPipeline
    pipeline: Any = kinds(**parts)
    pipeline.set_progress_bar_config(disable=True)
    images = [
        floats(control_picture(kind, picture()))[:, : adapter.config.in_channels]
        for kind, adapter in zip(nets, adapters, strict=True)
    ]
    found: Tensor = pipeline(
        PROMPT,
        image=images if len(adapters) > 1 else images[0],
        height=picture().shape[0],
        width=picture().shape[1],
        negative_prompt=NEGATIVE,
        num_inference_steps=steps,
        adapter_conditioning_scale=weights if len(adapters) > 1 else weights[0],
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **arguments,
    ).images
    return found


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("kind", "weight"), [("canny", 0.8), ("tile", 1.0)])
def test_one_equals_diffusers(
    folder: Path, nets: dict[str, Path], ours: Ours, kind: str, weight: float, steps: int, guidance: float
) -> None:
    expected = theirs(folder, {kind: nets[kind]}, [weight], steps, guidance_scale=guidance)
    found = ours.latents(f"{kind}:{weight}", steps, guidance, pure=True)
    assert (found - expected).abs().max() <= TOLERANCE
    assert (ours.latents("", steps, guidance, pure=True) - expected).abs().max() > 10 * TOLERANCE


def test_an_adapter_is_asked_once_per_frame(ours: Ours) -> None:
    ours.calls.clear()
    ours.latents("tile:1", steps=4, guidance=3.0)
    assert ours.calls == ["control-tile"]
    ours.latents("tile:1", steps=4)
    assert ours.calls == ["control-tile"] * 2  # another frame, though an equal one


def test_weight_0_is_bit_for_bit_no_adapter(folder: Path, ours: Ours) -> None:
    bare = Ours(Folder(folder), {}, steered=False).latents("", 2)
    assert not torch.equal(ours.latents("tile:1", 2), bare)
    for control in ("tile:0, canny:0", "", "tile@0-0.1"):
        assert torch.equal(ours.latents(control, 2), bare)


def test_adapters_and_controlnets_go_together(tmp_path: Path, folder: Path, nets: dict[str, Path]) -> None:
    both = Ours(Folder(folder), {"tile": nets["tile"], "canny": random_controlnet(tmp_path / "net", folder, 3)})
    adapter, control = (Ours(Folder(folder), {kind: both.nets[kind]}) for kind in ("tile", "canny"))
    assert torch.allclose(both.latents("tile:0.5, canny:0"), adapter.latents("tile:0.5"), atol=1e-5)
    assert torch.allclose(both.latents("tile:0, canny:0.5"), control.latents("canny:0.5"), atol=1e-5)
    one, two = both.latents("tile:0.5"), both.latents("tile:0.5, canny:0.5")
    assert (one - two).abs().max() > 10 * TOLERANCE


def test_xl_equals_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tests.test_controlnet", __name__):
        monkeypatch.setattr(f"{module}.picture", lambda: picture_of_steps)
    monkeypatch.setattr("tests.test_controlnet.SIZE", (96, 64))
    folder = random_xl_folder(tmp_path / "xl")
    settings: dict[str, Any] = {"channels": CHANNELS["xl"], "adapter_type": "full_adapter_xl", "downscale_factor": 16}
    nets = {"tile": random_adapter(tmp_path / "tile", 1, **settings)}
    ours = Ours(Folder(folder), nets)
    for steps, guidance in ((1, 1.0), (2, 3.0)):
        expected = theirs(folder, nets, [0.7], steps, guidance_scale=guidance)
        assert (ours.latents("tile:0.7", steps, guidance, pure=True) - expected).abs().max() <= TOLERANCE


picture_of_steps = picture()[:64]  # whose sides SDXL's adapters can divide


def test_openvino_computes_the_same(folder: Path, nets: dict[str, Path]) -> None:
    model = Folder(folder)
    graph = control_graph(control_folder(f"tile={nets['tile']}", model), model, (1, 4, 8, 8))
    quick = OpenVINOBackend(threads=1).load(graph.build, graph.spec)
    shown, scales = torch.from_numpy(picture()[:64, :64])[None], torch.full((1, 3), 0.5)
    with torch.inference_mode():
        expected = graph.build()(shown, scales)
    for one, other in zip(quick(shown, scales), expected, strict=True):
        assert (one - other).abs().max() <= 0.05 * other.abs().max()


def test_what_does_not_fit_is_refused(tmp_path: Path, folder: Path, nets: dict[str, Path]) -> None:
    for settings in (
        {"channels": [32, 64, 96]},
        {"channels": [32, 64, 64], "in_channels": 4},
        {"channels": [32, 64, 64, 64], "adapter_type": "full_adapter_xl", "downscale_factor": 16},
    ):
        path = random_adapter(tmp_path / "net", 0, **settings)
        with pytest.raises(UserError, match="for another family") as caught:
            control_folder(f"tile={path}", Folder(folder))
        assert caught.value.hint
    xl = Folder(random_xl_folder(tmp_path / "xl"))
    with pytest.raises(UserError, match="for another family"):
        control_folder(f"tile={nets['tile']}", xl)
    path = random_adapter(
        tmp_path / "net", 0, channels=CHANNELS["xl"], adapter_type="full_adapter_xl", downscale_factor=16
    )
    with pytest.raises(UserError, match="steps of 16, not 96x72") as caught:
        control_graph(control_folder(f"tile={path}", xl), xl, (1, 4, 9, 12))
    assert "96x64" in caught.value.hint


def test_hints_stand_where_the_published_models_take_them() -> None:
    sd = {
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    }
    assert [spec.shape for spec in hint_specs(sd, (64, 64), 2, 4)] == [
        (2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16), (2, 1280, 8, 8),
    ]  # fmt: skip
    xl = {"block_out_channels": [320, 640, 1280], "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2}
    assert [spec.shape for spec in hint_specs(xl, (64, 64), 1, 4)] == [
        (1, 320, 32, 32), (1, 640, 32, 32), (1, 1280, 16, 16), (1, 1280, 16, 16),
    ]  # fmt: skip
    assert Residuals(sd | {"layers_per_block": 2}, (64, 64)).fingerprint.endswith("0 hints")
