from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MotionAdapter, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from accel.errors import UserError
from models.folder import Folder
from models.inversion import add_embedding, expanded, read_embedding
from models.lora import Update, fitted, read_lora, sgm_names
from models.loras import merge_lora
from models.networks import graphs
from models.text import TextEncoder
from tests.folders import random_folder, tokenizer

RANK = 4
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"
LAYERS = [  # linear, conv 1×1, conv 3×3, the feed-forward, the time embedding: what an LCM-LoRA covers
    f"{ATTENTION}.attn1.to_q",
    f"{ATTENTION}.attn2.to_k",
    f"{ATTENTION}.attn2.to_out.0",
    f"{ATTENTION}.ff.net.0.proj",
    "down_blocks.1.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.1.resnets.0.conv_shortcut",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.0.upsamplers.0.conv",
    "mid_block.resnets.1.time_emb_proj",
    "time_embedding.linear_1",
    "conv_in",
    "conv_out",
]
Z, TIME = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([499.0])
WORDS = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2))


def unet(words: int = 32) -> UNet2DConditionModel:
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=2,
        cross_attention_dim=words,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return net.eval().requires_grad_(False)


def text_model(width: int = 32) -> CLIPTextModel:
    torch.manual_seed(1)
    tokens = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
    )
    return CLIPTextModel(config).eval().requires_grad_(False)


