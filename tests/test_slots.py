"""LoRAs worn through room in the graph equal merged ones, and change between two frames with the same engine."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionImg2ImgPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from accel.engine import EngineSpec, TensorSpec
from accel.errors import UserError
from accel.openvino_backend import OpenVINOBackend
from accel.torch_backend import TorchBackend
from models.denoise import Conditioning, denoise, start
from models.folder import Folder
from models.lora import Update, fitted, read_lora
from models.loras import Loras, dressed, merge_lora
from models.prompt import Piece
from models.schedule import consistency_schedule
from models.slots import Slots, WornSlots
from models.text import TextEncoder
from models.text_xl import DoubleTextEncoder
from models.unet import Call, Denoise, Seen
from models.worn import beyond_attention, lora_set, rank_of
from tests.addons import lora
from tests.fakes import PATIENCE
from tests.folders import random_folder, random_xl_folder

BASE = (TensorSpec("z", (2, 4, 8, 8)), TensorSpec("t", (2,)), TensorSpec("words", (2, 77, 32)))
XL = (*BASE[:2], TensorSpec("words", (2, 77, 80)), TensorSpec("pooled", (2, 24)), TensorSpec("time_ids", (2, 6)))
OUTPUT = (TensorSpec("output", (2, 4, 8, 8)),)
INSIDE = ("mid_block.attentions.0.proj_in", *(f"down_blocks.1.attentions.0.transformer_blocks.0.{name}" for name in
          ("attn1.to_q", "attn2.to_k", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")))  # fmt: skip
OUTSIDE = (
    "conv_in",
    "conv_out",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.1.resnets.0.conv_shortcut",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.0.upsamplers.0.conv",
    "time_embedding.linear_1",
)
TEXT = ("encoder.layers.1.self_attn.q_proj", "encoder.layers.0.mlp.fc1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(random_folder(tmp_path_factory.mktemp("sd"), "sd"))


@pytest.fixture(autouse=True)
def loras_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras").mkdir()
    return tmp_path / "loras"


def engine(folder: Folder, slots: Slots | None, backend: Any = None, base: tuple[TensorSpec, ...] = BASE) -> Any:
    features = (slots,) if slots else ()
    inputs = base + (slots.inputs if slots else ())
    names = [spec.name for spec in inputs]
    print_ = slots.fingerprint if slots else ""
    return (backend or TorchBackend()).load(
        lambda: Denoise(folder.unet(), names, features), EngineSpec("unet", inputs, OUTPUT, print_, precision="fp32")
    )


def example(base: tuple[TensorSpec, ...] = BASE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    found = [torch.randn(spec.shape, generator=generator) for spec in base]
    found[1] = torch.tensor([999.0, 249.0])
    return found


def merged(folder: Folder, *loras: tuple[Mapping[str, Tensor], float], base: tuple[TensorSpec, ...] = BASE) -> Tensor:
    """What the UNet gives with LoRAs in its weights."""
    unet = folder.unet()
    for tensors, scale in loras:
        merge_lora(unet, tensors, scale)
    names = [spec.name for spec in base]
    with torch.inference_mode():
        return Denoise(unet, names)(*example(base))[0]


def changes(slots: Slots, *loras: tuple[Mapping[str, Tensor], float]) -> dict[str, list[tuple[Update, float]]]:
    found: dict[str, list[tuple[Update, float]]] = {}
    for tensors, scale in loras:
        for path, update in fitted(slots.skeleton, tensors).items():
            found.setdefault(path, []).append((update, scale))
    return found


def readers(folder: Folder, slots: Slots | None) -> Loras[TextEncoder]:
    ((tokenizer, model),) = folder.text().pairs
    return Loras(slots, {"text_encoder": model}, lambda models: TextEncoder(tokenizer, models["text_encoder"]))


@pytest.mark.parametrize(("backend", "everywhere"), [("torch", False), ("torch", True), ("openvino", True)])
def test_two_loras_at_two_scales_equal_their_merging_and_go_again(
    folder: Folder, backend: str, everywhere: bool
) -> None:
    slots = Slots(folder.config("unet"), 16, everywhere=everywhere)
    paths = INSIDE + OUTSIDE if everywhere else INSIDE
    ink, oil = lora(folder.unet(), paths, rank=4), lora(folder.unet(), paths[1:], rank=8, seed=2)
    worn = engine(folder, slots, OpenVINOBackend(threads=1) if backend == "openvino" else None)
    built, plain = slots.inputs, merged(folder)
    for loras in [[(ink, 0.8), (oil, -0.3)], [(oil, 1.0)], [], [(ink, 0.8)]]:
        tensors = slots.tensors(changes(slots, *loras))
        assert tuple(TensorSpec(name, tuple(t.shape)) for name, t in tensors.items()) == built
        found, wanted = worn(*example(), *tensors.values())[0], merged(folder, *loras)
        assert (found - wanted).abs().max() <= 1e-5
        assert not loras or (wanted - plain).abs().max() > 0.01


def test_room_that_nothing_fills_changes_no_bit(folder: Folder) -> None:
    slots = Slots(folder.config("unet"), 8, everywhere=True)
    plain = engine(folder, None)(*example())[0]
    worn = engine(folder, slots)
    ink = lora(folder.unet(), INSIDE + OUTSIDE)
    for tensors in (slots.nothing, slots.tensors(changes(slots, (ink, 0.0)))):
        assert torch.equal(worn(*example(), *tensors.values())[0], plain)


def test_swapped_loras_equal_those_of_a_fresh_engine_and_leave_no_trace(folder: Folder) -> None:
    config = folder.config("unet")
    slots = Slots(config, 8)
    worn, ink, oil = engine(folder, slots), lora(folder.unet(), INSIDE), lora(folder.unet(), INSIDE, seed=2)
    given = [slots.tensors(changes(slots, *loras)) for loras in ([(ink, 1.0)], [(oil, 0.5)], [])]
    swapped = [worn(*example(), *tensors.values())[0] for tensors in given]
    for tensors, found in zip(given, swapped, strict=True):
        assert torch.equal(found, engine(folder, Slots(config, 8))(*example(), *tensors.values())[0])
    network = folder.unet()
    Denoise(network, [spec.name for spec in BASE + slots.inputs], [slots])(*example(), *given[0].values())
    assert not any(layer._forward_hooks for layer in network.modules())
    assert type(network.get_submodule(INSIDE[1])) is nn.Linear


def test_sdxl_wears_loras_too(tmp_path: Path) -> None:
    folder = Folder(random_xl_folder(tmp_path / "xl"))
    slots = Slots(folder.config("unet"), 8, everywhere=True)
    names = ("down_blocks.2.attentions.0.transformer_blocks.2.attn2.to_v", "add_embedding.linear_1", "conv_in")
    ink = lora(folder.unet(), names)
    found = engine(folder, slots, base=XL)(*example(XL), *slots.tensors(changes(slots, (ink, 0.7))).values())[0]
    assert (found - merged(folder, (ink, 0.7), base=XL)).abs().max() <= 1e-5
    assert (found - merged(folder, base=XL)).abs().max() > 0.001


def test_sdxls_second_text_model_wears_its_part(tmp_path: Path, loras_folder: Path) -> None:
    folder = Folder(random_xl_folder(tmp_path / "xl"))
    encoder = folder.text()
    assert isinstance(encoder, DoubleTextEncoder)
    tokens, (first, second) = zip(*encoder.pairs, strict=True)
    ink = lora(second.text_model, TEXT, prefix="lora_te2_text_model_")
    save_file(ink, loras_folder / "ink.safetensors")

    def read_with(models: Mapping[str, nn.Module]) -> DoubleTextEncoder:
        return DoubleTextEncoder(((tokens[0], models["text_encoder"]), (tokens[1], models["text_encoder_2"])))

    loras = Loras(None, {"text_encoder": first, "text_encoder_2": second}, read_with)
    plain, worn = loras.reader(()).read("a"), loras.reader(lora_set("ink:0.9")).read("a")
    merge_lora(second, ink, 0.9, "text_encoder_2")
    for ours, theirs, before in zip(worn, read_with(dict(loras._texts)).read("a"), plain, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5
        assert (ours - before).abs().max() > 0.001


def test_locon_with_a_middle_and_pefts_linear_for_a_pointwise_convolution_fit(folder: Folder) -> None:
    unet, slots = folder.unet(), Slots(folder.config("unet"), 8, everywhere=True)
    conv, point = "down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.proj_in"
    found = lora(unet, (conv,))
    name = f"lora_unet_{conv.replace('.', '_')}"
    found[f"{name}.lora_down.weight"] = torch.randn(3, 32, 1, 1)
    found[f"{name}.lora_mid.weight"] = torch.randn(4, 3, 3, 3) / 4
    size = len(unet.get_submodule(point).weight)
    found |= {f"unet.{point}.lora_A.weight": torch.randn(2, size), f"unet.{point}.lora_B.weight": torch.ones(size, 2)}
    tensors = slots.tensors(changes(slots, (found, 0.5)))
    assert (engine(folder, slots)(*example(), *tensors.values())[0] - merged(folder, (found, 0.5))).abs().max() <= 1e-5


def test_a_frame_equals_diffusers_pipeline_over_merged_weights(folder: Folder, loras_folder: Path) -> None:
    """diffusers itself would need peft; the text model's part counts as well."""
    text = folder.text_model()
    both = lora(folder.unet(), INSIDE) | lora(text, TEXT, prefix="lora_te_text_model_")
    save_file(both, loras_folder / "ink.safetensors")
    unet = folder.unet()
    assert (merge_lora(unet, both, 0.8), merge_lora(text, both, 0.8, "text_encoder")) == (len(INSIDE), len(TEXT))
    options: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    theirs = StableDiffusionImg2ImgPipeline(
        folder.vae(),
        text,
        folder.text().pairs[0][0],
        unet,
        LCMScheduler.from_pretrained(folder.path / "scheduler"),
        **options,
    )
    theirs.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(5)
    wanted = theirs("oil painting", latents, num_inference_steps=2, strength=1.0, guidance_scale=1.0,
                    generator=generator, output_type="latent").images  # fmt: skip

    slots = Slots(folder.config("unet"), rank_of(lora_set("ink")))
    loras, worn = readers(folder, slots), lora_set("ink:0.8")
    base = tuple(TensorSpec(spec.name, (1, *spec.shape[1:])) for spec in BASE)
    inputs = base + slots.inputs
    network = Denoise(folder.unet(), [spec.name for spec in inputs], [slots])

    def once(z: Tensor, t: float, prompt: tuple[Tensor, ...]) -> Tensor:
        with torch.inference_mode():
            return network(z, torch.tensor([t]), *prompt, *loras.tensors(worn).values())[0]

    words = loras.reader(worn).embed("oil painting")
    schedule = consistency_schedule(folder.scheduler(), 2, 1.0)
    generator.manual_seed(5)
    noises = [torch.randn(latents.shape, generator=generator) for _ in range(2)]
    z = start(latents, noises[0], schedule.steps[0], pure=False)
    found = denoise(once, z, schedule, Conditioning((words,), (words,)), noises[1:])
    assert (found - wanted).abs().max() <= 1e-3


