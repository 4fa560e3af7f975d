"""Published configurations: as large as the real models, and narrow twins of them equal diffusers' own pipelines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    ControlNetModel,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.load import load
from models.params import Params, Style
from models.picture_encoder import Adapter, PictureEncoder
from models.safety import read_checker
from scripts.random_folder import (
    MODELS,
    Published,
    controlnet,
    image_encoder,
    ip_adapter,
    listing,
    lora,
    motion_adapter,
    safety_checker,
    text_models,
    unet,
    write,
    write_addon,
)

SIZE = (96, 64)  # width, height
TOLERANCE = 1e-3
PROMPT, NEGATIVE = "oil painting of a rainy city", "ink"


def narrow(model: Published) -> Published:
    """The same layers with a tenth of the width or less."""
    few = {5: 2, 10: 4, 20: 8}
    heads = model.unet["attention_head_dim"]
    by = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "projection_dim": 16}
    smaller: dict[str, Any] = {
        "block_out_channels": tuple(width // 10 for width in model.unet["block_out_channels"]),
        "attention_head_dim": heads if isinstance(heads, int) else tuple(few[n] for n in heads),
        "cross_attention_dim": model.unet["cross_attention_dim"] // 16,
        "norm_num_groups": 8,
    }
    if len(model.texts) > 1:
        smaller |= {"addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 2816 // 16}
    texts = tuple(text | {key: text[key] // n for key, n in by.items()} for text in model.texts)
    return replace(model, unet=model.unet | smaller, texts=texts)


@pytest.fixture(scope="module", params=[name for name in MODELS if name != "sd15"])  # sd15-lcm says it all
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write(narrow(MODELS[request.param]), tmp_path_factory.mktemp(request.param), torch.float32)
    vae = AutoencoderTiny.from_pretrained(path / "vae")
    last = vae.decoder.layers[-1]
    with torch.no_grad():  # random decoders paint everything nearly black; comparisons need contrast
        last.weight.mul_(20)
        last.bias.fill_(0.5)
    vae.save_pretrained(path / "vae")
    return path


def schedule(folder: Path) -> Any:
    """The folder's own scheduler where it is one for few steps, as the turbo models', else LCM's."""
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    own = {kind.__name__: kind for kind in (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler)}
    return own.get(config["_class_name"], LCMScheduler).from_config(config)


def merged(folder: Path) -> UNet2DConditionModel:
    """The folder's UNet with its LoRA, the formula written out."""
    network = UNet2DConditionModel.from_pretrained(folder / "unet")
    if not (folder / "lora").is_dir():
        return network
    row = json.loads((folder / "lora" / "lora.json").read_text())
    tensors = load_file(folder / "lora" / row["file"])
    layers = {f"lora_unet_{path.replace('.', '_')}": m for path, m in network.named_modules()}
    names = {key.split(".")[0] for key in tensors}
    assert names <= layers.keys()
    with torch.no_grad():
        for name in names:
            down, up = (tensors[f"{name}.lora_{part}.weight"].flatten(1) for part in ("down", "up"))
            weight = layers[name].weight
            weight += row["scale"] * tensors[f"{name}.alpha"] / len(down) * (up @ down).view_as(weight)
    return network


