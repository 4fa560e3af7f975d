"""Weights and blends in prompts: how they are read, what becomes of the embedding, and how a live change takes hold."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import MotionAdapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from accel.engine import EngineSpec, Pending, Ready
from models.load import load
from models.params import Params, Style
from models.prompt import MOST, Piece, Prompt, parse
from models.rolling import Windowed
from models.spec import MODELS
from models.state import State
from models.structure import Structure
from models.stylizer import LatentStylizer
from models.text import TextEncoder, Transition, blended, slerp, tokenized, unknown_words, weighted
from tests.folders import random_folder

SIZE = (96, 64)
MINI = MODELS["mini"].folder
MARKS = r"\()[]|:"


def pieces(prompt: str) -> list[tuple[str, float]]:
    """The pieces of a prompt that is no blend."""
    (part,) = parse(prompt).parts
    return [(piece.text, pytest.approx(piece.weight)) for piece in part.pieces]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("normal text", [("normal text", 1)]),
        ("", [("", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("unbalanced)", [("unbalanced)", 1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
             ("sky", 1.4641), (".", 1.1)],
        ),
        ("[faint]", [("faint", 1 / 1.1)]),
        ("(a: 1.3 )", [("a", 1.3)]),
        ("(a:.5)(b:+2)", [("a", 0.5), ("b", 2)]),
        ("(the [crossed) brackets]", [("the ", 1.1), ("crossed", 1), (" brackets", 1 / 1.1)]),
    ],
)  # fmt: skip
def test_brackets_weigh_words_as_a1111_has_it(prompt: str, wanted: list[tuple[str, float]]) -> None:
    """The examples of A1111's own parser among them."""
    assert pieces(prompt) == wanted


@pytest.mark.parametrize(
    "prompt",
    ["at 12:30", "ratio 2:1", "a :2", ":", "a:b:0.5", r"C:\pictures", "<lora:ink:1>"],
)
def test_a_colon_without_a_bracket_or_a_bar_is_a_colon(prompt: str) -> None:
    assert pieces(prompt) == [(prompt, 1)]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("oil :2 | ink :1", [("oil ", 2 / 3), (" ink ", 1 / 3)]),
        ("oil|ink", [("oil", 1 / 2), ("ink", 1 / 2)]),
        ("oil | ink:3", [("oil ", 1 / 4), (" ink", 3 / 4)]),
        ("a | b | c :2", [("a ", 1 / 4), (" b ", 1 / 4), (" c ", 1 / 2)]),
        ("oil :0 | ink :0", [("oil ", 1 / 2), (" ink ", 1 / 2)]),
        ("oil :-3 | ink", [("oil ", 0), (" ink", 1)]),
        ("oil | ", [("oil ", 1)]),
        (" | :5 | ink", [(" ink", 1)]),
        (r"oil \| ink", [("oil | ink", 1)]),
        (r"at 12\:30 | ink", [("at 12:30 ", 1 / 2), (" ink", 1 / 2)]),
        ("at 12:30 sharp | ink", [("at 12:30 sharp ", 1 / 2), (" ink", 1 / 2)]),
        ("(oil | ink)", [("oil | ink", 1)]),
        ("|", [("", 1)]),
        ("oil:" + "9" * 500 + " | ink", [("oil", 1), (" ink", pytest.approx(0, abs=1e-9))]),
    ],
)
def test_bars_blend_prompts_by_shares(prompt: str, wanted: list[tuple[str, float]]) -> None:
    found = [("".join(p.text for p in part.pieces), part.share) for part in parse(prompt).parts]
    assert [text for text, _ in found] == [text for text, _ in wanted]
    assert [share for _, share in found] == pytest.approx([share for _, share in wanted])


def test_weights_within_a_blend_stay_with_their_words() -> None:
    first, second = parse("(oil:1.3) painting :3 | [ink]").parts
    assert first.pieces == (Piece("oil", 1.3), Piece(" painting ", 1.0))
    assert first.share == 0.75
    assert second.pieces == (Piece(" ", 1.0), Piece("ink", 1 / 1.1))


