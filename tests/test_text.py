"""Text models between threads, and the words that they are taught."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from accel.errors import UserError
from models.folder import Folder
from models.inversion import expanded, teach
from models.text import TextEncoder
from models.text_xl import DoubleTextEncoder
from tests.folders import random_folder, random_xl_folder, tokenizer

PATIENCE = 20.0  # s that a test waits for another thread before it gives up


class Held(nn.Module):
    """A text model that waits inside its forward pass until it is let go on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config
        self.entered, self.go = threading.Event(), threading.Event()
        self.runs = 0
        self.hold = False

    def forward(self, *args: Any, **options: Any) -> Any:
        self.runs += 1
        if self.hold:
            self.entered.set()
            assert self.go.wait(PATIENCE)
        return self.model(*args, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_folder(tmp_path / "model", "sd")


@pytest.fixture
def encoder(folder: Path) -> TextEncoder:
    found = Folder(folder).text()
    assert isinstance(found, TextEncoder)
    return found


def xl(path: Path) -> DoubleTextEncoder:
    found = Folder(random_xl_folder(path)).text()
    assert isinstance(found, DoubleTextEncoder)
    return found


class TestThreads:
    def test_a_known_prompt_is_found_while_another_is_being_read(self, encoder: TextEncoder) -> None:
        """The frame path never waits for a prompt that somebody else is typing."""
        known = encoder.embed("oil")
        held = Held(encoder._model)
        encoder._model, held.hold = held, True
        with ThreadPoolExecutor(1) as pool:
            new = pool.submit(encoder.embed, "a new prompt")
            assert held.entered.wait(PATIENCE)
            assert encoder.embed("oil") is known  # would hang here
            assert not new.done()
            held.go.set()
            assert new.result(PATIENCE).shape == known.shape

    def test_the_same_is_true_of_two_text_models(self, tmp_path: Path) -> None:
        encoder = xl(tmp_path)
        known = encoder.read("oil")
        held = Held(encoder.pairs[0][1])
        encoder.pairs, held.hold = ((encoder.pairs[0][0], held), encoder.pairs[1]), True
        with ThreadPoolExecutor(1) as pool:
            new = pool.submit(encoder.read, "a new prompt")
            assert held.entered.wait(PATIENCE)
            assert encoder.read("oil") is known
            held.go.set()
            assert new.result(PATIENCE).words.shape == known.words.shape

    def test_a_prompt_that_several_ask_for_is_read_once(self, encoder: TextEncoder) -> None:
        held = Held(encoder._model)
        encoder._model, held.hold = held, True
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(encoder.embed, "a city in ink") for _ in range(4)]
            assert held.entered.wait(PATIENCE)
            held.go.set()
            found = [one.result(PATIENCE) for one in asked]
        assert held.runs == 1
        assert all(one is found[0] for one in found)

    def test_many_threads_read_what_one_would(self, folder: Path) -> None:
        prompts = [f"a {word} (city:1.{i}) in {word} | ink" for i in range(8) for word in ("oil", "ink", "rainy")]
        first, second = (Folder(folder).text() for _ in range(2))
        assert isinstance(first, TextEncoder)
        assert isinstance(second, TextEncoder)
        with ThreadPoolExecutor(4) as pool:
            cuts = [pool.submit(first.is_cut, prompt) for prompt in prompts]
            found = list(pool.map(first.embed, prompts * 2))
        assert not any(cut.result() for cut in cuts)
        for prompt, tensor in zip(prompts, found, strict=False):
            assert torch.equal(tensor, second.embed(prompt))


def vectors(count: int, width: int = 32) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(4))


