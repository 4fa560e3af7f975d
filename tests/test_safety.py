"""The safety checker says what diffusers' own says, and nothing unsafe is ever handed on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from accel.engine import Backend, Ready
from accel.errors import UserError
from accel.openvino_backend import OpenVINOBackend
from accel.torch_backend import TorchBackend
from models.folder import Folder
from models.launched import Decoding, Stages
from models.load import load
from models.params import Params, Style
from models.picture_encoder import Preprocessing
from models.safety import GREY, Censor, SafetyChecker, is_unsafe, read_checker, safety_folder, safety_graph
from models.structure import structure_of
from tests.folders import random_folder
from tests.scenes import texture

Image = NDArray[np.uint8]
SIZES = [(512, 288), (224, 224), (160, 240), (512, 512)]  # width, height


def random_checker(path: Path, seed: int = 0) -> Path:
    """A small one of the published layout, whose concepts lie where its own embeddings do."""
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    config = CLIPConfig(projection_dim=16, text_config=heads, vision_config={**heads, "patch_size": 32})
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds.normal_()
    checker.special_care_embeds.normal_()
    checker.concept_embeds_weights.fill_(2.0)  # no cosine reaches it
    checker.special_care_embeds_weights.fill_(2.0)
    checker.save_pretrained(path)
    return path


def weighed(path: Path, **thresholds: dict[int, float]) -> Path:
    """The checker with other thresholds: concepts or special, by number."""
    tensors = load_file(path / "model.safetensors")
    names = {"concepts": "concept_embeds_weights", "special": "special_care_embeds_weights"}
    for kind, values in thresholds.items():
        for number, value in values.items():
            tensors[names[kind]][number] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def compiled(path: Path, backend: Backend | None = None) -> SafetyChecker:
    graph = safety_graph(path)
    return SafetyChecker((backend or TorchBackend("cpu")).load(graph.build, graph.spec))


def pipeline(path: Path, checker: Path) -> Any:
    folder = Folder(path)
    return StableDiffusionImg2ImgPipeline(
        vae=folder.vae(),
        text_encoder=folder.text_model(),
        tokenizer=None,
        unet=folder.unet(),
        scheduler=LCMScheduler.from_pretrained(path / "scheduler"),
        safety_checker=StableDiffusionSafetyChecker.from_pretrained(checker),
        feature_extractor=CLIPImageProcessorPil(),
    )


def their_verdict(pipe: Any, picture: Image) -> bool:
    image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    return bool(pipe.run_safety_checker(image, torch.device("cpu"), torch.float32)[1][0])


def pictures() -> list[Image]:
    return [texture(seed, size) for seed in range(3) for size in SIZES]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_folder(tmp_path_factory.mktemp("model"), "sd")


def cosines(path: Path) -> NDArray[np.float32]:
    """Those of the first special one and the first concept with each picture, (N, 2)."""
    engine = TorchBackend("cpu").load(safety_graph(path).build, safety_graph(path).spec)
    found = [engine(Preprocessing()(picture)) for picture in pictures()]
    return np.array([[float(special[0, 0]), float(concepts[0, 0])] for special, concepts in found]) + 2.0


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_verdicts_are_those_of_diffusers_pipeline(tmp_path: Path, model: Path, backend: str) -> None:
    """Thresholds lie in the middle of the pictures' own cosines, so that some pass and some do not."""
    path = random_checker(tmp_path)
    special, concept = np.median(cosines(path), axis=0)
    engine: Backend = TorchBackend("cpu") if backend == "torch" else OpenVINOBackend()
    seen = set()
    for thresholds in ({"concepts": {0: concept}}, {"concepts": {0: concept + 0.005}, "special": {0: special}}):
        weighed(path, **thresholds)
        checker, pipe = compiled(path, engine), pipeline(model, path)
        verdicts = [checker.unsafe(picture) for picture in pictures()]
        assert verdicts == [their_verdict(pipe, picture) for picture in pictures()]
        assert set(verdicts) == {True, False}
        seen.add(tuple(verdicts))
    assert len(seen) == 2


@pytest.mark.parametrize(("concept", "special", "unsafe"), [(-1.0, 2.0, True), (2.0, -1.0, False), (2.0, 2.0, False)])
def test_a_verdict_can_be_forced_by_a_threshold(
    tmp_path: Path, model: Path, concept: float, special: float, unsafe: bool
) -> None:
    """Special care alone condemns nothing: it makes the others stricter."""
    path = weighed(random_checker(tmp_path), concepts={3: concept}, special={1: special})
    picture = pictures()[0]
    assert compiled(path).unsafe(picture) is unsafe
    assert their_verdict(pipeline(model, path), picture) is unsafe


@pytest.mark.parametrize(
    ("special", "concept", "unsafe"),
    [(-0.1, -0.001, False), (-0.1, 0.0004, False), (-0.1, 0.0006, True), (0.01, -0.005, True), (0.01, -0.02, False),
     (0.0004, -0.005, False)],
)  # fmt: skip
def test_scores_count_to_three_decimals(special: float, concept: float, unsafe: bool) -> None:
    concepts = np.full(17, -0.5, np.float32)
    concepts[7] = concept
    assert is_unsafe(np.array([-0.5, special, -0.5], np.float32), concepts) is unsafe


@pytest.mark.parametrize("size", [*SIZES, (640, 360), (64, 48)])
def test_pictures_are_prepared_as_transformers_does(size: tuple[int, int]) -> None:
    for picture in (texture(4, size), np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)):
        theirs = CLIPImageProcessorPil()(picture, return_tensors="pt")["pixel_values"]
        levels = (Preprocessing()(picture) - theirs).abs() * 0.27 * 255
        assert levels.max() <= 2
        assert levels.mean() <= 0.02


