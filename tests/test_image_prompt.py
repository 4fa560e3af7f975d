"""Style pictures (IP-Adapter): equal to diffusers, neutral at scale 0, swapped without a new engine, read with care."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import (
    AutoencoderTiny,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from accel.engine import Engine
from accel.errors import UserError
from accel.openvino_backend import OpenVINOBackend
from accel.torch_backend import TorchBackend
from models.denoise import Conditioning, denoise, start
from models.folder import Folder
from models.image_prompt import Fade, ImagePrompt, Pictures, cross_attentions
from models.ip_adapter import Adapter, find_adapter
from models.networks import Decode, Encode, unet_graph
from models.picture_encoder import PictureEncoder, Preprocessing, StylePicture, preprocessing, read_picture
from models.schedule import consistency_schedule
from models.text import Transition
from models.text_xl import size_ids
from models.unet import Call, Seen
from tests.addons import random_adapter
from tests.folders import random_folder, random_xl_folder

SIZE = (96, 64)  # width, height
TOLERANCE = 1e-3
PROMPT, NEGATIVE = "oil painting of a rainy city", "ink"
WIDTHS = {"sd": 32, "xl": 32 + 48}  # of the UNets' words


def painting(seed: int = 3, height: int = 50, width: int = 70) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Model:
    """A random model folder and its adapter's."""

    path: Path
    kind: str  # "sd" or "xl"
    adapter: Path

    @property
    def unet(self) -> Any:
        return UNet2DConditionModel.from_pretrained(self.path / "unet")

    def found(self) -> Adapter:
        return find_adapter(self.adapter, WIDTHS[self.kind])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Model]:
    made: dict[tuple[str, str], Model] = {}
    folders: dict[str, Path] = {}

    def make(kind: str = "sd", adapter: str = "base") -> Model:
        if kind not in folders:
            write = random_folder if kind == "sd" else lambda path, _: random_xl_folder(path)
            folders[kind] = write(tmp_path_factory.mktemp(kind), kind)
        if (kind, adapter) not in made:
            unet = UNet2DConditionModel.from_pretrained(folders[kind] / "unet")
            path = random_adapter(tmp_path_factory.mktemp(f"{kind}-{adapter}"), unet, adapter)
            made[kind, adapter] = Model(folders[kind], kind, path)
        return made[kind, adapter]

    return make


