"""The UNet's self-attentions as our own: over the frames of a bank, and masked, in one graph or apart.

Cross-attentions stay as they are. Two features share the processor here: `models.bank.Bank` and `SelfMask`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.engine import TensorSpec
from accel.errors import UserError
from models.unet import Call

Only = Collection[int | str] | None  # levels (0 = full size), paths of attentions or whole blocks; None = all
LARGEST_MAP = 1 << 24  # weights worked out at once, 64 MiB in float32; larger maps are made in pieces


@dataclass(frozen=True, slots=True)
class Place:
    """A self-attention of a UNet."""

    path: str
    level: int  # 0 = full size
    width: int  # C of its keys, all heads together


def self_attentions(unet: Any, only: Only = None) -> tuple[Place, ...]:
    """The self-attentions of a `UNet2DConditionModel`'s transformers, in the UNet's own order.

    The UNet may be on the meta device. Raises UserError where it has none, or none of what `only` names.
    """
    last = len(unet.down_blocks) - 1
    found: list[Place] = []
    for name, module in unet.named_modules():
        if not name.endswith(".attn1") or module.is_cross_attention:  # a transformer may have cross-attention alone
            continue
        kind, index, *_ = name.split(".")
        level = {"down_blocks": int(index), "up_blocks": last - int(index)}[kind] if index.isdigit() else last
        found.append(Place(name, level, int(module.to_k.out_features)))
    if not found:
        raise UserError(
            "this model's UNet has no self-attention", hint="temporal.bank=0, and no guidance_mode four-way"
        )
    for one in only or ():
        if not any(_is_in(place, one) for place in found):
            where = one if isinstance(one, str) else f"level {one}"
            raise UserError(
                f"this model's UNet has no self-attention in {where}", hint=f"it has {', '.join(p.path for p in found)}"
            )
    return tuple(place for place in found if only is None or any(_is_in(place, one) for one in only))


def _is_in(place: Place, one: int | str) -> bool:
    return place.level == one if isinstance(one, int) else f"{place.path}.".startswith(f"{one}.")


@dataclass(frozen=True, slots=True)
class Past:
    """What one self-attention may look at besides its own frame; n rows."""

    keys: Tensor  # (n, slots, S, C)
    values: Tensor  # (n, slots, S, C)
    mask: Tensor  # (n, slots), added to the scores: 0, or far below where a slot holds nothing
    outputs: Tensor | None = None  # (n, slots, S, C), where features are fused
    fusion: Tensor | None = None  # (n,) share of what is taken over
    alike: Tensor | None = None  # (n,) cosine from which on it is


class SelfAttention:
    """What diffusers calls an attention processor. `past` and `masked` are set for one pass; `new` is left by it."""

    def __init__(self) -> None:
        self.past: Past | None = None
        self.masked: Tensor | None = None  # (n,) 1 = only what stands out counts
        self.new: tuple[Tensor, ...] = ()  # keys, values, and with fusion outputs of this frame, (n, S, C)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """x (n, S, C) → (n, S, C), named as diffusers names it; `encoder_hidden_states` is None in self-attention."""
        x, past = hidden_states, self.past
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)  # (n, S, C)
        keys, values, bias = k, v, None
        if past is not None:
            past = repeated(past, x.shape[0] // past.mask.shape[0])
            keys = torch.cat([k, past.keys.to(k.dtype).flatten(1, 2)], 1)  # (n, T, C), T = S + slots·S
            values = torch.cat([v, past.values.to(v.dtype).flatten(1, 2)], 1)
            hidden = past.mask[:, :, None].expand(-1, -1, k.shape[1]).flatten(1)
            bias = torch.cat([k.new_zeros(k.shape[:2]), hidden.to(k.dtype)], 1)[:, None, None]  # (n, 1, 1, T)
        q, keys, values = (t.reshape(*t.shape[:2], attn.heads, -1).transpose(1, 2) for t in (q, keys, values))
        if self.masked is None:
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)  # (n, heads, S, d)
        else:
            masked = self.masked.repeat_interleave(x.shape[0] // self.masked.shape[0], 0)
            out = standing_out(q, keys, values, bias, masked)
        o: Tensor = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        if past is not None and past.outputs is not None:
            o = fused(o, past)
        self.new = (k, v, o)
        return o


def repeated(past: Past, times: int) -> Past:
    """The same past for each of the `times` frames of a row, where a window's newest frames are computed again."""
    if times == 1:
        return past
    tensors = (past.keys, past.values, past.mask, past.outputs, past.fusion, past.alike)
    return Past(*(t if t is None else t.repeat_interleave(times, 0) for t in tensors))  # type: ignore[arg-type]