@pytest.mark.parametrize(
    ("prompt", "weight"),
    [("(a:99)", MOST), ("(a:-1)", 0), ("((a:-1):-1)", 0), ("(a:" + "9" * 400 + ")", MOST), ("(" * 99 + "a", MOST)],
)
def test_weights_stay_in_their_range_and_it_is_said(prompt: str, weight: float) -> None:
    assert pieces(prompt) == [("a", weight)]
    assert "0 to 5" in parse(prompt).note


def test_a_factor_beyond_the_range_may_be_undone_by_another() -> None:
    assert pieces("(((a:0.1):5):5)") == [("a", 2.5)]
    assert pieces("(" * 300 + "(a:0)" + ":5)" * 300) == [("a", 0)]
    assert pieces("((a:0.1):4)") == [("a", 0.4)]


@pytest.mark.parametrize("prompt", ["(a:nan)", "(a:inf)", "(a:1.2.3)", "(a:1e9)", "(a:)", "(a:--1)", "(a:٣)"])
def test_what_is_no_number_is_text(prompt: str) -> None:
    assert pieces(prompt) == [(prompt[1:-1], 1.1)]


def test_a_blend_has_an_end_and_it_is_said() -> None:
    """Each prompt is a run of the text model while a picture waits."""
    read = parse("|".join(f"word {i}" for i in range(99)))
    assert len(read.parts) == 8
    assert "8 prompts" in read.note
    assert parse("a|b|c|d|e|f|g|h").note == ""


def test_a_bracket_left_open_is_said() -> None:
    assert "never closed" in parse("(oil painting").note
    assert parse("(oil) painting").note == parse("oil painting)").note == ""


def sound(read: Prompt) -> None:
    """What holds of every prompt that was read."""
    assert read.parts
    assert math.isclose(sum(part.share for part in read.parts), 1)
    for part in read.parts:
        assert part.share >= 0
        assert part.pieces
        assert all(0 <= piece.weight <= MOST for piece in part.pieces)  # NaN fails as well


anything = st.text(st.characters(exclude_categories=()), max_size=200)
marked = st.text(st.sampled_from([*MARKS, "1", ".", "-", " ", "a", "é", "\0", "\n", "\ud800"]), max_size=200)


@settings(deadline=None)
@given(anything | marked)
def test_every_text_is_read(prompt: str) -> None:
    sound(parse(prompt))


@settings(deadline=None)
@given(anything)
def test_text_without_marks_is_one_neutral_piece(prompt: str) -> None:
    plain = prompt.translate({ord(mark): None for mark in r"\()[]|"})
    assert parse(plain).parts[0].pieces == (Piece(plain),)
    assert parse(plain).text == plain


@settings(deadline=None)
@given(anything | marked)
def test_every_text_can_be_said_with_escapes(text: str) -> None:
    escaped = "".join("\\" + sign if sign in MARKS else sign for sign in text)
    assert parse(escaped).parts[0].pieces == (Piece(text),)


HOSTILE = [
    "(",
    ")",
    "[",
    "(a",
    "[a",
    "(a:",
    "(a:1",
    ": ",
    ":9",
    "9",
    "|",
    "a|",
    "(a:5)",
    "\\",
    "\\(",
    "(]",
    ":1|",
    "\0",
]


@pytest.mark.parametrize("bit", HOSTILE)
def test_hostile_prompts_are_read_in_no_time(bit: str) -> None:
    for prompt in (bit * 2000, "(" * 1000 + bit * 1000, ":" + bit * 2000, bit * 1000 + ")" * 1000):
        prompt = prompt[:2000]
        took = []
        for _ in range(3):  # the quickest: another thread of the same core can take half of it
            started = time.thread_time()
            sound(parse(prompt))
            took.append(time.thread_time() - started)
        assert min(took) < 0.5