def test_prompts_are_read_under_a_streams_own_loras(folder: Folder, loras_folder: Path) -> None:
    model = folder.text_model()
    save_file(lora(model, TEXT, prefix="lora_te_text_model_"), loras_folder / "words.safetensors")
    save_file(lora(folder.unet(), INSIDE), loras_folder / "image.safetensors")
    loras, worn = readers(folder, Slots(folder.config("unet"), 8)), lora_set("words:0.5, image")
    plain = loras.reader(())
    before, changed = plain.embed("ink"), loras.reader(worn).embed("ink")
    merge_lora(model, read_lora(loras_folder / "words.safetensors"), 0.5, "text_encoder")
    assert (changed - model(folder.text().pairs[0][0]("ink", padding="max_length", return_tensors="pt").input_ids)[0]
            ).abs().max() <= 1e-5  # fmt: skip
    assert (changed - before).abs().max() > 0.001
    assert torch.equal(plain._read((Piece("ink"),)), before)
    assert loras.reader(worn) is loras.reader(worn)  # and with it the embeddings it keeps
    assert loras.reader(lora_set("image")) is loras.reader(lora_set("words:0")) is plain


def test_a_dressed_copy_shares_its_weights(folder: Folder) -> None:
    model = folder.text_model()
    update = next(iter(fitted(model, lora(model, TEXT[:1], prefix="lora_te_"), "text_encoder").values()))
    copy = dressed(model, {TEXT[0]: [(update, 1.0)]})
    pointers = [p.data_ptr() for p in model.parameters()]
    assert pointers == [p.data_ptr() for p in copy.parameters()]
    assert not any(layer._forward_hooks for layer in model.modules())