def standing_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, masked: Tensor) -> Tensor:
    """Attention of q (n, heads, S, d) over k, v (n, heads, T, d) with its map A times 1(A > mean(A)) where `masked`.

    Style-A-Video (Huang et al. 2023). The rows of A sum to 1, so the mean of a map is 1 / its number of keys, the same
    for all heads; hidden keys (`bias`, (n, 1, 1, T)) are not counted. What is left is not scaled up to 1 again: the
    paper does not, and on an even picture, where nothing stands out, there would be nothing to scale.
    """
    count = torch.ones_like(masked) * k.shape[2] if bias is None else (bias >= 0).float().sum(-1).flatten().to(q.dtype)
    least = (masked / count)[:, None, None, None]  # 0 where not masked: every weight stays
    q, k = q * q.shape[-1] ** -0.5, k.transpose(-1, -2)
    pieces = []
    for piece in torch.split(q, max(1, LARGEST_MAP // (q.shape[0] * q.shape[1] * k.shape[-1])), 2):
        scores = piece @ k  # (n, heads, s, T)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        pieces.append((weights * (weights > least).to(weights.dtype)) @ v)
    return torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0]


def fused(o: Tensor, past: Past) -> Tensor:
    """Each output (n, S, C) led to the most alike one of the bank: (1 - a)·O + a·O_bank where their cosine is enough.

    Feature fusion of StreamV2V (Liang et al. 2024, arXiv 2405.15757), from the paper. a = 0 gives back O's bits.
    """
    assert past.outputs is not None
    assert past.fusion is not None
    assert past.alike is not None
    slots, places = past.outputs.shape[1:3]
    stored = past.outputs.to(o.dtype).flatten(1, 2)  # (n, slots·S, C)
    cosines = F.normalize(o, dim=-1) @ F.normalize(stored, dim=-1).transpose(1, 2)  # (n, S, slots·S)
    hidden = past.mask[:, None, :, None].to(o.dtype)
    cosines = (cosines.reshape(*o.shape[:2], slots, places) + hidden).flatten(2)
    best, where = cosines.max(-1)  # (n, S)
    nearest = stored.gather(1, where[..., None].expand(-1, -1, o.shape[-1]))
    share = past.fusion[:, None] * (best >= past.alike[:, None]).to(o.dtype)  # (n, S)
    return o + share[..., None] * (nearest - o)


def take_over(unet: Any, paths: Collection[str]) -> dict[str, SelfAttention]:
    """Put our processor into these self-attentions, or find the one that another feature has put there."""
    found: dict[str, SelfAttention] = {}
    for path in paths:
        attention = unet.get_submodule(path)
        if not isinstance(attention.processor, SelfAttention):
            attention.set_processor(SelfAttention())
        found[path] = attention.processor
    return found


class SelfMask:
    """A feature: `masked` (n,), 1 for the rows whose self-attentions count only what stands out, 0 = as ever.

    Values between lower the bar. It makes whole attention maps, slower than attention without it and, at 4096 places,
    with 64 MiB at a time: an engine that never masks should not have it. `only` as for the bank.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, rows: int = 1, only: Only = None) -> None:
        self.inputs = (TensorSpec("masked", (rows,)),)
        self.only = only
        self._processors: dict[str, SelfAttention] = {}

    @property
    def fingerprint(self) -> str:
        return f"self-mask {'all' if self.only is None else sorted(map(str, self.only))};"

    def install(self, unet: Any) -> nn.Module | None:
        """Take over the self-attentions; UserError where there are none."""
        self._processors = take_over(unet, [place.path for place in self_attentions(unet, self.only)])
        return None

    @contextmanager
    def during(self, unet: Any, given: Mapping[str, Tensor], found: dict[str, Tensor]) -> Iterator[Mapping[str, Any]]:
        """Around one forward pass; nothing is found."""
        for processor in self._processors.values():
            processor.masked = given["masked"]
        try:
            yield {}
        finally:
            for processor in self._processors.values():
                processor.masked = None


class Masking:
    """The companion of `SelfMask`: the call says which rows are masked. Without memory."""

    def inputs(self, call: Call) -> Mapping[str, Tensor]:
        """`masked` (n,), 0 or 1."""
        return {"masked": torch.tensor([float(one) for one in call.masked or (False,) * len(call.rows)])}

    def keep(self, call: Call, found: Mapping[str, Tensor]) -> None:
        """Nothing comes back."""

    def reset(self, row: int | None = None) -> None:
        """There is nothing to forget."""
