"""Prompts to what SDXL takes of them: the words of two text models, and one vector for the whole prompt."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from models.kept import Kept
from models.prompt import Piece
from models.text import KEPT, blended, is_cut, parts_of, tokenized, weighted

if TYPE_CHECKING:
    from torch import Tensor, nn


class Embedded(NamedTuple):
    """What one prompt comes to."""

    words: Tensor  # (1, L, D1 + D2)
    pooled: Tensor  # (1, P)


class DoubleTextEncoder:
    """Two CLIP tokenizers and text models, the second one with a projection. Thread-safe.

    Words are the states before each model's last layer, side by side, and the pooled vector is the second model's
    (Podell et al. 2023, arXiv 2307.01952). `zeros` says that no negative prompt means zeros, as SDXL was trained with
    dropped prompts, and not the empty text.

    >>> words, pooled = encoder.read("ink drawing of a cat")
    """

    def __init__(self, pairs: tuple[tuple[Any, nn.Module], tuple[Any, nn.Module]], *, zeros: bool = True) -> None:
        self.words: Mapping[str, list[str]] = {}  # that all have been taught (`inversion.teach`)
        self.pairs = pairs  # (tokenizer, model) each
        self._zeros = zeros
        self._known: Kept[str, Embedded] = Kept(KEPT)

    @property
    def models(self) -> dict[str, nn.Module]:
        """Its text models by their names in a pipeline."""
        (_, first), (_, second) = self.pairs
        return {"text_encoder": first, "text_encoder_2": second}

    def with_models(self, models: Mapping[str, nn.Module]) -> DoubleTextEncoder:
        """The same with other text models, such as copies that wear LoRAs; what it has read is its own."""
        (tokens, first), (tokens_2, second) = self.pairs
        if models["text_encoder"] is first and models["text_encoder_2"] is second:
            return self
        pairs = (tokens, models["text_encoder"]), (tokens_2, models["text_encoder_2"])
        found = DoubleTextEncoder(pairs, zeros=self._zeros)
        found.words, found._known.making = self.words, self._known.making
        return found

    def read(self, prompt: str) -> Embedded:
        """A prompt in the syntax of `models.prompt`; words past the models' length are cut off."""

        def blend() -> Embedded:
            parts = parts_of(prompt, self.words)
            shares = [part.share for part in parts]
            words, pooled = zip(*(self._read(part.pieces) for part in parts), strict=True)
            return Embedded(blended(words, shares), blended(pooled, shares))

        return self._known.get(prompt, blend)

    def read_negative(self, prompt: str) -> Embedded:
        """A prompt to lead away from; the empty one may mean zeros."""
        found = self.read(prompt)
        if prompt or not self._zeros:
            return found
        return Embedded(torch.zeros_like(found.words), torch.zeros_like(found.pooled))

    def is_cut(self, prompt: str) -> bool:
        """Whether the prompt, or a part of a blend, is longer than one of the models can read."""
        with self._known.making:  # tokenizers are for one thread at a time
            parts = parts_of(prompt, self.words)
            return any(is_cut(tokens, part.pieces) for part in parts for tokens, _ in self.pairs)

    def _read(self, pieces: tuple[Piece, ...]) -> Embedded:
        """One part of a prompt. Weights tell on the words; the pooled vector is that of the text without them."""
        words, pooled = [], []
        for tokens, model in self.pairs:
            ids, weights = tokenized(tokens, pieces)
            with torch.inference_mode():
                found = model(ids, output_hidden_states=True)
                states = found.hidden_states[-2].float()
                if weights is not None:
                    nothing = model(tokenized(tokens, (Piece(""),))[0], output_hidden_states=True)
                    empty = nothing.hidden_states[-2].float()
                    states = weighted(states, empty, weights, partial(_masked, model, ids))
            words.append(states)
            pooled.append(found[0].float())
        return Embedded(torch.cat(words, -1), pooled[-1])


def _masked(model: Any, ids: Tensor, masks: Tensor) -> Tensor:
    """The states of one prompt under each of (N, L) attention masks, (N, L, D)."""
    found: Any = model(ids.expand(len(masks), -1), attention_mask=masks, output_hidden_states=True)
    states: Tensor = found.hidden_states[-2].float()
    return states


def size_ids(size: tuple[int, int]) -> Tensor:
    """SDXL's size conditioning for pictures of (width, height) shown whole, (1, 6).

    The original's height and width, the top and left of what was cut from it, and the height and width asked for.
    Whole numbers, since bf16 knows few heights above 256.
    """
    width, height = size
    return torch.tensor([[height, width, 0, 0, height, width]])
