"""A single-file checkpoint becomes the folder it was once made from."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from accel.errors import UserError
from models.checkpoint import SD15, converted
from models.folder import Folder
from models.load import folder_of
from tests.folders import tokenizer

State = dict[str, torch.Tensor]
# Stable Diffusion 1.5 in all but its widths.
SMALL: dict[str, dict[str, Any]] = {
    "unet": SD15["unet"] | {"cross_attention_dim": 32, "block_out_channels": [32, 32, 32, 32], "sample_size": 8},
    "vae": SD15["vae"] | {"block_out_channels": [32, 32, 32, 32], "sample_size": 64},
    "text_encoder": SD15["text_encoder"]
    | {"vocab_size": len(tokenizer()), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "projection_dim": 32, "bos_token_id": 56, "eos_token_id": 57},
    "scheduler": SD15["scheduler"],
}
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
ENDS = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "conv_out": "out.2",
        "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0"}  # fmt: skip
VAE = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k",
       "to_v": "v", "to_out.0": "proj_out", "mid_block.attentions.0": "mid.attn_1"}  # fmt: skip


def unet_key(key: str) -> str:
    """A UNet weight's name in the original layout (its blocks are numbered through, layer by layer)."""
    for ours, theirs in ENDS.items():
        if key.startswith(ours + "."):
            return theirs + key.removeprefix(ours)
    side, rest = key.split(".", 1)
    if side == "mid_block":
        kind, number, tail = rest.split(".", 2)
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
    else:
        block, kind, number, tail = rest.split(".", 3)
        down, inner = side == "down_blocks", 1 if kind == "attentions" else 0
        layer = int(block) * 3 + int(number) + down
        if kind == "downsamplers":
            return f"input_blocks.{int(block) * 3 + 3}.0.{tail.replace('conv', 'op')}"
        if kind == "upsamplers":
            return f"output_blocks.{int(block) * 3 + 2}.{1 if block == '0' else 2}.{tail}"
        place = f"{'input' if down else 'output'}_blocks.{layer}.{inner}"
    if kind == "resnets":
        name, end = tail.split(".", 1)
        tail = f"{RESNET[name]}.{end}"
    return f"{place}.{tail}"


def vae_key(key: str) -> str:
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    for ours, theirs in VAE.items():
        key = key.replace(ours, theirs)
    return key


def networks() -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    torch.manual_seed(0)
    text = {k: v for k, v in SMALL["text_encoder"].items() if k not in ("architectures", "model_type")}
    return (
        UNet2DConditionModel.from_config(SMALL["unet"]),
        AutoencoderKL.from_config(SMALL["vae"]),
        CLIPTextModel(CLIPTextConfig(**text)),
    )


def single_file(unet: torch.nn.Module, vae: torch.nn.Module, text: torch.nn.Module) -> State:
    """The networks as one checkpoint in the original layout."""
    state: State = {f"model.diffusion_model.{unet_key(k)}": v for k, v in unet.state_dict().items()}
    for key, tensor in vae.state_dict().items():
        linear = "mid_block.attentions" in key and tensor.ndim == 2  # a 1×1 convolution there
        state[f"first_stage_model.{vae_key(key)}"] = tensor[:, :, None, None] if linear else tensor
    for key, tensor in text.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    return {key: tensor.contiguous() for key, tensor in state.items()}


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def state() -> State:
    return single_file(*networks())


@pytest.fixture
def file(tmp_path: Path, state: State) -> Path:
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    save_file(state, tmp_path / "toon.safetensors")
    return tmp_path / "toon.safetensors"


def test_a_single_file_gives_back_the_networks_it_was_made_from(file: Path) -> None:
    folder = Folder(converted(file, SMALL))
    for theirs, ours in zip(networks(), (folder.unet(), folder.vae(), folder.text_model()), strict=True):
        expected, got = theirs.state_dict(), ours.state_dict()
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert folder.text() is not None
    assert folder.scheduler().config["beta_schedule"] == "scaled_linear"


def test_it_is_converted_once(file: Path) -> None:
    folder = converted(file, SMALL)
    made = (folder / "model_index.json").stat().st_mtime_ns
    time.sleep(0.01)
    assert converted(file, SMALL) == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == made
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_half_floats_stay_half(file: Path, state: State) -> None:
    save_file({key: tensor.half() for key, tensor in state.items()}, file)
    weights = converted(file, SMALL) / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 0.6 * sum(
        tensor.numel() * 4 for key, tensor in state.items() if key.startswith("model.")
    )


def refused(file: Path, state: State) -> str:
    save_file(state, file)
    with pytest.raises(UserError) as caught:
        converted(file, SMALL)
    assert caught.value.hint
    assert not list((file.parent / "models").glob(".*"))  # nothing half made is left
    return caught.value.message


def test_other_families_are_named(file: Path, state: State) -> None:
    cross = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    first = "model.diffusion_model.input_blocks.0.0.weight"
    assert "LoRA" in refused(file, {"lora_unet_conv_in.lora_up.weight": torch.ones(1)})
    assert "XL" in refused(file, state | {"conditioner.embedders.1.model.ln_final.weight": torch.ones(1)})
    assert "no Stable Diffusion UNet" in refused(file, {"weight": torch.ones(1)})
    assert "inpainting" in refused(file, state | {first: torch.ones(32, 9, 3, 3)})
    assert "is (16, 4, 3, 3)" in refused(file, state | {first: torch.ones(16, 4, 3, 3)})
    assert "width 64" in refused(file, state | {cross: torch.ones(32, 64)})


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("first_stage_model", "has no vae"),
        ("cond_stage_model", "has no text_encoder"),
        ("model.diffusion_model.middle_block.0", "has no unet mid_block.resnets.0"),
    ],
)
def test_a_checkpoint_without_one_of_its_networks_is_refused(file: Path, state: State, gone: str, said: str) -> None:
    assert said in refused(file, {key: tensor for key, tensor in state.items() if not key.startswith(gone)})


def test_a_cut_file_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="half-downloaded"):
        folder_of(str(file))


def test_without_a_tokenizer_or_a_hub_it_says_where_to_put_one(file: Path) -> None:
    (file.parent / "tokenizer").rename(file.parent / "elsewhere")
    with pytest.raises(UserError, match="brings no tokenizer") as caught:
        converted(file, SMALL)
    assert "vocab.json" in caught.value.hint