def test_streams_wear_their_newest_frames_loras(folder: Folder) -> None:
    slots = Slots(folder.config("unet"), 8)
    stream, newest, older = WornSlots(slots), {"lora": torch.ones(1)}, {"lora": torch.zeros(1)}
    z, t, words = example()

    def call(*guides: Mapping[str, Any]) -> Call:
        frames = tuple(Seen(None, guide) for guide in guides)
        return Call(z, t, words, range(2), (1, 0), 2, frames)

    assert stream.inputs(call({"lora": older}, {"lora": newest})) is newest
    assert stream.inputs(call({}, {})) is slots.nothing
    assert float(slots.nothing["lora"].abs().sum()) == 0


def test_files_are_read_once_and_no_one_waits_for_what_is_there(
    folder: Folder, loras_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ink", "oil"):
        save_file(lora(folder.unet(), INSIDE), loras_folder / f"{name}.safetensors")
    loras, ink = readers(folder, Slots(folder.config("unet"), 8)), lora_set("ink")
    reads: list[Path] = []
    begun, go = threading.Event(), threading.Event()

    def slowly(path: Path) -> dict[str, Tensor]:
        reads.append(path)
        if path.stem == "oil":
            begun.set()
            assert go.wait(PATIENCE)
        return read_lora(path)

    monkeypatch.setattr("models.loras.read_lora", slowly)
    first = loras.tensors(ink)
    other = threading.Thread(target=loras.tensors, args=(lora_set("oil, ink"),))
    other.start()
    assert begun.wait(PATIENCE)
    assert loras.tensors(ink) is first  # while the other is read
    go.set()
    other.join(PATIENCE)
    loras.tensors(lora_set("ink:0.5"))
    loras.reader(lora_set("ink:0.7"))
    assert [path.stem for path in reads] == ["ink", "oil"]


def test_a_file_that_has_gone_is_no_hindrance_while_it_is_worn(folder: Folder, loras_folder: Path) -> None:
    file = loras_folder / "ink.safetensors"
    save_file(lora(folder.unet(), INSIDE), file)
    loras, worn = readers(folder, Slots(folder.config("unet"), 8)), lora_set("ink:0.5")
    assert (rank_of(worn), beyond_attention(worn)) == (8, False)
    before = loras.tensors(worn)
    file.unlink()
    assert lora_set("ink:0.5") == worn
    assert (rank_of(worn), beyond_attention(worn)) == (8, False)
    assert loras.tensors(lora_set("ink:0.5")) is before
    assert torch.equal(loras.tensors(lora_set("ink:1"))["lora"].abs() > 0, before["lora"].abs() > 0)  # a slider
    with pytest.raises(UserError, match="no such LoRA: oil"):
        lora_set("ink:0.5, oil")
    with pytest.raises(
        UserError, match=r"cannot read .*ink\.safetensors"
    ):  # nothing of it is in another model's memory
        readers(folder, Slots(folder.config("unet"), 8)).tensors(worn)
    save_file(lora(folder.unet(), OUTSIDE, rank=12), file)  # another one under its name
    assert (rank_of(worn), beyond_attention(worn)) == (16, True)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        (" , ", []),
        ("ink.safetensors:0.8, oil.safetensors:-.3,", [("ink", 0.8), ("oil", -0.3)]),
        ("ink , oil : 1. ", [("ink", 1.0), ("oil", 1.0)]),
        ('"wet, loud":0.5,ink', [("wet, loud", 0.5), ("ink", 1.0)]),
        ("C:/art/ink.safetensors:2, C:/art/ink.safetensors", [("C:/art/ink", 3.0)]),
        ("ink:0.25, loras/ink.safetensors:0.5", [("ink", 0.75)]),
    ],
)
def test_loras_are_named_with_their_scales(tmp_path: Path, text: str, wanted: list[tuple[str, float]]) -> None:
    (tmp_path / "C:" / "art").mkdir(parents=True)
    files = {"ink": "loras", "wet, loud": "loras", "oil": ".", "C:/art/ink": "."}
    paths = {name: tmp_path / at / f"{name}.safetensors" for name, at in files.items()}
    for path in paths.values():
        path.touch()
    assert [(path.resolve(), scale) for path, _, scale in lora_set(text)] == [
        (paths[name], scale) for name, scale in wanted
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("water:0.5", "no such LoRA: water"),
        (":0.5", "without a name"),
        ("ink:11", "the scale of ink is 11"),
        (f"ink:{'9' * 900}", "the scale of ink is 9"),
        ("ink:nan", "no such LoRA: ink:nan"),
        ("ink\nink", "style.lora|no such"),
        ("a\0b", "style.lora|no such"),
        ("\ud800", "no such LoRA"),
        ("loras", "no such LoRA: loras"),
        ("..", "no such"),
        ("x" * 2000, "no such LoRA: x+…"),
        ('"' * 1999, "no such|without a name|style.lora"),
        (" " * 1900 + '"x', "no such"),
        (",".join(f"many{i}" for i in range(17)), "17 LoRAs at once"),
    ],
)
def test_what_cannot_be_read_is_refused_in_two_short_lines(loras_folder: Path, text: str, message: str) -> None:
    for name in ("ink", *(f"many{i}" for i in range(17))):
        (loras_folder / f"{name}.safetensors").touch()
    with pytest.raises(UserError, match=message) as caught:
        lora_set(text)
    assert "\n" not in caught.value.message + caught.value.hint
    assert len(caught.value.message) < 120
    assert caught.value.hint