def engine_of(model: Model, rows: int = 1, backend: Any = None, *, bare: bool = False) -> Engine:
    latent = (1, 4, SIZE[1] // 8, SIZE[0] // 8)
    features = [] if bare else [ImagePrompt(model.found(), rows)]
    graph = unet_graph(Folder(model.path), latent, rows=rows, block=1, features=features)
    return (backend or TorchBackend()).load(graph.build, replace(graph.spec, precision="fp32"))


def seen(picture: StylePicture | None) -> Seen:
    return Seen(None, MappingProxyType({"picture": picture}))


def given(engine: Engine, **inputs: Tensor) -> tuple[Tensor, ...]:
    """The engine's inputs in their order, what is not named drawn at random."""
    generator = torch.Generator().manual_seed(11)
    found = {}
    for spec in engine.spec.inputs:
        if spec.dtype == "int64":
            found[spec.name] = torch.zeros(spec.shape, dtype=torch.int64)
        elif spec.name == "t":
            found[spec.name] = torch.full(spec.shape, 499.0)
        else:
            found[spec.name] = torch.randn(spec.shape, generator=generator)
    return tuple((found | inputs).values())


class Ours:
    """The few-step loop over our UNet with a style picture, from float picture to float picture."""

    def __init__(self, model: Model, engine: Engine | None = None) -> None:
        folder, adapter = Folder(model.path), model.found()
        self.prompt = ImagePrompt(adapter)
        self.engine = engine or engine_of(model)
        self.encoder = PictureEncoder(adapter)
        self.encode, self.decode = Encode(folder.vae()), Decode(folder.vae(), as_bytes=False)
        self.text: Any = folder.text()
        self.tables = folder.scheduler()
        self.added = [size_ids(SIZE)] if model.kind == "xl" else []

    def shown(self, picture: NDArray[np.uint8], scale: float | Tensor) -> StylePicture:
        weights = scale if isinstance(scale, Tensor) else torch.tensor([scale])
        return StylePicture(self.encoder.embed(picture), self.encoder.negative, weights)

    def read(self, prompt: str, negative: bool = False) -> tuple[Tensor, ...]:
        if not self.added:
            return (self.text.embed(prompt),)
        found = self.text.read_negative(prompt) if negative else self.text.read(prompt)
        return found.words, found.pooled

    def __call__(self, style: StylePicture | None, steps: int = 2, guidance: float = 1.0) -> Tensor:
        pictures, schedule = Pictures(self.prompt), consistency_schedule(self.tables, steps, 1.0)
        cond = Conditioning(words=self.read(PROMPT), negative=self.read(NEGATIVE, True), guidance=guidance)

        def network(z: Tensor, t: float, prompt: tuple[Tensor, ...]) -> Tensor:
            row = 0 if torch.equal(prompt[0], cond.words[0]) else steps
            call = Call(z, torch.tensor([t]), prompt[0], range(row, row + 1), (0,), steps, (seen(style),))
            given = pictures.inputs(call)
            inputs = z, call.t, *prompt, *self.added, *(given[spec.name] for spec in self.prompt.inputs)
            return self.engine(*inputs)[0].clone()

        generator = torch.Generator().manual_seed(5)
        with torch.inference_mode():
            source = self.encode(source_picture())
            noises = [torch.randn(source.shape, generator=generator) for _ in range(steps)]
            z = start(source, noises[0], schedule.steps[0], pure=False)
            return self.decode(denoise(network, z, schedule, cond, noises[1:]))


def source_picture() -> Tensor:
    return torch.rand(1, 3, SIZE[1], SIZE[0], generator=torch.Generator().manual_seed(7))


def pipeline(model: Model) -> Any:
    """diffusers' own, which reads the adapter's folder by itself."""
    shared = {
        "vae": AutoencoderTiny.from_pretrained(model.path / "vae"),
        "unet": model.unet,
        "text_encoder": CLIPTextModel.from_pretrained(model.path / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(model.path / "tokenizer"),
        "scheduler": LCMScheduler.from_pretrained(model.path / "scheduler"),
    }
    if model.kind == "xl":
        made: Any = StableDiffusionXLImg2ImgPipeline(
            **shared,
            text_encoder_2=CLIPTextModelWithProjection.from_pretrained(model.path / "text_encoder_2"),
            tokenizer_2=CLIPTokenizer.from_pretrained(model.path / "tokenizer_2"),
            add_watermarker=False,
        )
    else:
        made = StableDiffusionImg2ImgPipeline(
            **shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    made.load_ip_adapter(str(model.adapter), subfolder="", weight_name="ip-adapter_sd15.safetensors")
    made.set_progress_bar_config(disable=True)
    return made


def theirs(pipeline: Any, scale: Any, picture: NDArray[np.uint8], steps: int, guidance: float) -> Tensor:
    pipeline.set_ip_adapter_scale(scale)
    found: Tensor = pipeline(
        PROMPT,
        image=source_picture(),
        ip_adapter_image=Image.fromarray(picture),
        negative_prompt=NEGATIVE,
        num_inference_steps=steps,
        strength=1.0,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    return found


ALL = tuple(product((0.0, 0.5, 1.0), (1.0, 3.0)))  # scales and guidance
SOME = ((0.5, 3.0), (1.0, 1.0))


@pytest.mark.parametrize(
    ("kind", "adapter", "settings"),
    [("sd", "base", ALL), ("sd", "plus", ALL), ("xl", "base", SOME), ("xl", "plus", SOME)],
)
def test_equals_diffusers_own_pipelines(
    model: Callable[..., Model], kind: str, adapter: str, settings: tuple[tuple[float, float], ...]
) -> None:
    """Each side prepares the picture and reads the adapter's folder by itself, so both are compared too."""
    made = model(kind, adapter)
    ours, other, picture = Ours(made), pipeline(made), painting()
    for scale, guidance in settings:
        expected = theirs(other, scale, picture, 2, guidance)
        found = ours(ours.shown(picture, scale), 2, guidance)
        assert (found - expected).abs().max() <= TOLERANCE, (scale, guidance)
    another = ours(ours.shown(painting(4), scale), 2, guidance)
    assert (another - found).abs().max() > 10 * TOLERANCE  # or this would notice nothing


def test_a_scale_for_each_block_is_that_of_diffusers(model: Callable[..., Model]) -> None:
    made = model()
    ours, picture = Ours(made), painting()
    expected = theirs(pipeline(made), {"up": {"block_0": [0.0, 1.0]}}, picture, 1, 1.0)
    scales = torch.tensor([float("up_blocks.0.attentions.1" in name) for name in cross_attentions(made.unet)])
    assert scales.tolist() == [0, 0, 1, 0]
    assert (ours(ours.shown(picture, scales), 1) - expected).abs().max() <= TOLERANCE
    assert (ours(ours.shown(picture, 1.0), 1) - expected).abs().max() > TOLERANCE


def test_the_unet_is_that_of_diffusers(model: Callable[..., Model]) -> None:
    made = model("sd", "plus")
    engine, unet, encoder = engine_of(made), made.unet, PictureEncoder(made.found())
    tensors = safetensors.torch.load_file(made.found().path)
    parts = {
        part: {k.removeprefix(f"{part}."): t for k, t in tensors.items() if k.startswith(part)}
        for part in ("image_proj", "ip_adapter")
    }
    unet._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    for processor in unet.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [0.7]
    hidden = torch.randn(1, 17, 48, generator=torch.Generator().manual_seed(1))  # what the image encoder would give
    with torch.inference_mode():
        tokens = encoder._projection(hidden)
        inputs = given(engine, picture_words=tokens, picture_scale=torch.full((1, 4), 0.7))
        z, t, words = inputs[:3]
        expected = unet(z, t, words, added_cond_kwargs={"image_embeds": [hidden[None]]}).sample
        assert (engine(*inputs)[0] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("style", ["none", "scale 0"])
def test_no_picture_or_scale_0_is_the_bare_unet_bit_for_bit(model: Callable[..., Model], style: str) -> None:
    made = model("sd", "plus")
    engine, encoder = engine_of(made), PictureEncoder(made.found())
    picture = None if style == "none" else StylePicture(encoder.embed(painting()), encoder.negative, torch.zeros(1))
    z, t, words = given(engine)[:3]
    shown = Pictures(ImagePrompt(made.found())).inputs(Call(z, t, words, range(1), (0,), 1, (seen(picture),)))
    bare = engine_of(made, bare=True)
    assert torch.equal(engine(z, t, words, *shown.values())[0], bare(z, t, words)[0])


def test_each_row_is_shown_its_own_frames_picture_and_each_pass_its_own_tokens(model: Callable[..., Model]) -> None:
    prompt = ImagePrompt(model("sd", "base").found(), rows=4)
    first, second = (StylePicture(*torch.randn(2, 1, 4, 32), torch.tensor([scale])) for scale in (0.25, 0.75))
    frames = seen(first), seen(second), seen(first), seen(None)
    call = Call(torch.zeros(4, 4, 8, 12), torch.zeros(4), torch.zeros(4, 77, 32), range(4), (0, 1, 0, 1), 2, frames)
    words, scale = Pictures(prompt).inputs(call).values()
    assert torch.equal(words, torch.cat([first.words, second.words, first.negative, torch.zeros(1, 4, 32)]))
    assert scale.tolist() == [[0.25] * 4, [0.75] * 4, [0.25] * 4, [0.0] * 4]
    assert [(spec.name, spec.shape) for spec in prompt.inputs] == [
        ("picture_words", tuple(words.shape)),
        ("picture_scale", tuple(scale.shape)),
    ]


def style(seed: int, scale: float = 0.5) -> StylePicture:
    words, negative = torch.randn(2, 1, 4, 32, generator=torch.Generator().manual_seed(seed))
    return StylePicture(words, negative, torch.tensor([scale]))


def steps_of(fade: Fade, wanted: StylePicture | None, frames: int, count: int) -> list[StylePicture | None]:
    return [fade.next(wanted, frames) for _ in range(count)]


def equal(one: StylePicture | None, other: StylePicture) -> bool:
    return one is not None and all(map(torch.equal, one.tensors, other.tensors))


def test_a_changed_picture_takes_hold_as_a_prompt_does() -> None:
    """The ways of both are one: `Transition`, whose first frame is one step on and whose last is the new one alone."""
    old, new = style(1), style(2, 1.0)
    fade, way = Fade(), Transition(old.tensors, new.tensors, 4)
    assert steps_of(fade, old, 4, 2) == [old, old]  # there is nothing to come from, and nowhere to go
    for frame, shown in enumerate(steps_of(fade, new, 4, 3), 1):
        assert equal(shown, StylePicture(*way.at(frame)))
    assert steps_of(fade, new, 4, 2) == [new, new]
    louder = replace(new, scale=torch.tensor([0.0]))  # a slider alone
    shown = steps_of(fade, louder, 4, 5)
    assert [round(float(one.scale), 3) for one in shown if one] == [0.75, 0.5, 0.25, 0, 0]
    assert all(one and torch.equal(one.words, new.words) for one in shown)


def test_without_blend_frames_a_picture_counts_at_once() -> None:
    old, new, fade = style(1), style(2), Fade()
    assert [fade.next(wanted, 0) for wanted in (None, old, new, None, None, new)] == [None, old, new, None, None, new]


def test_from_no_picture_and_to_none_its_scale_goes(model: Callable[..., Model]) -> None:
    one, fade = style(1), Fade()
    shown = [*steps_of(fade, None, 2, 1), *steps_of(fade, one, 2, 3), *steps_of(fade, None, 2, 3)]
    assert [shown[0], *shown[2:4], *shown[5:]] == [None, one, one, None, None]
    assert all(equal(shown[i], replace(one, scale=one.scale / 2)) for i in (1, 4))


def test_a_picture_that_changes_on_the_way_goes_on_from_there() -> None:
    old, new, other, fade = style(1), style(2), style(3), Fade()
    fade.next(old, 4)
    *_, half = steps_of(fade, new, 4, 2)
    assert half is not None
    found = fade.next(other, 4)
    assert equal(found, StylePicture(*Transition(half.tensors, other.tensors, 4).at(1)))
    again = replace(other, words=other.words.clone())  # read anew, or found under another name: no other way begins
    assert steps_of(fade, again, 4, 3)[-1] is again


def test_every_frame_of_a_stream_is_one_step_on_however_it_is_called(model: Callable[..., Model]) -> None:
    """Steps one after the other, guidance's passes too, and a stream batch show each frame the same."""
    prompt = model("sd", "base").found()
    frames = [
        Seen(None, MappingProxyType({"picture": picture, "blend_frames": 3}))
        for picture in (style(1), style(1), *[style(2)] * 4, *[None] * 4)
    ]

    def call(rows: range, steps: tuple[int, ...], shown: tuple[Seen, ...]) -> Call:
        n = len(steps)
        return Call(torch.zeros(n, 4, 8, 12), torch.zeros(n), torch.zeros(n, 77, 32), rows, steps, 2, shown)

    single, batch = Pictures(ImagePrompt(prompt)), Pictures(ImagePrompt(prompt, 2))
    apart = []
    for frame in frames:
        found = [single.inputs(call(range(row, row + 1), (row % 2,), (frame,))) for row in (0, 1, 2, 3)]  # passes: 2
        assert torch.equal(found[0]["picture_words"], found[1]["picture_words"])
        assert all(torch.equal(found[0]["picture_scale"], other["picture_scale"]) for other in found)
        apart.append(found[0])
    before = frames[0]
    for i, frame in enumerate(frames):
        together = batch.inputs(call(range(2), (0, 1), (frame, before)))
        for name, tensor in together.items():
            assert torch.equal(tensor[:1], apart[i][name])
            assert torch.equal(tensor[1:], apart[max(i - 1, 0)][name])
        before = frame
    assert not torch.equal(apart[2]["picture_words"], apart[3]["picture_words"])


def test_self_attentions_and_the_names_of_layers_are_left_alone(model: Callable[..., Model]) -> None:
    """Other features replace self-attention's processors, and LoRAs find layers by name."""
    made = model()
    unet = made.unet
    names, processors = dict(unet.named_modules()).keys(), unet.attn_processors
    brought = ImagePrompt(made.found()).install(unet)
    assert dict(unet.named_modules()).keys() == names
    changed = {name for name, processor in unet.attn_processors.items() if processor is not processors[name]}
    assert changed == {f"{name}.processor" for name in cross_attentions(unet)}
    assert sum(parameter.numel() for parameter in brought.parameters()) == sum(
        k.numel() + v.numel() for k, v in made.found().layers
    )


def test_a_row_may_be_a_block_of_frames(model: Callable[..., Model]) -> None:
    """As with a window of frames: two latents of one row see the same picture."""
    made = model()
    prompt, unet = ImagePrompt(made.found(), rows=2), made.unet.eval()
    prompt.install(unet)
    z, words = torch.randn(4, 4, 8, 12), torch.randn(2, 77, 32)
    shown = {"picture_words": torch.randn(2, 4, 32), "picture_scale": torch.tensor([[0.4] * 4, [0.9] * 4])}
    with torch.inference_mode():
        with prompt.during(unet, shown, {}):
            found = unet(z, 9, words.repeat_interleave(2, 0)).sample
        each = {name: tensor.repeat_interleave(2, 0) for name, tensor in shown.items()}
        with prompt.during(unet, each, {}):
            assert torch.equal(unet(z, 9, words.repeat_interleave(2, 0)).sample, found)


def test_another_picture_needs_no_other_engine(model: Callable[..., Model]) -> None:
    made = model("sd", "plus")
    engine, fresh, encoder = engine_of(made), engine_of(made), PictureEncoder(made.found())
    one, other = (encoder.embed(painting(seed)) for seed in (3, 4))
    scale = torch.full((1, 4), 0.6)
    before = engine(*given(engine, picture_words=one, picture_scale=scale))[0]
    after = engine(*given(engine, picture_words=other, picture_scale=scale))[0]
    assert torch.equal(after, fresh(*given(fresh, picture_words=other, picture_scale=scale))[0])
    assert (after - before).abs().max() > 0.05
    assert ImagePrompt(made.found()).fingerprint != ImagePrompt(model("sd", "base").found()).fingerprint


def test_openvino_computes_the_same_also_with_another_picture(model: Callable[..., Model]) -> None:
    made = model("sd", "plus")
    reference, engine = engine_of(made, 2), engine_of(made, 2, OpenVINOBackend(threads=1))
    encoder, scale = PictureEncoder(made.found()), torch.tensor([[0.0, 0.3, 0.6, 0.9], [0.0] * 4])
    for seed in (3, 4, 3):
        tokens = encoder.embed(painting(seed)).expand(2, -1, -1)
        inputs = given(reference, picture_words=tokens, picture_scale=scale)
        found = engine(*inputs)[0]
        assert (found - reference(*inputs)[0]).abs().max() <= 1e-4
    bare = engine_of(made, 2, bare=True)(*inputs[:3])[0]
    assert (found[1] - bare[1]).abs().max() <= 1e-4  # scale 0 is within rounding there, where sums have their own order
    assert (found[0] - bare[0]).abs().max() > 0.05


def test_pictures_can_be_blended_on_the_way_from_one_to_another() -> None:
    one, other = (StylePicture(*torch.randn(2, 1, 4, 8), torch.tensor([scale])) for scale in (0.2, 0.6))
    way = Transition(one.tensors, other.tensors, frames=4)
    assert StylePicture(*way.at(0)) == one
    assert StylePicture(*way.at(4)) == other
    assert StylePicture(*way.at(2)).scale.item() == pytest.approx(0.4)
    shown = [StylePicture(*Transition(one.faded.tensors, one.tensors, frames=4).at(i)) for i in range(5)]
    assert [s.scale.item() for s in shown] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert all(torch.allclose(s.words, one.words) for s in shown)


@pytest.mark.parametrize("shape", [(300, 500), (40, 32), (32, 32), (11, 7), (1, 1), (64, 500)])
def test_pictures_are_prepared_as_transformers_does(shape: tuple[int, int]) -> None:
    picture = painting(6, *shape)
    expected = CLIPImageProcessorPil(size=32, crop_size=32)(Image.fromarray(picture), return_tensors="pt").pixel_values
    assert torch.equal(Preprocessing(32, 32)(picture), expected)


def test_a_strip_is_looked_at_in_its_middle() -> None:
    """A picture a million times wider than high would otherwise fill the memory."""
    strip = np.zeros((1, 200_000, 3), np.uint8)
    strip[:, 99_900:100_100] = 255
    pixels = Preprocessing(224, 224)(strip)
    assert pixels.shape == (1, 3, 224, 224)
    assert pixels.min() > 1.9


def test_the_folders_own_preprocessing_counts(model: Callable[..., Model], tmp_path: Path) -> None:
    folder = copied(model().adapter, tmp_path)
    config = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3}
    processor = CLIPImageProcessorPil(**config)
    processor.save_pretrained(folder / "feature_extractor")
    picture = painting()
    expected = processor(Image.fromarray(picture), return_tensors="pt").pixel_values
    assert torch.equal(preprocessing(find_adapter(folder, 32))(picture), expected)


def test_a_picture_is_encoded_once_by_whoever_asks_first(model: Callable[..., Model], tmp_path: Path) -> None:
    encoder, runs = PictureEncoder(model().found()), []
    encoder._model.register_forward_hook(lambda *_: runs.append(1))
    file = tmp_path / "style.png"
    Image.fromarray(painting()).save(file)
    found: list[Tensor] = []
    threads = [Thread(target=lambda: found.append(encoder.embed_file(file))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1
    assert all(torch.equal(tokens, encoder.embed(painting())) for tokens in found)
    Image.fromarray(painting(9, 51)).save(file)
    assert torch.equal(encoder.shown(str(file), 0.5).words, found[0])  # frames go on with what was read
    assert torch.equal(encoder.embed_file(file), encoder.embed(painting(9, 51)))
    file.unlink()
    style = encoder.shown(file, 0.5)
    assert torch.equal(style.words, encoder.embed(painting(9, 51)))
    assert style.scale.tolist() == [0.5]
    assert len(runs) == 2
    assert encoder.shown("", 0.5) is None


def test_a_picture_that_has_gone_is_no_hindrance_while_it_is_worn(
    model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path))
    encoder = PictureEncoder(model().found())
    file = tmp_path / "pictures" / "style.png"
    with pytest.raises(UserError, match="no such file"):
        encoder.embed_file("style.png")
    file.parent.mkdir()
    Image.fromarray(painting()).save(file)
    found = encoder.embed_file("style.png")  # one that has come since is found
    file.unlink()
    assert encoder.embed_file("style.png") is found
    with pytest.raises(UserError, match="no such file"):
        encoder.embed_file("other.png")
    Image.fromarray(painting(9)).save(file)
    assert torch.equal(encoder.embed_file("style.png"), encoder.embed(painting(9)))
    file.write_bytes(b"none")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        encoder.embed_file("style.png")


def test_what_is_remembered_is_bounded(model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.picture_encoder.KEPT", 3)
    encoder = PictureEncoder(model().found())
    pictures = [painting(seed, 8, 8) for seed in range(5)]
    found = [encoder.embed(picture) for picture in pictures]
    assert len(encoder._known) == 3
    assert torch.equal(encoder.embed(pictures[0]), found[0])


def test_pictures_are_turned_upright_and_lose_their_alpha(tmp_path: Path) -> None:
    pixels = painting(3, 4, 6)
    Image.fromarray(np.dstack([pixels, np.full((4, 6), 128, np.uint8)])).save(tmp_path / "a.png")
    assert np.array_equal(read_picture(tmp_path / "a.png"), pixels)
    turned = Image.fromarray(pixels)
    turned.getexif()[0x0112] = 6  # to be shown turned to the right
    turned.save(tmp_path / "b.png", exif=turned.getexif())
    assert np.array_equal(read_picture(tmp_path / "b.png"), np.rot90(pixels, -1))


@pytest.mark.parametrize("content", ["missing", "text", "half", "folder", "empty"])
def test_a_file_that_is_no_picture_is_told(tmp_path: Path, content: str) -> None:
    file = tmp_path / "style.jpg"
    if content == "folder":
        file.mkdir()
    elif content in ("text", "empty"):
        file.write_text("a rainy city" if content == "text" else "")
    elif content == "half":
        Image.fromarray(painting()).save(file)
        file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be read as a picture") as told:
        read_picture(file)
    assert "PNG" in told.value.hint


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "adapter"))


def test_pickled_weights_are_read_and_code_in_them_is_not_run(model: Callable[..., Model], tmp_path: Path) -> None:
    folder = copied(model().adapter, tmp_path)
    file, whole = folder / "ip-adapter_sd15.bin", model().found()
    nested: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in whole.tensors.items():
        part, _, name = key.partition(".")
        nested[part][name] = tensor
    torch.save(nested, file)
    (folder / "ip-adapter_sd15.safetensors").unlink()
    found = find_adapter(folder, 32)
    assert found.path == file
    assert found.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(tensor, whole.tensors[key]) for key, tensor in found.tensors.items())
    for content in (Path, "not a zip"):
        if isinstance(content, str):
            file.write_text(content)
        else:
            torch.save({"image_proj": content("/")}, file)
        with pytest.raises(UserError, match="cannot be read"):
            find_adapter(folder, 32)


def test_the_plain_one_that_fits_is_taken_of_a_published_tree(model: Callable[..., Model], tmp_path: Path) -> None:
    """h94/IP-Adapter's: models/ with its image encoder, and sdxl_models/ that share it."""
    base, plus, xl = model("sd", "base").adapter, model("sd", "plus").adapter, model("xl", "plus").adapter
    name = "ip-adapter_sd15.safetensors"
    copied(base, tmp_path).rename(tmp_path / "models")
    shutil.copy(plus / name, tmp_path / "models/ip-adapter-plus_sd15.safetensors")
    (tmp_path / "sdxl_models").mkdir()
    shutil.copy(xl / name, tmp_path / "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors")
    for path in (tmp_path, tmp_path / "models", tmp_path / "models" / name):
        assert find_adapter(path, 32) == Adapter(tmp_path / "models" / name, tmp_path / "models/image_encoder")
    assert find_adapter(tmp_path / "models/ip-adapter-plus_sd15.safetensors", 32).shape == (16, 32, 48)
    found = find_adapter(tmp_path, 80)
    assert found.path.name == "ip-adapter-plus_sdxl_vit-h.safetensors"
    assert found.encoder == tmp_path / "models/image_encoder"
    with pytest.raises(UserError, match="is for one with words 32 wide, this model is Stable Diffusion 1"):
        find_adapter(tmp_path, 768)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without(file: Path, *keys: str, renamed: str = "") -> None:
    tensors = safetensors.torch.load_file(file)
    found = {key: tensors.pop(key) for key in keys}
    if renamed:
        tensors[renamed] = found[keys[0]]
    save_file(tensors, file, metadata={"format": "pt"})


WEIGHTS, VISION, CONFIG = "ip-adapter_sd15.safetensors", "image_encoder/model.safetensors", "image_encoder/config.json"
PROJECTION = "image_proj.proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no IP-Adapter at"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no IP-Adapter at"),
    "half the weights": (lambda f: cut(f / WEIGHTS), "is cut short or damaged"),
    "other weights": (lambda f: shutil.copy(f / VISION, f / WEIGHTS), "is not an IP-Adapter"),
    "a layer less": (lambda f: without(f / WEIGHTS, "ip_adapter.3.to_v_ip.weight"), "has no ip_adapter.3.to_v_ip"),
    "no last layer": (
        lambda f: without(f / WEIGHTS, "ip_adapter.7.to_k_ip.weight", "ip_adapter.7.to_v_ip.weight"),
        "is for another kind of UNet: 3 layers, this model has 4",
    ),
    "no projection": (lambda f: without(f / WEIGHTS, PROJECTION), "has no image_proj.proj.weight"),
    "half a projection": (lambda f: without(f / WEIGHTS, "image_proj.norm.bias"), "is not whole"),
    "for faces": (lambda f: without(f / WEIGHTS, PROJECTION, renamed="image_proj.proj.0.weight"), "is for faces"),
    "no encoder": (lambda f: shutil.rmtree(f / "image_encoder"), "no image_encoder/ beside"),
    "no encoder weights": (lambda f: (f / VISION).unlink(), "cannot be read"),
    "half the encoder": (lambda f: cut(f / VISION), "cannot be read"),
    "a layer less in the encoder": (
        lambda f: without(f / VISION, "visual_projection.weight"),
        "has no visual_projection.weight",
    ),
    "no configuration": (lambda f: (f / CONFIG).unlink(), "cannot read"),
    "broken configuration": (lambda f: cut(f / CONFIG), "cannot read"),
    "another encoder": (
        lambda f: (f / CONFIG).write_text(
            (f / CONFIG).read_text().replace('"projection_dim": 24', '"projection_dim": 9')
        ),
        "does not fit the image encoder beside it (projection_dim 9, not 24)",
    ),
    "strange preprocessing": (
        lambda f: (f / "preprocessor_config.json").write_text(json.dumps({"crop_size": 7})),
        "makes pictures of 7 pixels, the encoder takes 32",
    ),
    "broken preprocessing": (
        lambda f: (f / "preprocessor_config.json").write_text(json.dumps({"size": {"max": 7}})),
        "is not CLIP's kind of preprocessing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_not_whole_is_told_before_the_first_frame(
    model: Callable[..., Model], tmp_path: Path, damage: str
) -> None:
    folder, (damaged, message) = copied(model().adapter, tmp_path), DAMAGES[damage]
    damaged(folder)

    def opened() -> None:
        adapter = find_adapter(folder, 32)
        ImagePrompt(adapter).install(model().unet)
        PictureEncoder(adapter)

    with pytest.raises(UserError, match=re.escape(message)) as told:
        opened()
    assert told.value.hint
    assert "\n" not in told.value.message + told.value.hint


def test_an_adapter_for_layers_of_another_width_is_told(model: Callable[..., Model], tmp_path: Path) -> None:
    folder = copied(model().adapter, tmp_path)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    for part in "kv":
        tensors[f"ip_adapter.1.to_{part}_ip.weight"] = torch.zeros(16, 32)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match=re.escape("layer 0 is (16, 32), not (64, 32)")):
        ImagePrompt(find_adapter(folder, 32)).install(model().unet)


def test_an_array_that_is_no_picture_is_a_bug(model: Callable[..., Model]) -> None:
    with pytest.raises(ValueError, match="a style picture is"):
        PictureEncoder(model().found()).embed(np.zeros((4, 4, 3), np.float32))  # type: ignore[arg-type]
