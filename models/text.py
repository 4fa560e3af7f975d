"""Prompts to embeddings, each prompt once, and the way from one embedding to another."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from models.inversion import expanded
from models.kept import Kept
from models.prompt import Part, Piece, parse

if TYPE_CHECKING:
    from torch import Tensor, nn

KEPT = 128  # embeddings remembered; a live prompt slider stays under it
DISTINCT = 8  # weights of one prompt that words behind follow, each a row for the text model; above, none do
PARALLEL = 0.9995  # cosine from which a straight line replaces the arc, as AnimateDiff's prompt travel has it


class TextEncoder:
    """A CLIP tokenizer and text model; `embed` gives the last hidden state, as Stable Diffusion takes it. Thread-safe.

    `words` are those that both have been taught (`inversion.teach`), with the tokens that each becomes.
    """

    def __init__(self, tokenizer: Any, model: nn.Module) -> None:
        self.words: Mapping[str, list[str]] = {}
        self._tokenizer = tokenizer
        self._model = model
        self._known: Kept[Hashable, Tensor] = Kept(KEPT)

    @property
    def pairs(self) -> tuple[tuple[Any, nn.Module], ...]:
        """Tokenizers and text models."""
        return ((self._tokenizer, self._model),)

    @property
    def models(self) -> dict[str, nn.Module]:
        """Its text models by their names in a pipeline."""
        return {"text_encoder": self._model}

    def with_models(self, models: Mapping[str, nn.Module]) -> TextEncoder:
        """The same with other text models, such as copies that wear LoRAs; what it has read is its own."""
        model = models["text_encoder"]
        if model is self._model:
            return self
        found = TextEncoder(self._tokenizer, model)
        found.words, found._known.making = self.words, self._known.making  # one thread at a time for tokenizers
        return found

    def embed(self, prompt: str) -> Tensor:
        """(1, L, D) of a prompt in the syntax of `models.prompt`; words past the model's length are cut off.

        Marks that come to nothing leave exactly the embedding of the words alone.
        """

        def blend() -> Tensor:
            parts = parts_of(prompt, self.words)
            return blended([self._read(part.pieces) for part in parts], [part.share for part in parts])

        return self._known.get(prompt, blend)

    def is_cut(self, prompt: str) -> bool:
        """Whether the prompt, or a part of a blend, is longer than the model can read."""
        with self._known.making:  # tokenizers are for one thread at a time
            return any(is_cut(self._tokenizer, part.pieces) for part in parts_of(prompt, self.words))

    def _read(self, pieces: tuple[Piece, ...]) -> Tensor:
        """(1, L, D) of one part."""

        def run() -> Tensor:
            ids, weights = tokenized(self._tokenizer, pieces)

            def states(masks: Tensor | None = None) -> Tensor:
                rows = 1 if masks is None else len(masks)
                found: Tensor = self._model(ids.expand(rows, -1), attention_mask=masks)[0].float()
                return found

            with torch.inference_mode():
                if weights is None:
                    return states()
                return weighted(states(), self._read((Piece(""),)), weights, states)

        return self._known.get(pieces, run)


def parts_of(prompt: str, words: Mapping[str, list[str]]) -> tuple[Part, ...]:
    """The parts of a prompt, in which each learned word stands as all of its tokens."""
    parts = parse(prompt).parts
    if not words:
        return parts
    return tuple(
        replace(part, pieces=tuple(replace(piece, text=expanded(piece.text, words)) for piece in part.pieces))
        for part in parts
    )


def tokenized(tokenizer: Any, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor | None]:
    """Token ids (1, L) of one part, cut and padded to the model's length, and their weights (1, L, 1).

    Weights are None where all are neutral, and the ids then the tokenizer's own. Otherwise pieces are read one by one,
    as A1111 does, so a mark inside a word splits it.
    """
    length = tokenizer.model_max_length
    if all(piece.weight == 1 for piece in pieces):
        text = valid("".join(piece.text for piece in pieces))
        read = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return read.input_ids, None
    read = tokenizer([valid(piece.text) for piece in pieces], add_special_tokens=False).input_ids
    words = [(id, piece.weight) for piece, ids in zip(pieces, read, strict=True) for id in ids][: length - 2]
    rest = length - 2 - len(words)
    ids = [tokenizer.bos_token_id, *(id for id, _ in words), tokenizer.eos_token_id, *[tokenizer.pad_token_id] * rest]
    weights = [1.0, *(weight for _, weight in words), 1.0, *[1.0] * rest]
    return torch.tensor([ids]), torch.tensor(weights)[None, :, None]


def is_cut(tokenizer: Any, pieces: Sequence[Piece]) -> bool:
    """Whether a part has more tokens than the model reads, the two at its ends included."""
    read = tokenizer([valid(piece.text) for piece in pieces], add_special_tokens=False).input_ids
    return bool(sum(map(len, read)) + 2 > tokenizer.model_max_length)


def weighted(words: Tensor, empty: Tensor, weights: Tensor, masked: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Hidden states (1, L, D) led away from those without the weighted words: without + w·(with - without).

    `empty` is the empty prompt's (1, L, D), `weights` are (1, L, 1), and `masked` gives the prompt's states under each
    of (N, L) attention masks. At a weighted word "without" is the empty prompt, as in ComfyUI
    (`ClipTokenWeightEncoder`); at words behind it, which have read it, it is the prompt with the word masked, as
    compel weighs words down, here carried on in a straight line above 1. A1111 multiplies the word's own states alone
    and restores their mean: where the words behind carry the meaning, as in the shipped model, that does nothing, and
    a mean may be near zero (-0.003 there, at a spread of 0.97).
    """
    found = torch.where(weights == 1, words, torch.lerp(empty, words, weights))
    values = sorted({*weights.flatten().tolist()} - {1.0})
    if masked and 0 < len(values) <= DISTINCT:
        others = torch.stack([weights[0, :, 0] != value for value in values])  # (N, L)
        for value, kept, without in zip(values, others, masked(others.long()), strict=True):
            found = found + (value - 1) * kept[:, None] * (words - without)
    return found