def test_room_is_told_by_the_heads_of_files(folder: Folder, loras_folder: Path) -> None:
    unet, text = folder.unet(), folder.text_model()
    files = {
        "four": lora(unet, INSIDE) | lora(text, TEXT, rank=32, prefix="lora_te_text_model_"),
        "nine": lora(unet, INSIDE[1:2], rank=9) | lora(unet, INSIDE[2:], rank=2),
        "peft": {f"unet.{INSIDE[1]}.lora_{part}.weight": torch.ones(64, 64) for part in "AB"},
        "everywhere": lora(unet, OUTSIDE),
        "text": lora(text, TEXT, prefix="lora_te_text_model_"),
        "odd": {"unet.a.lora_B.weight": torch.ones(3), "vae.b": torch.ones(())},
    }
    for name, tensors in files.items():
        save_file(tensors, loras_folder / f"{name}.safetensors")
    for names, asked, rank in [("", 0, 0), ("", 12, 12), ("four", 0, 8), ("four, nine", 0, 16), ("nine:0, peft", 0, 80),
                               ("four", 64, 64), ("text, odd", 0, 0)]:  # fmt: skip
        assert rank_of(lora_set(names), asked) == rank
    assert beyond_attention(lora_set("four, everywhere"))
    assert not beyond_attention(lora_set("four, nine, peft, text"))
    (loras_folder / "half.safetensors").write_bytes((loras_folder / "four.safetensors").read_bytes()[:60])
    with pytest.raises(UserError, match="cut short"):
        rank_of(lora_set("half"))