def theirs(folder: Path, scheduler: Any, steps: int, guidance: float) -> torch.Tensor:
    parts: dict[str, Any] = {
        "vae": AutoencoderTiny.from_pretrained(folder / "vae"),
        "unet": merged(folder),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": scheduler,
    }
    if (folder / "text_encoder_2").is_dir():
        parts["text_encoder_2"] = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
        parts["tokenizer_2"] = CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
        pipeline = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    else:
        nothing: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
        pipeline = StableDiffusionImg2ImgPipeline(**parts, **nothing, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        image=picture(),
        num_inference_steps=steps,
        strength=1.0,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images


def picture() -> torch.Tensor:
    return torch.rand(1, 3, SIZE[1], SIZE[0], generator=torch.Generator().manual_seed(7))


def stylized(folder: Path, steps: int, guidance: float) -> torch.Tensor:
    stylizer = load(str(folder), SIZE, engine="torch", as_bytes=False)
    params = Params(style=Style(prompt=PROMPT, negative=NEGATIVE, seed=5, steps=steps, guidance=guidance))
    with torch.inference_mode():
        return stylizer.stylize(stylizer.open(params), picture(), params).clone()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def file_size(tensors: Mapping[str, torch.Tensor], width: int, metadata: Mapping[str, str] | None) -> int:
    """Bytes of a safetensors file of these tensors, `width` bytes a value."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, t in sorted(tensors.items()):
        size = t.numel() * width
        header[name] = {"dtype": "F16", "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + at


@pytest.mark.parametrize(
    ("name", "network", "texts"),
    [
        ("sd15", 859_520_964, [123_060_480]),
        ("sd-turbo", 865_910_724, [340_387_840]),
        ("sdxl-turbo", 2_567_463_684, [123_060_480, 694_659_840]),
    ],
)
def test_has_as_many_weights_as_the_published_model(name: str, network: int, texts: list[int]) -> None:
    with torch.device("meta"):
        assert count(unet(MODELS[name])) == network
        assert [count(text) for text in text_models(MODELS[name])] == texts


def test_so_have_what_is_added_to_them() -> None:
    """The counts that the published files come to; a motion adapter's files hold its position tables besides."""
    with torch.device("meta"):
        assert count(controlnet()) == 361_279_120
        assert count(image_encoder()) == 632_076_800
        assert count(safety_checker()) == 303_981_588
        motion = motion_adapter(MODELS["animatediff-lcm"])
        assert count(motion) == 453_209_280
        assert sum(t.numel() for t in motion.state_dict().values()) == 453_813_440


def test_the_files_are_as_long_as_the_published_ones_to_the_byte() -> None:
    """So names, shapes and formats are the same; what changes from run to run is the weights."""
    with torch.device("meta"):
        assert file_size(lora(MODELS["sd15-lcm"]), 2, {"format": "pt"}) == 134_621_556
        assert file_size(ip_adapter(), 2, None) == 44_642_768
        checker = safety_checker().state_dict()
    named = {f"vision_model.{k}" if k.startswith("vision_model.") else k: t for k, t in checker.items()}
    assert file_size(named, 4, {"format": "pt"}) == 1_215_979_664


def test_a_narrow_folder_in_half_precision_is_read_by_the_users_way(tmp_path: Path) -> None:
    path = write(narrow(MODELS["animatediff-lcm"]), tmp_path)
    lines = list(listing(path))
    assert [line.split(":")[0] for line in lines] == [
        "lora/AnimateLCM_sd15_t2v_lora.safetensors",
        "motion_adapter/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert all(t.dtype == torch.bfloat16 for file in path.rglob("*.safetensors") for t in load_file(file).values())
    assert json.loads((path / "lora" / "lora.json").read_text())["scale"] == 0.8
    assert json.loads((path / "scheduler" / "scheduler_config.json").read_text())["beta_schedule"] == "linear"
    found = stylized(path, 2, 1.0)
    assert found.isfinite().all()
    assert found.std() > 0.001


def test_narrow_addons_in_half_precision_are_read_by_the_users_way(tmp_path: Path) -> None:
    model = narrow(MODELS["sd15"])
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    control = write_addon("controlnet", tmp_path / "controlnet", model=model)
    picture = write_addon("ip-adapter", tmp_path / "ip-adapter", model=model, **small)
    checker = write_addon("safety-checker", tmp_path / "safety-checker", **small)
    assert [len(list(listing(path))) for path in (control, picture, checker)] == [1, 2, 1]

    network = ControlNetModel.from_pretrained(control, torch_dtype=torch.float32)
    assert all(layer.weight.abs().max() > 0 for layer in network.controlnet_down_blocks)
    adapter = Adapter(picture / "ip-adapter_sd15.safetensors", picture / "image_encoder")
    assert adapter.misfit(48) == ""
    with torch.device("meta"):
        widths = [m.to_k.out_features for path, m in unet(model).named_modules() if path.endswith("attn2")]
    assert sorted(len(k) for k, _ in adapter.layers) == sorted(widths)
    tokens = PictureEncoder(adapter).embed(np.full((64, 96, 3), 200, np.uint8))
    assert tokens.shape == (1, 4, 48)
    assert tokens.isfinite().all()
    assert count(read_checker(checker)) > 0


@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (2, 3.0), (4, 1.0)])
def test_a_narrow_twin_equals_diffusers(folder: Path, steps: int, guidance: float) -> None:
    found = stylized(folder, steps, guidance)
    assert found.std() > 0.02  # else anything equals anything
    assert (found - theirs(folder, schedule(folder), steps, guidance)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("folder", ["sd-turbo"], indirect=True)
def test_v_prediction_down_from_no_signal_at_all(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    lcm = {"_class_name": "LCMScheduler", "timestep_spacing": "leading"}
    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, **lcm}
    path.write_text(json.dumps(json.loads(path.read_text()) | zero))
    found = stylized(folder, 2, 3.0)
    assert (found - theirs(folder, schedule(folder), 2, 3.0)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("folder", ["sd15-lcm"], indirect=True)
def test_the_lora_counts_and_at_scale_zero_is_not_there(folder: Path) -> None:
    found = stylized(folder, 1, 1.0)
    row = folder / "lora" / "lora.json"
    row.write_text(json.dumps(json.loads(row.read_text()) | {"scale": 0.0}))
    without = stylized(folder, 1, 1.0)
    assert (found - without).abs().max() > 20 * TOLERANCE
    (folder / "lora").rename(folder / "no lora")
    assert torch.equal(stylized(folder, 1, 1.0), without)