def test_unknown_words_are_looked_for_without_marks() -> None:
    known = {"oil", "painting", "ink"}
    assert unknown_words("(oil:1.3) [painting] :2 | ((ink))", known) == []
    assert unknown_words("(zorp:1.3) oil | flim", known) == ["zorp", "flim"]
    assert unknown_words("paint(ing) oil", known) == []


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    """The shipped model's."""
    return TextEncoder(
        CLIPTokenizer.from_pretrained(MINI / "tokenizer"),
        CLIPTextModel.from_pretrained(MINI / "text_encoder", torch_dtype=torch.float32).eval().requires_grad_(False),
    )


def reference(encoder: TextEncoder, prompt: str) -> Tensor:
    """The last hidden state of a prompt without any marks, straight from the libraries."""
    tokenizer, model = encoder._tokenizer, encoder._model
    length = tokenizer.model_max_length
    read = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        found: Tensor = model(read.input_ids)[0]
    return found


PLAIN = ["oil painting", "", "a watercolour of a rainy city, at 12:30", "ink " * 60, "Ünknöwn 你好 🙂", "a\tb\n c"]


class TestEmbedding:
    @pytest.mark.parametrize("prompt", PLAIN)
    def test_a_plain_prompt_is_what_it_was_to_the_bit(self, encoder: TextEncoder, prompt: str) -> None:
        assert torch.equal(encoder.embed(prompt), reference(encoder, prompt))

    @pytest.mark.parametrize(
        "prompt",
        ["(oil:1.0) painting", "(oil painting:1)", "oil (painting:1.)", "oil painting |", "[(oil)] painting"],
    )
    def test_neutral_marks_leave_nothing_behind(self, encoder: TextEncoder, prompt: str) -> None:
        wanted = reference(encoder, "oil painting")
        assert torch.equal(encoder.embed(prompt), wanted)

    @pytest.mark.parametrize("text", ["oil painting", "", "ink " * 60])
    def test_tokens_of_weighted_words_are_those_of_plain_ones(self, encoder: TextEncoder, text: str) -> None:
        plain, none = tokenized(encoder._tokenizer, [Piece(text)])
        marked, weights = tokenized(encoder._tokenizer, [Piece(text, 1.5)])
        assert torch.equal(marked, plain)
        assert none is None
        assert weights is not None
        assert weights.shape == (1, *plain.shape[1:], 1)

    def test_words_before_stay_and_the_rest_moves_in_proportion(self, encoder: TextEncoder) -> None:
        plain, empty = encoder.embed("oil painting, warm, of a city"), encoder.embed("")
        found = {w: encoder.embed(f"oil painting, (warm:{w}), of a city") for w in (0, 0.5, 0.99, 1.5, 2)}
        at = 4  # behind the start, oil, painting and a comma
        assert encoder._tokenizer("oil painting, warm,").input_ids[at] == encoder._tokenizer("warm").input_ids[1]
        torch.testing.assert_close(found[2][:, :at], plain[:, :at])
        torch.testing.assert_close(found[0][:, at], empty[:, at])
        torch.testing.assert_close(found[2] - plain, 2 * (found[1.5] - plain))
        torch.testing.assert_close(plain - found[0], found[2] - plain)
        torch.testing.assert_close(found[0.99], plain, atol=0.05, rtol=0)

    def test_words_behind_follow_what_a_mask_says(self) -> None:
        """Three words, the first of weight 2 and the last of 0.5, with a text model that adds up what it sees."""
        values = torch.tensor([1.0, 10.0, 100.0])

        def states(masks: Tensor) -> Tensor:
            return (masks * values).cumsum(-1)[..., None]

        weights = torch.tensor([2.0, 1.0, 0.5])[None, :, None]
        found = weighted(states(torch.ones(1, 3)), torch.zeros(1, 3, 1), weights, states)
        assert found.flatten().tolist() == [2, 12, 0.5 * 111 + 1]

    def test_a_great_many_weights_cost_no_more_than_a_few(self, encoder: TextEncoder) -> None:
        rows: list[int] = []
        told = encoder._model.register_forward_pre_hook(
            lambda module, args: rows.append(len(args[0])),
        )
        try:
            encoder.embed(" ".join(f"(ink:{1 + i / 100})" for i in range(1, 22)))
            encoder.embed(" ".join(f"(oil:{1 + i / 100})" for i in range(1, 6)))
        finally:
            told.remove()
        assert max(rows) <= 8

    def test_a_blend_of_two_is_the_point_between(self, encoder: TextEncoder) -> None:
        oil, ink = encoder.embed("oil painting"), encoder.embed("ink")
        assert torch.equal(encoder.embed("oil painting :3 | ink :1"), slerp(oil, ink, 0.25))
        assert torch.equal(encoder.embed("oil painting | ink :0"), oil)
        assert torch.equal(encoder.embed("oil painting :0 | ink"), ink)
        same = encoder.embed("oil painting :2 | oil painting :1")
        torch.testing.assert_close(same, oil)

    def test_what_was_read_is_remembered(self, encoder: TextEncoder) -> None:
        assert encoder.embed("(oil:1.2) painting | ink") is encoder.embed("(oil:1.2) painting | ink")
        for i in range(300):
            encoder.embed(f"oil :{i} | ink")
        assert len(encoder._known) <= 128

    def test_long_prompts_are_cut_and_marks_take_no_room(self, encoder: TextEncoder) -> None:
        length = encoder._tokenizer.model_max_length
        assert not encoder.is_cut("(ink:1.2) " * (length - 2))
        assert encoder.is_cut("(ink:1.2) " * (length - 1))
        assert encoder.is_cut("oil | " + "ink " * (length - 1))
        assert not encoder.is_cut("ink " * (length - 2) + "|" + "ink " * (length - 2))
        assert encoder.embed("(ink:1.2) " * 500).shape == encoder.embed("").shape

    @given(anything | marked)
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def test_every_text_has_an_embedding(self, encoder: TextEncoder, prompt: str) -> None:
        found = encoder.embed(prompt)
        assert found.shape == encoder.embed("").shape
        assert found.isfinite().all()
        encoder.is_cut(prompt)


