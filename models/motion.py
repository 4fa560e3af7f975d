"""AnimateDiff's motion modules (Guo et al. 2023, arXiv 2307.04725) for video that comes a frame at a time.

Weights are those of a diffusers `MotionAdapter`. Two things differ from diffusers' `UNetMotionModel`:
- Each frame attends to stored keys and values of frames before it (`models.rolling`), not to a clip of 16 at once.
  q, k and v are linear, W(x + pe) = Wx + W·pe, so what is stored has no position yet and the position, which moves
  as the frame ages, is added through the small tables W·pe: exact, and without touching the large caches.
- GroupNorm has each frame's own statistics, as v2, v3, AnimateLCM and Lightning were trained; diffusers pools
  them over the clip, as only v1 was. For one frame there is no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accel.engine import TensorSpec
from accel.errors import UserError

if TYPE_CHECKING:
    from models.folder import Folder
    from models.rolling import Window

HINT = "an adapter in diffusers' format, made for this model: same channels, same number of layers"
Only = Collection[str] | None  # paths in the adapter, of modules or of whole blocks, that are used; None = all


class StreamingAttention(nn.Module):
    """Temporal self-attention of a block of F frames over L stored ones and itself, at every place of the picture.

    `attention` is diffusers' `Attention`, whose layers are shared; `table` the positions (P, C), sinusoidal.
    """

    def __init__(self, attention: Any, table: Tensor) -> None:
        super().__init__()
        self.heads = int(attention.heads)
        self.width = int(attention.to_q.out_features) // self.heads
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = attention.to_out[0]
        self.table: Tensor
        self.tables: Tensor | None  # made by eval()
        self.register_buffer("table", table.detach().clone(), persistent=False)
        self.register_buffer("tables", None, persistent=False)

    def train(self, mode: bool = True) -> StreamingAttention:
        """While training the tables follow the weights; `eval` works them out, and must come after loading others."""
        super().train(mode)
        with torch.no_grad():
            self.tables = None if mode else self._projected()
        return self

    def _projected(self) -> Tensor:
        """The position table through the weights of q, k and v, (3, P, C)."""
        return torch.stack([nn.functional.linear(self.table, to.weight) for to in (self.to_q, self.to_k, self.to_v)])

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.heads, self.width).movedim(-2, 1)  # (n, …, C) → (n, heads, …, d)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, stored: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (n, hw, F, C), positions (n, L + F), mask (n, F, L + F) added to the scores, stored k and v
        (n, heads·hw, L, d) → output (n, hw, F, C) and the block's own k and v (n, heads·hw, F, d).
        """
        tables = self._projected() if self.tables is None else self.tables
        q_pe, k_pe, v_pe = tables[:, positions].unbind(0)  # (n, L + F, C) each
        frames = x.shape[2]
        q = self._split(self.to_q(x) + q_pe[:, None, -frames:]) * self.width**-0.5  # (n, heads, hw, F, d)
        k, v = self._split(self.to_k(x)), self._split(self.to_v(x))

        scores = q @ k.transpose(-1, -2)  # (n, heads, hw, F, F)
        if stored is not None:
            old_k, old_v = (s.to(q.dtype).view(*q.shape[:3], -1, self.width) for s in stored)  # (n, heads, hw, L, d)
            scores = torch.cat([q @ old_k.transpose(-1, -2), scores], -1)  # (n, heads, hw, F, L + F)
        by_position = q.flatten(2, 3) @ self._split(k_pe).transpose(-1, -2)  # (n, heads, hw·F, L + F)
        p = (scores + by_position.view_as(scores) + mask[:, None, None]).softmax(-1)

        out = p[..., -frames:] @ v + (p.flatten(2, 3) @ self._split(v_pe)).view_as(v)  # (n, heads, hw, F, d)
        if stored is not None:
            out = out + p[..., :-frames] @ old_v
            k, v = k.to(stored[0].dtype), v.to(stored[1].dtype)
        merged: Tensor = self.to_out(out.movedim(1, -2).flatten(-2))
        return merged, k.flatten(1, 2), v.flatten(1, 2)