def blended(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Embeddings blended by shares, each added along the arc to it (StreamDiffusion's slerp; of two, exactly that)."""
    found, total = parts[0], shares[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        total += share
        found = slerp(found, part, share / total if total else 0.0)
    return found


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The point `t` of the way along the arc from one tensor to another (Shoemake 1985), each taken as one vector.

    Exact at both ends; lengths go over as well. Where there is no arc to speak of, a straight line.
    """
    if t <= 0:
        return a
    if t >= 1:
        return b
    cosine = float((a * b).sum() / (a.norm() * b.norm()))
    if not abs(cosine) < PARALLEL:
        return torch.lerp(a, b, t)
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


@dataclass(frozen=True, slots=True)
class Transition:
    """Embeddings on their way to others over so many frames, each along its own arc.

    >>> Transition((torch.zeros(2),), (torch.ones(2),), frames=4).at(1)
    (tensor([0.2500, 0.2500]),)
    """

    start: tuple[Tensor, ...]
    target: tuple[Tensor, ...]
    frames: int

    def at(self, frame: int) -> tuple[Tensor, ...]:
        """Where they are `frame` frames on: exactly the start at 0, exactly the target from `frames` on."""
        if frame >= self.frames:
            return self.target
        return tuple(slerp(a, b, frame / self.frames) for a, b in zip(self.start, self.target, strict=True))


def valid(text: str) -> str:
    """Text that tokenizers take: half characters, which a command line may hold, become question marks."""
    return text.encode("utf-8", "replace").decode()


def unknown_words(prompt: str, words: set[str]) -> list[str]:
    """Words of three letters and more that a small vocabulary does not hold; the marks of the prompt do not count."""
    return [w for w in re.findall(r"[^\W\d_]{3,}", parse(prompt).text.lower()) if w not in words]