class TestLearnedWords:
    @pytest.mark.parametrize("count", [1, 3])
    def test_prompts_read_as_in_diffusers_pipeline(self, encoder: TextEncoder, tmp_path: Path, count: int) -> None:
        from diffusers import StableDiffusionPipeline, UNet2DConditionModel

        save_file({"<ink-cat>": vectors(count)}, tmp_path / "cat.safetensors")
        unet = UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet")
        text = CLIPTextModel.from_pretrained(tmp_path / "model" / "text_encoder")
        theirs = StableDiffusionPipeline(None, text, tokenizer(), unet, None, None, None, requires_safety_checker=False)
        theirs.load_textual_inversion({"<ink-cat>": vectors(count)})
        before = encoder.pairs[0][1].get_input_embeddings().weight.clone()
        teach(encoder, [tmp_path / "cat.safetensors"])
        for prompt in ("a painting of <ink-cat> in oil", "<ink-cat>, <ink-cat>", "a <INK-CAT>", "a city"):
            spoken = prompt.replace("<INK-CAT>", "<ink-cat>")
            wanted, _ = theirs.encode_prompt(spoken, "cpu", 1, False)
            assert (encoder.embed(prompt) - wanted).abs().max() <= 1e-5
        after = encoder.pairs[0][1].get_input_embeddings().weight
        assert torch.equal(after[: len(before)], before)

    def test_words_may_be_weighed_blended_and_counted(self, encoder: TextEncoder, tmp_path: Path) -> None:
        save_file({"emb_params": vectors(30)}, tmp_path / "InkCat.safetensors")
        teach(encoder, [tmp_path / "InkCat.safetensors"])
        assert encoder.words["InkCat"][:2] == ["InkCat", "InkCat_1"]
        heavy = encoder.embed("a (inkcat:1.4) in oil")
        assert (heavy - encoder.embed("a inkcat in oil")).abs().max() > 1e-3
        assert torch.equal(encoder.embed("(inkcat:1)"), encoder.embed("InkCat"))
        assert torch.equal(encoder.embed("InkCat :0 | oil"), encoder.embed("oil"))
        assert encoder.is_cut("inkcat inkcat inkcat")  # ninety tokens
        assert not encoder.is_cut("inkcat inkcat")

    def test_a_word_is_not_found_within_another(self) -> None:
        words = {"cat": ["cat", "cat_1"], "<x>": ["<x>", "<x>_1"]}
        assert expanded("cat, category, (cat) Cat <x><x>", words) == (
            "cat cat_1, category, (cat cat_1) cat cat_1 <x> <x>_1<x> <x>_1"
        )

    def test_two_text_models_learn_their_own_vectors(self, tmp_path: Path) -> None:
        taught, plain = xl(tmp_path / "xl"), xl(tmp_path / "xl")
        save_file({"clip_l": vectors(2), "clip_g": vectors(2, 48)}, tmp_path / "neko.safetensors")
        teach(taught, [tmp_path / "neko.safetensors"])
        assert torch.equal(taught.read("a city").words, plain.read("a city").words)
        assert torch.equal(taught.read("a city").pooled, plain.read("a city").pooled)
        told = taught.read("a neko").words
        assert told.shape == plain.read("a neko").words.shape
        for (tokens, model), width in zip(taught.pairs, (32, 48), strict=True):
            ids = tokens.convert_tokens_to_ids(taught.words["neko"])
            assert torch.equal(model.get_input_embeddings().weight[ids], vectors(2, width))

    def test_the_pooled_words_end_where_the_prompt_ends(self, tmp_path: Path) -> None:
        """SDXL's second text model says that prompts end at token 2, and then takes the largest number for the end."""
        encoder = xl(tmp_path / "xl")
        second: Any = encoder.pairs[1][1]
        inner = getattr(second, "text_model", second)
        inner.eos_token_id = 2
        save_file({"clip_l": vectors(1), "clip_g": vectors(1, 48)}, tmp_path / "neko.safetensors")
        teach(encoder, [tmp_path / "neko.safetensors"])
        assert inner.eos_token_id == encoder.pairs[1][0].eos_token_id
        one, other = encoder.read("neko in oil").pooled, encoder.read("neko in ink").pooled
        assert (one - other).abs().max() > 1e-4  # read up to the end, not up to the word

    def test_files_of_another_family_are_refused_and_change_nothing(self, encoder: TextEncoder, tmp_path: Path) -> None:
        save_file({"<fine>": vectors(1)}, tmp_path / "fine.safetensors")
        save_file({"clip_l": vectors(1, 768), "clip_g": vectors(1, 1280)}, tmp_path / "xl.safetensors")
        save_file({"<wide>": vectors(1, 768)}, tmp_path / "wide.safetensors")
        save_file({"<long>": vectors(80)}, tmp_path / "long.safetensors")
        rows = encoder.pairs[0][1].get_input_embeddings().weight.shape[0]
        for name, message in [
            ("xl", "xl is for SDXL, with 2 text models"),
            ("wide", "for Stable Diffusion 1.x .width 768, here 32"),
            ("long", "has 80 vectors"),
        ]:
            with pytest.raises(UserError, match=message) as caught:
                teach(encoder, [tmp_path / f"{name}.safetensors"])
            assert caught.value.hint
        assert encoder.pairs[0][1].get_input_embeddings().weight.shape[0] == rows
        with pytest.raises(UserError, match=r"is for Stable Diffusion 1\.x, with 1 text model"):
            teach(xl(tmp_path / "other"), [tmp_path / "wide.safetensors"])
        save_file({"clip_l": vectors(1), "clip_g": vectors(2, 48)}, tmp_path / "uneven.safetensors")
        with pytest.raises(UserError, match="more vectors for one text model"):
            teach(encoder, [tmp_path / "uneven.safetensors"])
        with pytest.raises(UserError, match="cannot read"):
            teach(encoder, [tmp_path / "none.safetensors"])
        save_file({"<fine>": vectors(1)}, tmp_path / "again.safetensors")
        with pytest.raises(UserError, match="already"):
            teach(encoder, [tmp_path / "fine.safetensors"] * 2 + [tmp_path / "again.safetensors"])
