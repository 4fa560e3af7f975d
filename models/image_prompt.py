"""A style picture beside the prompt: IP-Adapter's half inside the UNet, Ye et al. 2023 (arXiv 2308.06721)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from accel.engine import TensorSpec
from accel.errors import UserError
from models.ip_adapter import KINDS, Adapter

if TYPE_CHECKING:
    from models.picture_encoder import StylePicture
    from models.unet import Call

VERSION = 1  # raise it when the attention changes what it computes: part of the engine's key
GUIDE = "picture"  # the name in `Seen.guides` under which a frame has its `StylePicture`, or None


class ImagePrompt:
    """Cross-attentions that look at a style picture besides, as a `models.unet.Feature`, for so many latents at once.

    Each becomes attention to the words plus scale times attention to the picture's tokens, which have keys and values
    of their own: eq. 5 of the paper. Scale 0 gives the UNet's own output, bit for bit in torch, since x + 0·y = x.
    """

    def __init__(self, adapter: Adapter, rows: int = 1) -> None:
        tokens, width, _ = adapter.shape
        self.inputs = (
            TensorSpec("picture_words", (rows, tokens, width)),
            TensorSpec("picture_scale", (rows, len(adapter.layers))),  # of each cross-attention
        )
        self.outputs: tuple[TensorSpec, ...] = ()
        self.fingerprint = f"image prompt {VERSION}, {adapter.fingerprint};"
        self._adapter = replace(adapter)  # one that has read nothing, and so keeps nothing in memory
        self._given: Mapping[str, Tensor] = {}  # the inputs of the forward pass that is under way

    def install(self, unet: Any) -> nn.Module:
        """Give each cross-attention its own keys and values; self-attentions are left as they are.

        Raises UserError where number or width of the layers is another.
        """
        places, name = cross_attentions(unet).values(), self._adapter.path.name
        layers = replace(self._adapter).layers
        if len(places) != len(layers):
            counts = f"{len(layers)} layers, this model has {len(places)}"
            raise UserError(f"{name} is for another kind of UNet: {counts}", hint=KINDS)
        brought = nn.ModuleList()
        for i, (attention, weights) in enumerate(zip(places, layers, strict=True)):
            wanted, got = (attention.inner_kv_dim, attention.cross_attention_dim), tuple(weights[0].shape)
            if wanted != got:
                raise UserError(f"{name} does not fit this model: layer {i} is {got}, not {wanted}", hint=KINDS)
            pair = nn.ModuleList([linear(weight) for weight in weights])
            attention.set_processor(PictureAttention(self, i, pair))
            brought.append(pair)
        return brought

    @contextmanager
    def during(self, unet: Any, given: Mapping[str, Tensor], found: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
        """Show the picture within the block."""
        self._given = given
        try:
            yield {}
        finally:
            self._given = {}

    def seen(self, layer: int) -> tuple[Tensor, Tensor]:
        """The tokens (n, T, D) and the scale (n, 1, 1) of a layer, within `during`."""
        return self._given["picture_words"], self._given["picture_scale"][:, layer, None, None]


class PictureAttention:
    """The processor of one cross-attention, in diffusers' sense: x (B, S, C) attends to words (B, L, D) and picture.

    B is the number of rows, or a multiple where a row is a block of frames.
    """

    def __init__(self, prompt: ImagePrompt, layer: int, pair: nn.ModuleList) -> None:
        self._prompt, self._layer = prompt, layer
        self._to_k, self._to_v = pair

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """→ (B, S, C); a mask (B, 1, L) is added to the scores of the words, as the UNet gives it."""
        q = split(attn.to_q(hidden_states), attn.heads)
        k, v = (split(to(encoder_hidden_states), attn.heads) for to in (attn.to_k, attn.to_v))
        mask = None if attention_mask is None else attention_mask[:, None]
        words = merged(scaled_dot_product_attention(q, k, v, attn_mask=mask))

        tokens, scale = self._prompt.seen(self._layer)
        frames = q.shape[0] // tokens.shape[0]
        tokens, scale = (t.repeat_interleave(frames, 0) if frames > 1 else t for t in (tokens, scale))
        k, v = (split(to(tokens), attn.heads) for to in (self._to_k, self._to_v))
        picture = merged(scaled_dot_product_attention(q, k, v))
        found: Tensor = attn.to_out[0](words + scale * picture)
        return found


class Pictures:
    """The style pictures of one stream as a `models.unet.Companion`: each latent is shown its own frame's.

    `Seen.guides["picture"]` is a `StylePicture`, or None for none. It may be another one in every frame.
    """

    def __init__(self, prompt: ImagePrompt) -> None:
        words, scale = prompt.inputs
        self._tokens = torch.zeros(1, *words.shape[1:])  # (1, T, D) of no picture
        self._silence = torch.zeros(scale.shape[1])

    def inputs(self, call: Call) -> dict[str, Tensor]:
        """Tokens and scales, a row for each latent. Passes that guidance leads away from see the negative tokens."""
        shown: list[StylePicture | None] = [frame.guides.get(GUIDE) for frame in call.frames]
        wanted = [row < call.of for row in call.rows]  # the first pass's rows; a call may hold several passes
        words = [
            self._tokens if p is None else p.words if leads else p.negative
            for p, leads in zip(shown, wanted, strict=True)
        ]
        scales = [self._silence if p is None else p.scale.expand(self._silence.shape) for p in shown]
        return {"picture_words": torch.cat(words), "picture_scale": torch.stack(scales)}

    def keep(self, call: Call, found: Mapping[str, Tensor]) -> None:
        """Nothing comes back."""

    def reset(self, row: int | None = None) -> None:
        """A picture outlives the scene."""


def cross_attentions(unet: Any) -> dict[str, Any]:
    """The UNet's cross-attentions by name, in the order of its processors, which is that of an adapter's layers.

    >>> [float("up_blocks.1" in name) for name in cross_attentions(unet)]  # a scale for each: style without layout
    """
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return {name: unet.get_submodule(name) for name in names if name.endswith("attn2")}


def linear(weight: Tensor) -> nn.Linear:
    """A layer without bias, float32, of a weight (out, in)."""
    found = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    found.weight = nn.Parameter(weight.float(), requires_grad=False)
    return found


def split(x: Tensor, heads: int) -> Tensor:
    """(B, S, C) → (B, heads, S, d)."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """(B, heads, S, d) → (B, S, C)."""
    return x.transpose(1, 2).flatten(2)
