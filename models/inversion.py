"""Textual inversion: words of a tokenizer and a text model that were learned from pictures.

Gal et al. 2022 (arXiv 2208.01618). A word of several vectors becomes several tokens: word, word_1, word_2 …
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.errors import UserError
from models.tensor_file import FAMILIES, FETCH, read_safetensors

if TYPE_CHECKING:
    from models.text import TextEncoder
    from models.text_xl import DoubleTextEncoder

MOST = 64  # vectors of one word; 75 tokens are all that a prompt has
TWO = ("clip_l", "clip_g")  # under which names SDXL's two text models find theirs


def teach(text: TextEncoder | DoubleTextEncoder, files: Sequence[str | Path]) -> None:
    """Teach an encoder's text models, which must be its own, the words of these files; before its first prompt.

    UserError for the first file that cannot be read, is for another family, or teaches a word that is known.
    """
    known = dict(text.words)
    for file in dict.fromkeys(map(str, files)):
        word, learned = read_embeddings(Path(file).expanduser())
        if len(learned) != len(text.pairs):
            made_for = "SDXL" if len(learned) > 1 else FAMILIES.get(learned[0].shape[1], "another family")
            raise UserError(
                f"the embedding {word} is for {made_for}, with {len(learned)} text model{'s' * (len(learned) > 1)}",
                hint="take one made for this model's family",
            )
        for (tokenizer, model), vectors in zip(text.pairs, learned, strict=True):
            check_fit(tokenizer, model, word, vectors)
        for (tokenizer, model), vectors in zip(text.pairs, learned, strict=True):
            known[word] = add_embedding(tokenizer, model, word, vectors)
    text.words = known


def read_embeddings(path: Path) -> tuple[str, tuple[Tensor, ...]]:
    """The word that a file teaches, and its vectors (n, D) for each text model: one, or SDXL's two."""
    if path.suffix == ".safetensors":
        state, _ = read_safetensors(path)
        if state.keys() >= {*TWO}:
            both = tuple(state[name] for name in TWO)
            if any(t.dim() not in (1, 2) or not t.numel() for t in both):
                raise UserError(f"{path.name} is not a textual inversion", hint=f"{' and '.join(TWO)} hold no vectors")
            both = tuple(t.float().reshape(-1, t.shape[-1]) for t in both)
            if len(both[0]) != len(both[1]):
                raise UserError(f"{path.name} has more vectors for one text model than for the other", hint=FETCH)
            return one_word(path, path.stem), both
    word, vectors = read_embedding(path)
    return word, (vectors,)


def one_word(path: Path, word: str) -> str:
    """The word, when prompts can use it."""
    if not word or re.search(r"\s", word):
        raise UserError(f"{path.name} teaches {word!r}, which is not one word", hint="rename the file")
    return word


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
    word = one_word(path, word)
    return word, vectors.detach().float().reshape(-1, vectors.shape[-1])


def check_fit(tokenizer: Any, model: Any, word: str, vectors: Tensor) -> list[str]:
    """The tokens that a word of vectors (n, D) would become; UserError where they cannot be taught."""
    width = model.get_input_embeddings().weight.shape[1]
    if vectors.shape[1] != width:
        family = FAMILIES.get(vectors.shape[1], "another family")
        raise UserError(
            f"the embedding {word} is for {family} (width {vectors.shape[1]}, here {width})",
            hint="take one made for this model's family",
        )
    if not bool(vectors.isfinite().all()):
        raise UserError(f"the embedding {word} is broken: not finite", hint=FETCH)
    if len(vectors) > MOST:
        raise UserError(f"the embedding {word} has {len(vectors)} vectors", hint=f"up to {MOST} go into a prompt")
    tokens = [word, *(f"{word}_{i}" for i in range(1, len(vectors)))]
    vocabulary = {known.removesuffix("</w>").lower() for known in tokenizer.get_vocab()}  # CLIP reads in lower case
    if taken := next((token for token in tokens if token.lower() in vocabulary), None):
        raise UserError(f"the model knows a word {taken} already", hint="give the embedding another name")
    return tokens


def add_embedding(tokenizer: Any, model: Any, word: str, vectors: Tensor) -> list[str]:
    """Teach a tokenizer and its text model a word, vectors (n, D); the tokens that it becomes.

    The table of tokens grows, so this belongs before the first frame or between two. UserError changes nothing.
    """
    tokens = check_fit(tokenizer, model, word, vectors)
    tokenizer.add_tokens(tokens)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight  # (tokens, D)
        rows[tokenizer.convert_tokens_to_ids(tokens)] = vectors.to(rows)
    model.requires_grad_(False)
    # Old configurations say that a prompt ends at token 2, and then its largest number is taken for the end: a learned
    # word has a larger one.
    inner = getattr(model, "text_model", model)
    if getattr(inner, "eos_token_id", None) == 2:
        inner.eos_token_id = tokenizer.eos_token_id
    return tokens


def expanded(prompt: str, words: Mapping[str, list[str]]) -> str:
    """A prompt in which each learned word stands as all of its tokens; `words` maps word → tokens."""
    if not words:
        return prompt
    spelled = {word.lower(): " ".join(tokens) for word, tokens in words.items()}
    known = "|".join(whole(word) for word in sorted(spelled, key=len, reverse=True))
    return re.sub(known, lambda found: spelled.get(found[0].lower(), found[0]), prompt, flags=re.IGNORECASE)


def whole(word: str) -> str:
    """A pattern for a word that is not a piece of a longer one."""
    before, after = (r"(?<!\w)" if word[:1].isalnum() else ""), (r"(?!\w)" if word[-1:].isalnum() else "")
    return f"{before}{re.escape(word)}{after}"
