"""Prompts to embeddings, each prompt once."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

KEPT = 64  # embeddings remembered; a live prompt slider stays under it


class TextEncoder:
    """A CLIP tokenizer and text model; `embed` gives the last hidden state, as Stable Diffusion takes it."""

    def __init__(self, tokenizer: Any, model: nn.Module) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def embed(self, prompt: str) -> Tensor:
        """(1, L, D) of a prompt; words past the model's length are cut off."""
        if prompt not in self._known:
            ids = self._tokenizer(
                prompt,
                padding="max_length",
                max_length=self._tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            with torch.inference_mode():
                self._known[prompt] = self._model(ids)[0].float()
        self._known.move_to_end(prompt)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return self._known[prompt]

    def is_cut(self, prompt: str) -> bool:
        """Whether the prompt is longer than the model can read."""
        return bool(len(self._tokenizer(prompt).input_ids) > self._tokenizer.model_max_length)


def unknown_words(prompt: str, words: set[str]) -> list[str]:
    """Words of three letters and more that a small vocabulary does not hold."""
    return [w for w in re.findall(r"[^\W\d_]{3,}", prompt.lower()) if w not in words]