class TestSlerp:
    def test_golden(self) -> None:
        a, b = torch.tensor([1.0, 0, 0]), torch.tensor([0, 2.0, 0])
        torch.testing.assert_close(slerp(a, b, 0.5), torch.tensor([math.sqrt(0.5), math.sqrt(2), 0]))

    def test_both_ends_are_exact_and_the_way_is_even(self) -> None:
        a, b = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
        assert torch.equal(slerp(a, b, 0), a)
        assert torch.equal(slerp(a, b, 1), b)
        a, b = a / a.norm(), b / b.norm()
        points = [slerp(a, b, i / 8) for i in range(9)]
        steps = [float((y - x).norm()) for x, y in pairwise(points)]
        assert steps == pytest.approx([steps[0]] * 8, rel=1e-3)

    @pytest.mark.parametrize("other", [1.0, -1.0, 3.0, 0.0])
    def test_where_there_is_no_arc_it_is_a_line(self, other: float) -> None:
        a = torch.randn(1, 5, 8)
        torch.testing.assert_close(slerp(a, other * a, 0.25), a * (0.75 + 0.25 * other))

    def test_a_blend_of_many_weighs_as_told_where_all_are_near(self) -> None:
        base = torch.randn(1, 5, 8)
        parts = [base + 1e-3 * torch.randn(1, 5, 8) for _ in range(4)]
        shares = [0.1, 0.2, 0.3, 0.4]
        wanted = sum(share * part for share, part in zip(shares, parts, strict=True))
        torch.testing.assert_close(blended(parts, shares), wanted)
        assert blended(parts[:2], [0.0, 0.0]) is parts[0]


