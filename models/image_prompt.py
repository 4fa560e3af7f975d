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
from models.per_frame import PerFrame
from models.picture_encoder import StylePicture
from models.text import Transition

if TYPE_CHECKING:
    from models.unet import Call

VERSION = 1  # raise it when the attention changes what it computes: part of the engine's key
GUIDE = "picture"  # the name in `Seen.guides` under which a frame has its `StylePicture`, or None
BLEND = "blend_frames"  # and the one for the frames in which another takes hold


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

    `Seen.guides["picture"]` is a `StylePicture`, or None for none. It may be another one in every frame, and takes hold
    in as many frames as `Seen.guides["blend_frames"]` says.
    """

    def __init__(self, prompt: ImagePrompt) -> None:
        words, scale = prompt.inputs
        self._tokens = torch.zeros(1, *words.shape[1:])  # (1, T, D) of no picture
        self._silence = torch.zeros(scale.shape[1])
        fade = Fade()
        self._shown = PerFrame(lambda frame: fade.next(frame.guides.get(GUIDE), frame.guides.get(BLEND, 0)))

    def inputs(self, call: Call) -> dict[str, Tensor]:
        """Tokens and scales, a row for each latent. Passes that guidance leads away from see the negative tokens."""
        shown = self._shown(call)
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
        """A picture outlives the scene, and so does the way to it."""


class Fade:
    """A stream's style picture on its way to another one, frame by frame, as prompts go from one to another.

    From no picture, or to none, it is the other one whose scale rises or falls.

    >>> fade = Fade()
    >>> fade.next(old, frames=4), fade.next(new, frames=4)  # the old one, and a quarter of the way to the new one
    """

    def __init__(self) -> None:
        self._wanted: StylePicture | None = None
        self._shown: StylePicture | None = None
        self._way: Transition | None = None
        self._since = -1  # frames on the way; before the first frame there is nothing to come from

    def next(self, wanted: StylePicture | None, frames: int) -> StylePicture | None:
        """What the next frame is shown where `wanted` is asked for; `frames` frames after a change it is just that."""
        if not alike(wanted, self._wanted):
            start, end = self._shown or (wanted and wanted.faded), wanted or (self._shown and self._shown.faded)
            begun = frames and self._since >= 0
            self._way = Transition(start.tensors, end.tensors, frames) if begun and start and end else None
            self._wanted, self._since = wanted, 0
        self._since += 1
        if self._way is None or self._since >= self._way.frames:
            self._way, self._shown = None, wanted
        else:
            self._shown = StylePicture(*self._way.at(self._since))
        return self._shown


def alike(one: StylePicture | None, other: StylePicture | None) -> bool:
    """Whether two style pictures are the same, or both none."""
    if one is None or other is None:
        return one is other
    return torch.equal(one.scale, other.scale) and (one.words is other.words or torch.equal(one.words, other.words))


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