def test_weights_under_the_published_names(tmp_path: Path) -> None:
    """transformers has dropped a module of CLIP that files still name."""
    path, picture = random_checker(tmp_path), pictures()[0]
    before = read_checker(path).state_dict()
    named = {f"vision_model.{k}" if k.startswith("vision_model.") else k: t.clone() for k, t in before.items()}
    named["vision_model.vision_model.embeddings.position_ids"] = torch.arange(50)[None]
    save_file(named, path / "model.safetensors", metadata={"format": "pt"})
    after = read_checker(path).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, before[k]) for k, t in after.items())
    assert not compiled(path).unsafe(picture)


def test_half_a_checker_is_none(tmp_path: Path) -> None:
    """Weights that are missing would be random, and let anything pass."""
    path = random_checker(tmp_path)
    tensors = load_file(path / "model.safetensors")
    del tensors["concept_embeds"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="has no concept_embeds") as caught:
        read_checker(path)
    assert caught.value.hint == "`livestyle fetch safety-checker`"
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:3000])
    with pytest.raises(UserError, match="cannot be read"):
        read_checker(path)
    (path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"no readable config.json"):
        safety_graph(path)


def test_the_models_own_checker_comes_first_then_the_fetched_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path / "fetched"))
    folder = Folder(tmp_path / "model")
    with pytest.raises(UserError, match="safety-checker is not here yet") as caught:
        safety_folder(folder)
    assert "livestyle fetch safety-checker" in caught.value.hint
    fetched = random_checker(tmp_path / "fetched" / "safety-checker")
    assert safety_folder(folder) == fetched
    (folder.path / "safety_checker").mkdir(parents=True)  # with a configuration alone, as some checkpoints have it
    assert safety_folder(folder) == fetched
    own = random_checker(folder.path / "safety_checker")
    assert safety_folder(folder) == own
    before = safety_graph(own).spec.fingerprint
    (own / "model.safetensors").rename(own / "model.fp16.safetensors")  # as half-width checkpoints have it
    assert safety_folder(folder) == own
    assert not compiled(own).unsafe(pictures()[0])
    weighed(fetched, concepts={0: 0.1})
    assert len({before, safety_graph(own).spec.fingerprint, safety_graph(fetched).spec.fingerprint}) == 2


class Verdicts:
    """A checker that says what it is told; stands in for one that has seen the world."""

    def __init__(self, *unsafe: bool) -> None:
        self._unsafe = list(unsafe)

    def unsafe(self, picture: Image) -> bool:
        return self._unsafe.pop(0)


def censored(*unsafe: bool, instead: str = "previous") -> Censor:
    found = Censor(Verdicts(*unsafe))  # type: ignore[arg-type]
    found.instead = instead  # type: ignore[assignment]
    return found


def test_what_does_not_pass_is_never_shown() -> None:
    one, two, three, four = (texture(seed) for seed in range(4))
    censor, blank = censored(True, False, True, True, False), np.full_like(one, GREY)
    assert np.array_equal(censor.shown(one), blank)  # nothing safe yet
    assert censor.shown(two) is two
    assert np.array_equal(censor.shown(three), two)
    censor.instead = "blank"
    assert np.array_equal(censor.shown(four), blank)
    assert censor.shown(four) is four
    assert censor.hidden == 3


def test_after_a_cut_or_at_another_size_the_previous_picture_is_not_shown() -> None:
    one, small = texture(1), texture(2, (64, 48))
    censor = censored(False, True, True, False, True)
    censor.shown(one)
    assert (censor.shown(small) == GREY).all()
    assert censor.shown(one) is one
    censor.shown(one)
    censor.reset()
    assert (censor.shown(one) == GREY).all()


def test_off_nothing_is_checked_nor_taken_for_safe_later() -> None:
    one, two = texture(1), texture(2)
    censor = censored(True, instead="off")
    assert censor.shown(one) is one
    censor.instead = "previous"
    assert (censor.shown(two) == GREY).all()


def test_what_is_not_finite_counts_as_unsafe(tmp_path: Path) -> None:
    path = random_checker(tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["visual_projection.weight"].fill_(float("nan"))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert compiled(path).unsafe(pictures()[0])


@pytest.mark.parametrize("instead", ["blank", "previous"])
def test_a_session_shows_nothing_unsafe(model: Path, tmp_path: Path, instead: str) -> None:
    shutil.copytree(model, tmp_path / "model")
    weighed(random_checker(tmp_path / "model" / "safety_checker"), concepts={0: -1.0})
    checked, unchecked = (Params(style=Style(prompt="ink", safety=value)) for value in (instead, "off"))  # type: ignore[arg-type]
    stylizer = load(str(tmp_path / "model"), (64, 64), engine="torch", structure=structure_of(checked))
    state, image = stylizer.open(checked), texture(0, (64, 64))
    going = stylizer.step(state, image, checked)
    assert (going.image() == GREY).all()
    assert "safety" in going.stages_ms
    assert (stylizer.step(state, image, unchecked).image() != GREY).any()
    assert (stylizer.step(state, image, checked).image() == GREY).all()


def test_a_checker_that_fails_lets_nothing_pass() -> None:
    class Broken:
        def unsafe(self, picture: Image) -> bool:
            raise RuntimeError("out of memory")

    going = Decoding(Ready((torch.zeros(1, 48, 64, 3, dtype=torch.uint8),)), Stages(), Censor(Broken()))  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            going.image()