class TestTransition:
    def test_it_starts_and_ends_exactly_and_never_jumps(self) -> None:
        noise = torch.Generator().manual_seed(0)
        start = torch.randn(1, 5, 8, generator=noise), torch.randn(1, 30, generator=noise)
        target = torch.randn(1, 5, 8, generator=noise), torch.randn(1, 30, generator=noise)
        way = Transition(start, target, 8)
        assert all(torch.equal(a, b) for a, b in zip(way.at(0), start, strict=True))
        assert way.at(8) is target
        assert way.at(99) is target
        for k in range(2):
            steps = [float((way.at(i + 1)[k] - way.at(i)[k]).norm()) for i in range(8)]
            assert max(steps) <= 1.6 / 8 * float((target[k] - start[k]).norm())

    @pytest.mark.parametrize("frames", [0, 1])
    def test_no_frames_and_one_are_at_once(self, frames: int) -> None:
        target = (torch.ones(3),)
        assert Transition((torch.zeros(3),), target, frames).at(1) is target


class Watched:
    """An engine that notes what it is given."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.given: list[tuple[Tensor, ...]] = []

    @property
    def spec(self) -> EngineSpec:
        spec: EngineSpec = self.engine.spec
        return spec

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.given.append(tuple(tensor.clone() for tensor in tensors))
        output: tuple[Tensor, ...] = self.engine(*tensors)
        return output

    def launch(self, *tensors: Tensor) -> Pending:
        return Ready(self(*tensors))

    @property
    def words(self) -> list[Tensor]:
        """The embedding of every call."""
        return [tensors[2] for tensors in self.given]


@pytest.fixture(scope="module")
def stylizer(tmp_path_factory: pytest.TempPathFactory) -> LatentStylizer:
    return load(str(random_folder(tmp_path_factory.mktemp("model"), "ip2p")), SIZE, engine="torch")


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> LatentStylizer:
    folder = random_folder(tmp_path_factory.mktemp("windowed"), "sd")
    torch.manual_seed(1)
    options = {"motion_num_attention_heads": 4, "motion_norm_num_groups": 8, "motion_max_seq_length": 12}
    adapter = MotionAdapter(block_out_channels=(32, 64), motion_layers_per_block=1, **options)
    adapter.save_pretrained(folder / "motion_adapter")
    return load(str(folder), SIZE, engine="torch", structure=Structure(window=4))


def watched(stylizer: LatentStylizer) -> tuple[LatentStylizer, Watched]:
    unet = Watched(stylizer.networks.unet)
    return LatentStylizer(replace(stylizer.networks, unet=unet)), unet


def picture(seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)


def params(prompt: str = "oil painting", frames: int = 4, **style: object) -> Params:
    return Params(style=Style.model_validate({"prompt": prompt, "blend_frames": frames, **style}))


def seen_of(state: State) -> list[int]:
    """Frames in the stream's window, per row."""
    (companion,) = state.calls.companions
    assert isinstance(companion, Windowed)
    return companion.rolling.seen


def play(model: LatentStylizer, state: State, settings: Params, frames: int) -> list[NDArray[np.uint8]]:
    return [model.step(state, picture(), settings).image() for _ in range(frames)]


