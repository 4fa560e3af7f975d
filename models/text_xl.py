"""Prompts to what SDXL takes of them: the words of two text models, and one vector for the whole prompt."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from models.prompt import Piece, parse
from models.text import KEPT, blended, is_cut, tokenized, weighted

if TYPE_CHECKING:
    from torch import Tensor, nn


class Embedded(NamedTuple):
    """What one prompt comes to."""

    words: Tensor  # (1, L, D1 + D2)
    pooled: Tensor  # (1, P)


class DoubleTextEncoder:
    """Two CLIP tokenizers and text models, the second one with a projection.

    Words are the states before each model's last layer, side by side, and the pooled vector is the second model's
    (Podell et al. 2023, arXiv 2307.01952). `zeros` says that no negative prompt means zeros, as SDXL was trained with
    dropped prompts, and not the empty text.

    >>> words, pooled = encoder.read("ink drawing of a cat")
    """

    def __init__(self, pairs: tuple[tuple[Any, nn.Module], tuple[Any, nn.Module]], *, zeros: bool = True) -> None:
        self._pairs = pairs  # (tokenizer, model) each
        self._zeros = zeros
        self._known: OrderedDict[str, Embedded] = OrderedDict()

    def read(self, prompt: str) -> Embedded:
        """A prompt in the syntax of `models.prompt`; words past the models' length are cut off."""
        found = self._known.get(prompt)
        if found is None:
            parts = parse(prompt).parts
            shares = [part.share for part in parts]
            words, pooled = zip(*(self._read(part.pieces) for part in parts), strict=True)
            found = Embedded(blended(words, shares), blended(pooled, shares))
        self._known[prompt] = found
        self._known.move_to_end(prompt)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return found

    def read_negative(self, prompt: str) -> Embedded:
        """A prompt to lead away from; the empty one may mean zeros."""
        found = self.read(prompt)
        if prompt or not self._zeros:
            return found
        return Embedded(torch.zeros_like(found.words), torch.zeros_like(found.pooled))

    def is_cut(self, prompt: str) -> bool:
        """Whether the prompt, or a part of a blend, is longer than one of the models can read."""
        return any(is_cut(tokens, part.pieces) for part in parse(prompt).parts for tokens, _ in self._pairs)

    def _read(self, pieces: tuple[Piece, ...]) -> Embedded:
        """One part of a prompt. Weights tell on the words; the pooled vector is that of the text without them."""
        words, pooled = [], []
        for tokens, model in self._pairs:
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
