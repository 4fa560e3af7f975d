"""Textual inversion: words of a tokenizer and a text model that were learned from pictures.

Gal et al. 2022 (arXiv 2208.01618). A word of several vectors becomes several tokens: word, word_1, word_2 …
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from accel.errors import UserError
from models.lora import FAMILIES, FETCH, read_safetensors


def read_embedding(path: Path) -> tuple[str, Tensor]:
    """The word that a file teaches, and its vectors (n, D) as they were trained.

    Reads diffusers' `learned_embeds` ({word: vectors}) and AUTOMATIC1111's `emb_params` and `string_to_param`, from
    safetensors or from a .pt or .bin file that holds tensors alone. Where it names no word, the file's name serves.
    """
    state: Mapping[str, Any]
    if path.suffix == ".safetensors":
        state, _ = read_safetensors(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"cannot read {path} ({type(error).__name__})", hint="check the path") from error
        except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise UserError(f"{path.name} holds no plain tensors, or not all of them", hint=FETCH) from error
    word, vectors = path.stem, None
    if isinstance(state, Mapping):
        if "clip_l" in state:
            raise UserError(f"{path.name} is an embedding for SDXL", hint="take one made for this model's family")
        if "string_to_param" in state:
            word, vectors = str(state.get("name") or word), dict(state["string_to_param"]).get("*")
        elif "emb_params" in state:
            vectors = state["emb_params"]
        elif len(state) == 1:
            ((word, vectors),) = state.items()
    if not isinstance(vectors, Tensor) or vectors.dim() not in (1, 2) or not vectors.numel():
        raise UserError(f"{path.name} is not a textual inversion", hint="it has emb_params, or one word's vectors")
    if not word or re.search(r"\s", word):
        raise UserError(f"{path.name} teaches {word!r}, which is not one word", hint="rename the file")
    return word, vectors.detach().float().reshape(-1, vectors.shape[-1])


def add_embedding(tokenizer: Any, model: Any, word: str, vectors: Tensor) -> list[str]:
    """Teach a tokenizer and its text model a word, vectors (n, D); the tokens that it becomes.

    The table of tokens grows, so this belongs before the first frame or between two. UserError changes nothing.
    """
    table = model.get_input_embeddings().weight  # (tokens, D)
    if vectors.shape[1] != table.shape[1]:
        family = FAMILIES.get(vectors.shape[1], "another family")
        raise UserError(
            f"the embedding {word} is for {family} (width {vectors.shape[1]}, here {table.shape[1]})",
            hint="take one made for this model's family",
        )
    if not bool(vectors.isfinite().all()):
        raise UserError(f"the embedding {word} is broken: not finite", hint=FETCH)
    tokens = [word, *(f"{word}_{i}" for i in range(1, len(vectors)))]
    vocabulary = {known.removesuffix("</w>").lower() for known in tokenizer.get_vocab()}  # CLIP reads in lower case
    if taken := next((token for token in tokens if token.lower() in vocabulary), None):
        raise UserError(f"the model knows a word {taken} already", hint="give the embedding another name")
    tokenizer.add_tokens(tokens)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[tokenizer.convert_tokens_to_ids(tokens)] = vectors.to(rows)
    model.requires_grad_(False)
    return tokens


def expanded(prompt: str, words: Mapping[str, list[str]]) -> str:
    """A prompt in which each learned word stands as all of its tokens; `words` maps word → tokens."""
    if not words:
        return prompt
    spelled = {word.lower(): " ".join(tokens) for word, tokens in words.items()}
    known = "|".join(re.escape(word) for word in sorted(spelled, key=len, reverse=True))
    return re.sub(known, lambda found: spelled.get(found[0].lower(), found[0]), prompt, flags=re.IGNORECASE)