class TestLiveChange:
    def test_the_prompt_goes_over_in_so_many_frames_and_arrives_exactly(self, stylizer: LatentStylizer) -> None:
        model, unet = watched(stylizer)
        before, after = params(), params("ink")
        state = model.open(before)
        play(model, state, before, 2)
        pictures = play(model, state, after, 6)
        oil, ink = (model.networks.text.embed(prompt) for prompt in ("oil painting", "ink"))
        wanted = [oil, oil, *(slerp(oil, ink, i / 4) for i in (1, 2, 3)), ink, ink, ink]
        assert all(torch.equal(found, want) for found, want in zip(unet.words, wanted, strict=True))
        (fresh,) = play(model, model.open(after), after, 1)
        assert [np.array_equal(found, fresh) for found in pictures] == [False] * 3 + [True] * 3
        assert state.transition is None

    def test_nothing_is_compiled_for_it(self, stylizer: LatentStylizer, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every call fits the engine that there is."""
        model, unet = watched(stylizer)
        monkeypatch.setattr(type(stylizer.networks.unet), "__init__", pytest.fail)
        state = model.open(params())
        for prompt in ("oil painting", "(ink:1.4)", "ink | oil :3", "ink " * 200):
            play(model, state, params(prompt), 3)
        shapes = {tuple((tuple(tensor.shape), tensor.dtype) for tensor in given) for given in unet.given}
        assert len(shapes) == 1

    @pytest.mark.parametrize("frames", [0, 1])
    def test_without_frames_it_is_there_at_once(self, stylizer: LatentStylizer, frames: int) -> None:
        model, unet = watched(stylizer)
        state = model.open(params(frames=frames))
        play(model, state, params(frames=frames), 1)
        play(model, state, params("ink", frames), 1)
        assert torch.equal(unet.words[-1], model.networks.text.embed("ink"))

    def test_a_new_prompt_on_the_way_goes_on_from_there(self, stylizer: LatentStylizer) -> None:
        model, unet = watched(stylizer)
        state = model.open(params())
        for prompt, frames in (("oil painting", 1), ("ink", 2), ("rainy city", 5)):
            play(model, state, params(prompt), frames)
        oil, ink, city = (model.networks.text.embed(prompt) for prompt in ("oil painting", "ink", "rainy city"))
        there = slerp(oil, ink, 0.5)
        torch.testing.assert_close(unet.words[2], there)
        assert all(torch.equal(unet.words[2 + i], slerp(there, city, i / 4)) for i in range(1, 5))
        assert torch.equal(unet.words[-1], city)

    def test_other_settings_on_the_way_do_not_hold_it_up(self, stylizer: LatentStylizer) -> None:
        model, unet = watched(stylizer)
        state = model.open(params())
        play(model, state, params(), 1)
        for i in range(4):
            play(model, state, params("ink", seed=i), 1)
        assert torch.equal(unet.words[-1], model.networks.text.embed("ink"))

    def test_the_negative_prompt_goes_over_too(self, stylizer: LatentStylizer) -> None:
        model, unet = watched(stylizer)
        before, after = params(guidance=3.0), params(guidance=3.0, negative="ink")
        state = model.open(before)
        play(model, state, before, 1)
        play(model, state, after, 4)
        empty, ink = (model.networks.text.embed(prompt) for prompt in ("", "ink"))
        assert torch.equal(unet.words[3], slerp(empty, ink, 0.25))
        assert torch.equal(unet.words[-1], ink)
        assert all(torch.equal(words, unet.words[0]) for words in unet.words[::2])

    def test_two_streams_go_their_own_ways(self, stylizer: LatentStylizer) -> None:
        a, b = (params("oil painting"), params("ink")), (params("ink", 7), params("rainy city", 7))

        def alone(before: Params, after: Params) -> list[NDArray[np.uint8]]:
            state = stylizer.open(before)
            return play(stylizer, state, before, 1) + play(stylizer, state, after, 8)

        wanted = alone(*a), alone(*b)
        states = stylizer.open(a[0]), stylizer.open(b[0])
        for i in range(9):
            for state, told, want in zip(states, (a, b), wanted, strict=True):
                (found,) = play(stylizer, state, told[i > 0], 1)
                assert np.array_equal(found, want[i])

    def test_the_window_of_frames_lives_on_through_it(self, windowed: LatentStylizer) -> None:
        for frames, seen in ((4, 9), (0, 6)):
            state = windowed.open(params(frames=frames))
            play(windowed, state, params(frames=frames), 3)
            play(windowed, state, params("ink", frames), 6)
            assert seen_of(state) == [seen]

    def test_a_change_of_more_than_the_prompt_starts_the_window_anew(self, windowed: LatentStylizer) -> None:
        state = windowed.open(params())
        play(windowed, state, params(), 3)
        play(windowed, state, params("ink", seed=9), 2)
        assert seen_of(state) == [2]
        assert state.transition is not None

    def test_a_cut_does_not_hold_it_up(self, stylizer: LatentStylizer) -> None:
        model, unet = watched(stylizer)
        state = model.open(params())
        play(model, state, params(), 1)
        for _ in range(4):
            model.forget(state)
            play(model, state, params("ink"), 1)
        assert torch.equal(unet.words[-1], model.networks.text.embed("ink"))


@pytest.fixture(scope="module")
def mini() -> LatentStylizer:
    return load("mini", SIZE, engine="torch", as_bytes=False)


@pytest.fixture(scope="module")
def photo() -> Tensor:
    from skimage import data

    return torch.from_numpy(data.astronaut()[20:84, 180:276].copy()).permute(2, 0, 1)[None] / 255


class TestShippedModel:
    def painted(self, model: LatentStylizer, photo: Tensor, prompt: str) -> Tensor:
        settings = Params(style=Style(prompt=prompt))
        with torch.inference_mode():
            return model.stylize(model.open(settings), photo, settings).clone()

    def test_a_neutral_weight_paints_the_same_picture(self, mini: LatentStylizer, photo: Tensor) -> None:
        plain = self.painted(mini, photo, "warm oil painting")
        assert torch.equal(self.painted(mini, photo, "(warm:1.0) oil painting"), plain)
        assert not torch.equal(self.painted(mini, photo, "(warm:1.1) oil painting"), plain)

    @pytest.mark.parametrize(
        ("word", "most"), [("warm", 1.75), ("dark", 3), ("monochrome", 1)]
    )  # above, the model has no more of it to give
    def test_more_weight_is_more_of_it(self, mini: LatentStylizer, photo: Tensor, word: str, most: float) -> None:
        """From hardly other than without the word, on and on."""

        def much(prompt: str) -> float:
            picture = self.painted(mini, photo, prompt)
            measures = {
                "warm": picture[:, 0] - picture[:, 2],
                "dark": -picture,
                "monochrome": -picture.std(1),
            }
            return float(measures[word].mean())

        weights = [i / 4 for i in range(round(4 * most) + 1)]
        found = [much(f"({word}:{weight}) watercolour") for weight in weights]
        assert found == sorted(found)
        assert found[4] - found[0] > 0.1
        assert abs(much("watercolour") - found[0]) < 0.01
        assert most == 1 or found[-1] - found[4] > 0.02

    def test_shares_lead_from_one_picture_to_the_other(self, mini: LatentStylizer, photo: Tensor) -> None:
        pictures = [self.painted(mini, photo, f"oil painting :{8 - i} | ink :{i}") for i in (0, 2, 4, 6, 8)]
        assert torch.equal(pictures[0], self.painted(mini, photo, "oil painting"))
        assert torch.equal(pictures[-1], self.painted(mini, photo, "ink"))
        away = [float((picture - pictures[0]).abs().mean()) for picture in pictures]
        left = [float((picture - pictures[-1]).abs().mean()) for picture in pictures]
        assert away == sorted(away)
        assert left == sorted(left, reverse=True)

    def test_advice_knows_the_marks(self, mini: LatentStylizer) -> None:
        def advice(prompt: str) -> str:
            return mini.advice(Params(style=Style(prompt=prompt)))

        assert advice("(oil:1.3) painting :2 | [ink]") == ""
        assert "zorblax" in advice("(zorblax:1.2) watercolour")
        assert "0 to 5" in advice("(oil:9) painting")
        assert "never closed" in advice("(oil painting")
        assert "longer" in advice("oil | " + "ink " * 60)


def test_the_setting_is_off_unless_asked_for() -> None:
    assert Params().style.blend_frames == 0


def test_a_folder_of_the_real_classes_reads_weights(tmp_path: Path) -> None:
    model = load(str(random_folder(tmp_path, "sd")), SIZE, engine="torch")
    assert model.networks.text.embed("(oil:1.3) painting").shape == (1, 77, 32)