def factors(layer: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
    """down and up of a layer, as trainers write them: a conv's is a conv of its size and one of 1×1."""
    generator = torch.Generator().manual_seed(seed)
    shape = layer.weight.shape
    down = torch.randn(RANK, *shape[1:], generator=generator) / 8
    return down, torch.randn(shape[0], RANK, *(1 for _ in shape[2:]), generator=generator) / 4


def lora_of(net: nn.Module, layers: list[str], spelling: str, alpha: float | None = None, seed: int = 0) -> Any:
    lora: dict[str, Tensor] = {}
    for i, path in enumerate(layers):
        down, up = factors(net.get_submodule(path), 100 * seed + i)
        match spelling:
            case "diffusers":
                name = path.replace("attn1.", "attn1.processor.").replace("attn2.", "attn2.processor.")
                attends = "processor" in name
                name = f"unet.{name.removesuffix('.0') if attends else name}"
                parts = ("_lora.down", "_lora.up") if attends else (".lora.down", ".lora.up")
            case "peft":
                name, parts = f"unet.{path}", (".lora_A", ".lora_B")
            case "peft, named":
                name, parts = f"base_model.model.{path}", (".lora_A.default", ".lora_B.default")
            case _:
                name, parts = f"lora_unet_{path.replace('.', '_')}", (".lora_down", ".lora_up")
        lora |= {f"{name}{parts[0]}.weight": down, f"{name}{parts[1]}.weight": up}
        if alpha is not None:
            lora[f"{name}.alpha"] = torch.tensor(alpha)
    return lora


def hooked(net: nn.Module, layers: list[str], factor: float, seed: int = 0) -> None:
    """The same LoRA as its training had it: a second, narrow path beside each layer, by torch's own operations."""
    for i, path in enumerate(layers):
        layer: Any = net.get_submodule(path)
        down, up = factors(layer, 100 * seed + i)

        def beside(layer: Any, x: Any, y: Tensor, down: Tensor = down, up: Tensor = up) -> Tensor:
            if isinstance(layer, nn.Linear):
                return y + factor * nn.functional.linear(nn.functional.linear(x[0], down), up)
            narrow = nn.functional.conv2d(x[0], down, stride=layer.stride, padding=layer.padding)
            return y + factor * nn.functional.conv2d(narrow, up)

        layer.register_forward_hook(beside)


def seen(net: Any) -> Tensor:
    with torch.inference_mode():
        output: Tensor = net(Z, TIME, WORDS, return_dict=False)[0]
    return output.clone()


def changed(net: nn.Module, before: dict[str, Tensor]) -> float:
    return max(float((t - before[k]).abs().max()) for k, t in net.state_dict().items())


@pytest.mark.parametrize("spelling", ["diffusers", "peft", "peft, named", "kohya"])
@pytest.mark.parametrize("alpha", [None, 1.0, 8.0])
def test_merged_lora_equals_a_second_path_beside_each_layer(spelling: str, alpha: float | None) -> None:
    plain, merged, beside = unet(), unet(), unet()
    assert merge_lora(merged, lora_of(plain, LAYERS, spelling, alpha), 0.7) == len(LAYERS)
    hooked(beside, LAYERS, 0.7 if alpha is None else 0.7 * alpha / RANK)
    assert (seen(merged) - seen(beside)).abs().max() <= 1e-5
    assert (seen(merged) - seen(plain)).abs().max() > 0.01


def test_every_layer_of_a_unet_can_be_changed() -> None:
    net = unet()
    layers = [path for path, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for spelling in ("diffusers", "peft", "kohya"):
        assert set(fitted(net, lora_of(net, layers, spelling))) == set(layers)


def test_locon_with_a_middle_equals_its_three_convolutions() -> None:
    net, path = unet(), "down_blocks.0.resnets.0.conv1"
    layer: Any = net.get_submodule(path)
    before, x = layer.weight.clone(), torch.randn(1, 32, 6, 6)
    down, mid, up = torch.randn(RANK, 32, 1, 1), torch.randn(RANK, RANK, 3, 3), torch.randn(32, RANK, 1, 1)
    name = f"lora_unet_{path.replace('.', '_')}"
    lora = {f"{name}.lora_{k}.weight": t for k, t in (("down", down), ("mid", mid), ("up", up))}
    merge_lora(net, lora | {f"{name}.alpha": torch.tensor(2.0)}, 0.5)
    conv = nn.functional.conv2d
    wanted = conv(x, before, padding=1) + 0.5 * 2 / RANK * conv(conv(conv(x, down), mid, padding=1), up)
    assert (conv(x, layer.weight, padding=1) - wanted).abs().max() <= 1e-3


def test_text_encoder_lora_equals_a_second_path() -> None:
    ids = torch.tensor([[56, 3, 9, 57]])
    layers = ["encoder.layers.1.self_attn.q_proj", "encoder.layers.0.mlp.fc1"]
    image, model, beside = unet(), text_model(), text_model()
    hooked(beside, layers, 0.5)
    wanted = beside(ids)[0]
    image_lora = lora_of(image, LAYERS[:2], "kohya")
    for prefix, joint, parts in [
        ("lora_te_text_model_", "_", (".lora_down", ".lora_up")),
        ("lora_te1_text_model_", "_", (".lora_down", ".lora_up")),
        ("text_encoder.text_model.", ".", (".lora_A", ".lora_B")),
        ("text_encoder.text_model.", ".", (".lora_linear_layer.down", ".lora_linear_layer.up")),
    ]:
        model, lora = text_model(), dict(image_lora)
        for i, path in enumerate(layers):
            for part, tensor in zip(parts, factors(model.get_submodule(path), i), strict=True):
                lora[f"{prefix}{path.replace('.', joint)}{part}.weight"] = tensor
        assert merge_lora(model, lora, 0.5, "text_encoder") == merge_lora(unet(), lora, 0.5) == 2
        assert (model(ids)[0] - wanted).abs().max() <= 1e-5
        assert merge_lora(text_model(), image_lora, 0.5, "text_encoder") == 0


def test_kohya_names_are_read_as_diffusers_reads_them() -> None:
    """Its converter is pure; only loading its result would need peft."""
    net = unet()
    lora = lora_of(net, LAYERS, "kohya", alpha=2.0)
    theirs, alphas = _convert_non_diffusers_lora_to_diffusers(dict(lora))
    assert len(alphas) == len(LAYERS)
    ours, converted = fitted(net, lora), fitted(net, theirs)
    assert ours.keys() == converted.keys() == set(LAYERS)
    assert all(ours[path].up is converted[path].up for path in LAYERS)


def xl() -> UNet2DConditionModel:
    """SDXL's layout, narrow."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16, 32),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(2, 2, 4),
        cross_attention_dim=16,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=40,
    )


def test_sdxl_loras_in_the_original_layout_find_the_layers_that_diffusers_finds() -> None:
    net = xl()
    theirs = {path: name for name, path in sgm_names(net)}
    layers = [path for path, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert set(layers) <= theirs.keys()
    assert theirs["up_blocks.1.upsamplers.0.conv"] == "output_blocks.5.2.conv"
    assert theirs["down_blocks.1.downsamplers.0.conv"] == "input_blocks.6.0.op"
    kept = [path for path in layers if "attentions" in path or "resnets" in path or "samplers" in path]
    sgm = {f"lora_unet_{theirs[path].replace('.', '_')}.lora_down.weight": path for path in kept}
    mapped = _maybe_map_sgm_blocks_to_diffusers({name: torch.zeros(1) for name in sgm}, net.config)
    found = {name.split(".")[0].removeprefix("lora_unet_") for name in mapped}
    for path in kept:  # theirs keeps the names inside resnets, which are converted later
        name = path.replace(".", "_").replace("input_blocks", "down_blocks")
        for ours, original in [("conv1", "in_layers_2"), ("conv2", "out_layers_3"), ("time_emb_proj", "emb_layers_1")]:
            name = name.replace(ours, original) if "resnets" in path else name
        name = name.replace("conv_shortcut", "skip_connection").replace("downsamplers_0_conv", "downsamplers_0_op")
        name = name.replace("down_blocks", "input_blocks").replace("mid_block", "middle_block")
        assert name.replace("up_blocks", "output_blocks") in found
    lora: dict[str, Tensor] = {}
    for i, path in enumerate(layers):
        name = f"lora_unet_{theirs[path].replace('.', '_')}"
        down, up = factors(net.get_submodule(path), i)
        lora |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    assert set(fitted(net, lora)) == set(layers)


def test_scale_zero_changes_no_bit_and_the_same_scale_off_again_restores() -> None:
    net = unet()
    before = {k: t.clone() for k, t in net.state_dict().items()}
    lora = lora_of(net, LAYERS, "kohya", alpha=1.0)
    merge_lora(net, lora, 0.0)
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
    merge_lora(net, lora, 0.8)
    assert changed(net, before) > 0.01
    merge_lora(net, lora, -0.8)
    assert changed(net, before) <= 1e-6


def test_two_loras_add_up_in_either_order() -> None:
    one, other = unet(), unet()
    loras = [(lora_of(one, LAYERS[:8], "kohya", seed=1), 0.8), (lora_of(one, LAYERS[4:], "peft", seed=2), -0.3)]
    for net, order in ((one, loras), (other, loras[::-1])):
        assert [merge_lora(net, lora, scale) for lora, scale in order] == [len(lora) // 2 for lora, _ in order]
    assert changed(one, other.state_dict()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_the_torch_engine_are_rounded_once_and_stay_as_they_lie(dtype: torch.dtype) -> None:
    """It computes in half precision on a GPU, and lays convolutions out with channels last."""
    net, path = unet(), "down_blocks.0.resnets.0.conv1"
    lora = lora_of(net, [path], "kohya")
    net.to(dtype)
    layer: Any = net.get_submodule(path)
    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    stride, base, (down, up) = layer.weight.stride(), layer.weight.double(), factors(layer)
    merge_lora(net, lora, 0.75)
    wanted = base + 0.75 * torch.einsum("or,rikl->oikl", up[..., 0, 0].double(), down.double())
    assert (layer.weight.dtype, layer.weight.stride()) == (dtype, stride)
    assert ((layer.weight - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs() * 0.51 + 1e-6).all()


@pytest.mark.parametrize(("rslora", "factor"), [(False, 8 / RANK), (True, 8 / RANK**0.5)])
def test_pefts_alpha_is_read_from_the_files_metadata(tmp_path: Path, rslora: bool, factor: float) -> None:
    net, path = unet(), tmp_path / "lora.safetensors"
    settings = {"unet.r": RANK, "unet.lora_alpha": 8, "unet.use_rslora": rslora, "unet.alpha_pattern": {"conv_in": 2}}
    save_file(lora_of(net, LAYERS, "peft"), path, {"lora_adapter_metadata": json.dumps(settings)})
    updates = fitted(net, read_lora(path))
    assert updates[LAYERS[0]].alpha == pytest.approx(factor * RANK)
    assert updates["conv_in"].alpha == pytest.approx(2 * (RANK**0.5 if rslora else 1))


def test_whatever_is_said_to_fit_can_be_added() -> None:
    chance, fits = random.Random(9), []

    def zeros(*lengths: int) -> Tensor:
        return torch.zeros([chance.choice((1, 2)) for _ in range(chance.choice(lengths))])

    for i in range(6000):
        weight, mid = (zeros(4), zeros(3, 4)) if i % 2 else (zeros(2, 4), None)
        update = Update(zeros(1, 2, 4), zeros(1, 2, 4), mid, 1.0)
        fits.append(update.fits(weight.shape))
        if fits[-1]:
            update.add_to(weight, 1.0)
    assert sum(fits[::2])
    assert sum(fits[1::2])  # with a middle


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"unet.lora_alpha": "a"}', '{"unet.lora_alpha": 1, "unet.alpha_pattern": 3}']
)
def test_broken_metadata_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(lora_of(unet(), LAYERS[:1], "peft"), path, {"lora_adapter_metadata": text})
    with pytest.raises(UserError, match="broken metadata"):
        read_lora(path)


def words_of(width: int) -> dict[str, Tensor]:
    key = f"unet.{ATTENTION}.attn2.to_k"
    return {f"{key}.lora_A.weight": torch.ones(RANK, width), f"{key}.lora_B.weight": torch.ones(64, RANK)}


Q = f"unet.{ATTENTION}.attn1.to_q"
MOTION = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.to_q"


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (words_of(2048), "for SDXL .width 2048, here 768"),
        (words_of(1024), "for Stable Diffusion 2.x .width 1024"),
        (words_of(48), "for another family .width 48"),
        ({f"{MOTION}_lora.{part}.weight": torch.ones(4, 4) for part in ("up", "down")}, "motion LoRA"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 4)}, "Flux"),
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(4, 4)}, "Flux"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 64)}, "incomplete: .*to_q has down alone"),
        ({f"{Q}.lora_B.weight": torch.ones(64, 4), f"{Q}.alpha": torch.ones(())}, "has up and alpha alone"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 32), f"{Q}.lora_B.weight": torch.ones(64, 4)}, "does not fit: .*64, 64"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 64), f"{Q}.lora_B.weight": torch.ones(64, 8)}, "does not fit"),
        ({f"{Q}.lora_A.weight": torch.ones(64), f"{Q}.lora_B.weight": torch.ones(64)}, "does not fit"),
        ({f"{Q}.lora_A.weight": torch.ones(()), f"{Q}.lora_B.weight": torch.ones(64, 1)}, "does not fit"),
        ({f"{Q}.lora_A.weight": torch.ones(0, 64), f"{Q}.lora_B.weight": torch.ones(64, 0)}, "does not fit"),
        (
            {f"{Q}.lora_A.weight": torch.ones(4, 64), f"{Q}.lora_B.weight": torch.ones(64, 4)}
            | {f"{Q}.alpha": torch.ones(2)},
            "not one number",
        ),
        ({f"{Q}.lora_A.weight": torch.ones(4, 64) / 0, f"{Q}.lora_B.weight": torch.ones(64, 4)}, "not finite"),
        ({"unet.up_blocks.9.attn1.to_q.lora_A.weight": torch.ones(4, 4)}, "another model: no layer up_blocks.9"),
        ({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.ones(4, 4)}, "a LoHa, not a LoRA"),
        ({f"{Q}.dora_scale": torch.ones(4, 4)}, "a DoRA, not a LoRA"),
        ({"conv_in.weight": torch.ones(4, 4)}, "not a LoRA that can be merged: conv_in.weight"),
    ],
)
def test_loras_that_do_not_fit_are_refused_in_two_lines_and_change_nothing(
    lora: dict[str, Tensor], message: str
) -> None:
    net = unet(768)
    before = {k: t.clone() for k, t in net.state_dict().items()}
    good = lora_of(net, LAYERS, "kohya")
    with pytest.raises(UserError, match=message) as caught:
        merge_lora(net, good | lora)
    assert "\n" not in caught.value.message + caught.value.hint
    assert caught.value.hint
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


def test_an_image_lora_on_a_motion_adapter_is_refused() -> None:
    options = {"motion_num_attention_heads": 4, "motion_norm_num_groups": 8, "motion_layers_per_block": 1}
    with pytest.raises(UserError, match="another model"):
        merge_lora(MotionAdapter(block_out_channels=(32, 64), **options), lora_of(unet(), LAYERS, "kohya"))


@pytest.mark.parametrize("read", [read_lora, read_embedding])
def test_files_that_are_no_safetensors_are_refused(tmp_path: Path, read: Any) -> None:
    whole, path = tmp_path / "whole.safetensors", tmp_path / "lora.safetensors"
    save_file(lora_of(unet(), LAYERS, "kohya"), whole)
    content = whole.read_bytes()
    for bad, message in [
        (content[: len(content) // 2], "cut short or damaged"),
        (content[:40], "cut short or damaged"),
        (b"", "not a safetensors file"),
        (b"<!DOCTYPE html><title>404</title>", "not a safetensors file"),
        (b"PK\x03\x04 a pickle", "not a safetensors file"),
    ]:
        path.write_bytes(bad)
        with pytest.raises(UserError, match=message) as caught:
            read(path)
        assert "\n" not in caught.value.message
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            read(missing if missing.suffix else missing.rename(tmp_path.with_suffix(".safetensors")))


def pipeline() -> Any:
    """diffusers' own, with as little in it as teaching a word takes."""
    return StableDiffusionPipeline(
        None, text_model(), tokenizer(), unet(), None, None, None, requires_safety_checker=False
    )


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("form", ["diffusers", "emb_params", "a1111", "bin"])
def test_learned_words_read_as_in_diffusers_pipeline(tmp_path: Path, form: str, count: int) -> None:
    vectors = torch.randn(count, 32, generator=torch.Generator().manual_seed(4))
    path = tmp_path / ("<ink-cat>" + (".safetensors" if form in ("diffusers", "emb_params") else ".pt"))
    match form:
        case "diffusers":
            save_file({"<ink-cat>": vectors}, path)
        case "emb_params":
            save_file({"emb_params": vectors}, path)
        case "a1111":
            torch.save({"string_to_param": {"*": nn.Parameter(vectors)}, "name": "<ink-cat>", "step": 9}, path)
        case _:
            torch.save({"<ink-cat>": vectors[0] if count == 1 else vectors}, path)
    theirs = pipeline()
    theirs.load_textual_inversion({"<ink-cat>": vectors})
    tokens, model = tokenizer(), text_model()
    word, found = read_embedding(path)
    known = {word: add_embedding(tokens, model, word, found)}
    assert len(known["<ink-cat>"]) == count
    ours = TextEncoder(tokens, model)
    for prompt in ("a painting of <ink-cat> in oil", "<ink-cat>, <ink-cat>", "a city"):
        wanted, _ = theirs.encode_prompt(prompt, "cpu", 1, False)
        assert (ours.embed(expanded(prompt, known)) - wanted).abs().max() <= 1e-5
    assert (ours.embed(expanded("a <ink-cat>", known)) - ours.embed("a ink cat")).abs().max() > 0.01


def test_a_learned_word_may_have_capitals_and_be_typed_without() -> None:
    """The tokenizer does not tell them apart; diffusers would give the lower-case word its first vector only."""
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(4))
    tokens, model = tokenizer(), text_model()
    known = {"InkCat": add_embedding(tokens, model, "InkCat", vectors)}
    ours = TextEncoder(tokens, model)
    assert torch.equal(ours.embed(expanded("a inkcat", known)), ours.embed("a InkCat InkCat_1"))
    assert expanded("a city", known) == expanded("a city", {}) == "a city"


def test_embeddings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tokens, model = tokenizer(), text_model()
    for width, message in [(768, "for Stable Diffusion 1.x .width 768, here 32"), (40, "another family")]:
        with pytest.raises(UserError, match=message):
            add_embedding(tokens, model, "<cat>", torch.ones(2, width))
    with pytest.raises(UserError, match="not finite"):
        add_embedding(tokens, model, "<cat>", torch.full((2, 32), torch.nan))
    add_embedding(tokens, model, "<cat>", torch.ones(2, 32))
    for word in ("<cat>", "<cat>_1", "<CAT>", "a", "A"):
        with pytest.raises(UserError, match="already"):
            add_embedding(tokens, model, word, torch.ones(1, 32))
    assert len(tokens) == model.get_input_embeddings().weight.shape[0] == len(tokenizer()) + 2
    for i, (state, message) in enumerate(
        [
            ({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, "for SDXL"),
            ({"a": torch.ones(1, 2), "b": torch.ones(1, 2)}, "not a textual inversion"),
            ({"a": torch.ones(1, 2, 3)}, "not a textual inversion"),
            ({"two words": torch.ones(1, 2)}, "not one word"),
        ]
    ):
        path = tmp_path / f"{i}.safetensors"
        save_file(state, path)
        with pytest.raises(UserError, match=message):
            read_embedding(path)
    path = tmp_path / "code.pt"
    torch.save({"<cat>": Path("anything that is not a tensor")}, path)
    with pytest.raises(UserError, match="no plain tensors"):
        read_embedding(path)


def test_the_lora_of_a_folder_is_merged_when_it_is_loaded_and_makes_another_engine(tmp_path: Path) -> None:
    folder = Folder(random_folder(tmp_path / "model", "sd"))
    plain, key = folder.unet().state_dict(), graphs(folder, (64, 64))["unet"].spec
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    rows, columns = plain[f"{name}.weight"].shape
    lora = {f"unet.{name}.lora_A.weight": torch.ones(2, columns), f"unet.{name}.lora_B.weight": torch.ones(rows, 2)}
    (folder.path / "lora").mkdir()
    save_file(lora, folder.path / "lora" / "style.safetensors")
    (folder.path / "lora" / "lora.json").write_text('{"file": "style.safetensors", "scale": 0.5}')
    changed = Folder(folder.path)
    merged = changed.unet().state_dict()
    torch.testing.assert_close(merged[f"{name}.weight"], plain[f"{name}.weight"] + 1.0)
    assert all(torch.equal(merged[other], plain[other]) for other in plain if other != f"{name}.weight")
    assert graphs(changed, (64, 64))["unet"].spec != key