class MotionBlock(nn.Module):
    """Two temporal self-attentions and a GEGLU, each behind its LayerNorm: diffusers' `BasicTransformerBlock`."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList([block.norm1, block.norm2])
        self.attentions = nn.ModuleList(
            [StreamingAttention(a, block.pos_embed.pe[0]) for a in (block.attn1, block.attn2)]
        )
        self.norm3, self.ff = block.norm3, block.ff

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor, stored: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """x (n, hw, F, C) → the same, then the new k and v of both attentions; `stored` is k, v, k, v, or empty."""
        new: list[Tensor] = []
        for i, (norm, attention) in enumerate(zip(self.norms, self.attentions, strict=True)):
            pair = (stored[2 * i], stored[2 * i + 1]) if stored else None
            y, k, v = attention(norm(x), positions, mask, pair)
            x = x + y
            new += [k, v]
        return x + self.ff(self.norm3(x)), *new


class MotionModule(nn.Module):
    """diffusers' `AnimateDiffTransformer3D`, whose layers it shares, for a block of frames and what is stored."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.norm, self.proj_in, self.proj_out = transformer.norm, transformer.proj_in, transformer.proj_out
        self.blocks = nn.ModuleList([MotionBlock(block) for block in transformer.transformer_blocks])

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, scale: Tensor, stored: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """x (n·F, C, H, W) → x + scale · motion, then the new k and v."""
        y = self.norm(x).view(positions.shape[0], -1, x.shape[1], x.shape[2] * x.shape[3])  # (n, F, C, hw)
        y = self.proj_in(y.permute(0, 3, 1, 2))  # (n, hw, F, C)
        new: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            y, *more = block(y, positions, mask, stored[4 * i : 4 * i + 4])
            new += more
        return x + scale * self.proj_out(y).permute(0, 2, 3, 1).reshape(x.shape), *new