def test_loras_that_do_not_fit_are_refused_before_a_frame_wears_them(folder: Folder, loras_folder: Path) -> None:
    unet, text = folder.unet(), folder.text_model()
    wide = {
        f"unet.{INSIDE[2]}.lora_A.weight": torch.ones(4, 2048),
        f"unet.{INSIDE[2]}.lora_B.weight": torch.ones(64, 4),
    }
    for name, tensors in {
        "ink": lora(unet, INSIDE),
        "big": lora(unet, INSIDE, rank=6),
        "conv": lora(unet, OUTSIDE[:1]),
        "wide": wide,
        "foreign": {"lora_te2_text_model_final.lora_up.weight": torch.ones(1)},
        "text": lora(text, TEXT, prefix="lora_te_text_model_"),
    }.items():
        save_file(tensors, loras_folder / f"{name}.safetensors")
    loras = readers(folder, Slots(folder.config("unet"), 8))
    for names, message, hint in [
        ("ink, big", "rank 16 together, there is room for 8", "style.lora_rank=16"),
        ("conv", "no room for a LoRA at conv_in", "style.lora when starting"),
        ("ink, wide:0", "wide.safetensors: the LoRA is for SDXL", "family"),
        ("foreign", "foreign.safetensors changes nothing here", "unet, text_encoder"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            loras.tensors(lora_set(names))
        assert hint in caught.value.hint
    loras.tensors(lora_set("ink, big:0, conv:0"))
    without = readers(folder, None)
    with pytest.raises(UserError, match="no room for LoRAs") as caught:
        without.tensors(lora_set("ink"))
    assert "style.lora_rank=8" in caught.value.hint
    assert without.tensors(()) == without.tensors(lora_set("text")) == {}
    assert without.reader(lora_set("text")) is not without.reader(())
    ink = lora_set("ink")
    (loras_folder / "ink.safetensors").unlink()
    with pytest.raises(UserError, match="cannot read"):
        readers(folder, None).tensors(ink)