class MotionUNet(nn.Module):
    """An ordinary `UNet2DConditionModel` with motion modules behind each of its resnet-attention pairs.

    Its layers and the adapter's are shared, not copied, and the UNet stays usable without motion. Of the
    modules, those at full size cost the most memory and time. Raises UserError where the adapter does not fit.
    """

    def __init__(self, unet: Any, adapter: Any, only: Only = None) -> None:
        super().__init__()
        if len(adapter.down_blocks) != len(unet.down_blocks) or adapter.config.conv_in_channels:
            raise UserError("the motion adapter is made for another kind of UNet", hint=HINT)
        self.unet = unet
        self.has_guidance = unet.config.time_cond_proj_dim is not None
        self.places: list[str] = []  # each module's forerunner in the UNet
        self.spans: list[slice] = []  # each module's caches: k and v of two attentions per block
        self.motion = nn.ModuleList()
        layers = dict(unet.named_modules())
        for path, _ in motion_modules(adapter, only):
            block, i = path.split(".motion_modules.")
            module, modules = adapter.get_submodule(path), adapter.get_submodule(block).motion_modules
            kind = "attentions" if f"{block}.attentions.0" in layers else "resnets"
            fits = len(getattr(layers.get(block), kind, ())) == len(modules)  # a bare mid block has one resnet too many
            if not fits or module.in_channels != layers[block].resnets[-1].out_channels:
                raise UserError(f"the motion adapter does not fit this model's {block}", hint=HINT)
            self.places.append(f"{block}.{kind}.{i}")
            at = self.spans[-1].stop if self.spans else 0
            self.spans.append(slice(at, at + 4 * len(module.transformer_blocks)))
            self.motion.append(MotionModule(module))

    def forward(self, z: Tensor, t: Tensor, words: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """z (n·F, C, H, W) noisy latents, row by row, F frames each; t (n,); words (n, T, D); then [guidance embedding
        (n, E) where the UNet has one,] positions (n, L + F), mask (n, F, L + F), scale (1,) and all stored k and v,
        or none for a block that sees only itself → output (n·F, C, H, W), then the new k and v in the same order.
        """
        guidance, rest = (rest[0], rest[1:]) if self.has_guidance else (None, rest)
        frames = z.shape[0] // t.shape[0]
        if frames > 1:
            t, words = t.repeat_interleave(frames, 0), words.repeat_interleave(frames, 0)
            guidance = None if guidance is None else guidance.repeat_interleave(frames, 0)
        new: list[Tensor] = []
        with self.moving(new, *rest):
            output: Tensor = self.unet(z, t, words, timestep_cond=guidance, return_dict=False)[0]
        return output, *new

    @contextmanager
    def moving(
        self, new: list[Tensor], positions: Tensor, mask: Tensor, scale: Tensor, *stored: Tensor
    ) -> Iterator[None]:
        """The UNet with motion, within the block; `new` is given the new k and v."""

        def extend(module: nn.Module, mine: Sequence[Tensor], _: nn.Module, inputs: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output  # attentions return tuples, resnets do not
            x, *more = module(x, positions, mask, scale, mine)
            new.extend(more)
            return (x,) if isinstance(output, tuple) else x

        with ExitStack() as hooks:  # of this call only
            for place, module, mine in zip(self.places, self.motion, self.spans, strict=True):
                hook = partial(extend, module, stored[mine])
                hooks.enter_context(self.unet.get_submodule(place).register_forward_hook(hook))
            yield


class Motion:
    """The motion modules of a folder as a `models.unet.Feature`, for latents of (height, width).

    Its outputs are the new keys and values, its inputs the stored ones behind positions, mask and scale.
    """

    def __init__(self, folder: Folder, size: tuple[int, int], window: Window, rows: int = 1) -> None:
        only = folder.motion_modules()
        self.inputs, self.outputs = motion_specs(folder.bare_adapter(), size, window, rows, only)
        self.fingerprint = folder.fingerprint("motion_adapter")
        self._folder, self._only = folder, only
        self._moving: Callable[..., AbstractContextManager[None]]

    def install(self, unet: Any) -> nn.Module:
        """The motion modules; UserError where they do not fit the UNet."""
        network = MotionUNet(unet, self._folder.adapter(), self._only)
        self._moving = network.moving
        return network.motion

    @contextmanager
    def during(self, unet: Any, given: Mapping[str, Tensor], found: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
        """Run the motion modules within the block."""
        new: list[Tensor] = []
        with self._moving(new, *(given[spec.name] for spec in self.inputs)):
            yield {}
        found |= {spec.name: tensor for spec, tensor in zip(self.outputs, new, strict=True)}


def motion_modules(adapter: Any, only: Only = None) -> list[tuple[str, int]]:
    """The modules of a `MotionAdapter`, as they are run: (path, level); level 0 = full size.

    Raises UserError where one of `only` is neither a module nor a block.
    """
    last = len(adapter.down_blocks) - 1
    blocks = [(f"down_blocks.{i}", i) for i in range(last + 1)]
    blocks += [("mid_block", last)] if adapter.mid_block is not None else []
    blocks += [(f"up_blocks.{i}", last - i) for i in range(last + 1)]
    known = [
        (f"{block}.motion_modules.{i}", level)
        for block, level in blocks
        for i in range(len(adapter.get_submodule(block).motion_modules))
    ]
    if only is None:
        return known
    for path in only:
        if not any(f"{module}.".startswith(f"{path}.") for module, _ in known):
            raise UserError(f"the motion adapter has no {path}", hint=f"it has {', '.join(dict(known))}")
    return [(module, level) for module, level in known if any(f"{module}.".startswith(f"{path}.") for path in only)]


def cache_shapes(adapter: Any, size: tuple[int, int], only: Only = None) -> tuple[tuple[int, int], ...]:
    """(P, d) of each tensor that `MotionUNet` stores per frame, P = heads · places, for latents of (height, width).

    The adapter may be one without weights: `with torch.device("meta"): MotionAdapter.from_config(config)`.
    """
    shapes: list[tuple[int, int]] = []
    for path, level in motion_modules(adapter, only):
        height, width = (-(-side // 2**level) for side in size)  # each downsampler rounds up
        module = adapter.get_submodule(path)
        shape = (module.num_attention_heads * height * width, module.attention_head_dim)
        shapes += [shape] * (4 * len(module.transformer_blocks))
    return tuple(shapes)


def motion_specs(
    adapter: Any, size: tuple[int, int], window: Window, rows: int = 1, only: Only = None, dtype: str = "float32"
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What an engine of a `MotionUNet` takes behind, and gives behind, those of the UNet without motion.

    The caches, of `dtype`, are inputs only; the new slots come out. Raises UserError for too long a window.
    """
    most = adapter.config.motion_max_seq_length
    if window.length > most:
        raise UserError(
            f"a window of {window.length} frames: the motion adapter knows {most} positions", hint="shorten it"
        )
    keys, shapes = window.slots + window.block, cache_shapes(adapter, size, only)
    named = [(f"{'kv'[i % 2]}{i // 2}", places, width) for i, (places, width) in enumerate(shapes)]
    positions, mask = TensorSpec("positions", (rows, keys), "int64"), TensorSpec("mask", (rows, window.block, keys))
    stored = (TensorSpec(name, (rows, p, window.slots, d), dtype) for name, p, d in named)
    new = (TensorSpec(f"new_{name}", (rows, p, window.block, d), dtype) for name, p, d in named)
    return (positions, mask, TensorSpec("motion_scale", (1,)), *stored), tuple(new)
