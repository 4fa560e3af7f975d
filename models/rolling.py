"""The rolling buffer of temporal attention: which frame lies in which slot, at which position, and its memory.

The caches hold keys and values from before positions are added, so a frame is stored once and stays where it is while
its position moves. Each denoising step has a row of its own, so that what is attended to has the same noise level;
each row counts its own frames, so rows of a stream batch may be filled to different depths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.transfer import Verdict

if TYPE_CHECKING:
    from models.motion import Motion
    from models.unet import Call

HIDDEN = -1e4  # added to the score of what is not to be seen: its weight is 0, in half precision too


@dataclass(frozen=True, slots=True)
class Window:
    """What frames attend to: the first of the shot (`sinks`), the newest before them (`ring`), and one another.

    A call takes a block of frames per row: `chunk` new ones, seen all together, behind the last `refresh` ones, which
    are computed again now that there is more to see. A frame's keys and values are stored once, when it is last
    computed. Everything here is a function of how many frames the row has `seen` before the call.

    Positions: sinks keep 0, 1, …; the ring follows, oldest first, and the block comes last. So they are the frames'
    own numbers until the window is full, and never reach `length`.

    >>> Window(sinks=2, ring=3).positions(seen=6)  # slots hold frames 0, 1 | 5, 3, 4; the last is frame 6 itself
    [0, 1, 4, 2, 3, 5]
    """

    sinks: int
    ring: int
    chunk: int = 1
    refresh: int = 0

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.refresh < 0 or self.chunk < 1 or self.ring < self.chunk:
            raise ValueError(f"a window needs sinks, refresh ≥ 0 and ring ≥ chunk ≥ 1: {self}")

    @classmethod
    def of(cls, length: int, chunk: int = 1, refresh: int = 0) -> Window:
        """A window of so many frames in all, the block included, a quarter of them sinks.

        >>> Window.of(16)
        Window(sinks=4, ring=11, chunk=1, refresh=0)
        """
        sinks = length // 4
        return cls(sinks, length - sinks - chunk - refresh, chunk, refresh)

    @property
    def slots(self) -> int:
        """Frames stored per row."""
        return self.sinks + self.ring

    @property
    def block(self) -> int:
        """Frames computed per row and call."""
        return self.refresh + self.chunk

    @property
    def length(self) -> int:
        """Positions in use; at most the length of the motion module's table."""
        return self.slots + self.block

    def positions(self, seen: int) -> list[int]:
        """The position of each slot's frame, then of each frame of the block; those of no frame are in range too."""
        stored = seen - self.refresh
        base = min(stored, self.slots)
        slots = list(range(self.sinks))
        for slot in range(self.sinks, self.slots):
            frame = self._frame_in(slot, stored)
            slots.append(base - stored + frame if frame >= self.sinks else slot)
        return slots + [max(base + i, 0) for i in range(self.block)]

    def visible(self, seen: int) -> list[bool]:
        """Whether each slot, then each place of the block, holds a frame."""
        stored = seen - self.refresh
        slots = [slot < stored for slot in range(self.sinks)]
        slots += [self._frame_in(slot, stored) >= self.sinks for slot in range(self.sinks, self.slots)]
        return slots + [stored + i >= 0 for i in range(self.block)]

    def writes(self, seen: int) -> list[tuple[int, int]]:
        """What to store after the call: (place in the block, slot) of the frames that will not be computed again."""
        stored = seen - self.refresh
        return [(i, self._slot_of(stored + i)) for i in range(self.chunk) if stored + i >= 0]

    def _slot_of(self, frame: int) -> int:
        return frame if frame < self.sinks else self.sinks + (frame - self.sinks) % self.ring

    def _frame_in(self, slot: int, stored: int) -> int:
        """The newest frame of a ring slot once frames 0 … stored - 1 are in; below `sinks` there is none yet."""
        newest = stored - 1
        return newest - (newest - slot) % self.ring


def whole_clip(frames: int, rows: int = 1) -> tuple[Tensor, Tensor]:
    """Positions (rows, F) and causal mask (rows, F, F) for frames 0 … F - 1 in one pass without caches, as in training.

    Equal to streaming them one by one while F ≤ `Window.length`.
    """
    mask = torch.full((frames, frames), HIDDEN).triu(1)
    return torch.arange(frames).expand(rows, -1), mask.expand(rows, -1, -1)


class Rolling:
    """The memory of one stream, allocated once: keys and values (rows, P, slots, d) of every temporal attention.

    `shapes` are the (P, d) that `models.motion.cache_shapes` gives. Not thread-safe, like the engine it feeds.

    >>> rolling = Rolling(Window.of(16), cache_shapes(adapter, (64, 64)), rows=2)
    >>> for row, (z, t) in enumerate(steps):
    ...     one = range(row, row + 1)
    ...     output, *new = unet(rolling.join(z, one), t, words, *rolling.inputs(scale, one))
    ...     rolling.commit(new, one)
    ...     output = rolling.newest(output)
    """

    def __init__(
        self,
        window: Window,
        shapes: Sequence[tuple[int, int]],
        rows: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.window = window
        self.rows = range(rows)
        self.seen = [0] * rows
        with torch.inference_mode(False):  # or, made while a frame is computed, nothing else could write to them
            self.caches = tuple(
                torch.zeros(rows, places, window.slots, width, dtype=dtype, device=device) for places, width in shapes
            )
        self._verdict = Verdict()
        self._before: Tensor | None = None  # (rows, refresh, C, H, W) what the rows' last frames were computed from

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    def to(self, device: torch.device) -> None:
        """Move the caches to where the engine computes; only the first time."""
        if self.caches and self.caches[0].device != device:
            with torch.inference_mode(False):
                self.caches = tuple(cache.to(device) for cache in self.caches)

    def join(self, z: Tensor, rows: range | None = None) -> Tensor:
        """New network inputs (n·chunk, C, H, W) behind those of the frames to be computed again: (n·block, C, H, W)."""
        window, rows = self.window, rows or self.rows
        if not window.refresh:
            return z
        if self._before is None:
            self._before = z.new_zeros(len(self.rows), window.refresh, *z.shape[1:])
        mine = self._before[rows.start : rows.stop]
        block = torch.cat([mine, z.view(len(rows), window.chunk, *z.shape[1:])], 1)
        mine.copy_(block[:, -window.refresh :])
        return block.flatten(0, 1)

    def newest(self, output: Tensor) -> Tensor:
        """What became of the new frames: (n·block, C, H, W) → (n·chunk, C, H, W)."""
        if not self.window.refresh:
            return output
        blocks = output.view(-1, self.window.block, *output.shape[1:])
        return blocks[:, -self.window.chunk :].flatten(0, 1)

    def inputs(self, scale: float, rows: range | None = None) -> tuple[Tensor, ...]:
        """What a `MotionUNet` takes after its words: positions, mask, scale and the rows' caches (views of them)."""
        window, rows = self.window, rows or self.rows
        positions = torch.tensor([window.positions(self.seen[row]) for row in rows])  # (n, slots + block)
        visible = torch.tensor([window.visible(self.seen[row]) for row in rows])
        mask = torch.where(visible, 0.0, HIDDEN)[:, None].expand(-1, window.block, -1)  # (n, block, slots + block)
        caches = (cache[rows.start : rows.stop] for cache in self.caches)
        return positions, mask.contiguous(), torch.tensor([scale]), *caches

    def commit(self, new: Sequence[Tensor], rows: range | None = None, live: Sequence[bool] = ()) -> None:
        """Store the new keys and values, (n, P, block, d) each, and count their frames.

        Rows that hold no frame, not `live`, are left out. What is not finite, after an overflow in half precision, is
        not stored: it would reach every later frame. All is forgotten instead.
        """
        held = [(i, row) for i, row in enumerate(rows or self.rows) if not live or live[i]]
        sound = torch.stack([tensor.sum(dtype=torch.float32) for tensor in new]).isfinite().all()
        if self._verdict.refused(sound):
            self.reset()
            return
        if sound.device.type != "cpu":  # what is not will be known a call later; until then it must not be in there
            new = [torch.where(sound, tensor, 0) for tensor in new]
        for cache, tensor in zip(self.caches, new, strict=True):
            for i, row in held:
                for place, slot in self.window.writes(self.seen[row]):
                    cache[row, :, slot] = tensor[i, :, place]
        for _, row in held:
            self.seen[row] += self.window.chunk

    def reset(self, row: int | None = None) -> None:
        """Forget everything of one row or all, at a cut or another prompt.

        Zeroed, since a NaN would poison even behind the mask.
        """
        for i in self.rows if row is None else (row,):
            self.seen[i] = 0
        for cache in self.caches:
            (cache if row is None else cache[row]).zero_()
        if row is None:
            self._before = None
        elif self._before is not None:
            with torch.inference_mode():
                self._before[row].zero_()


class Windowed:
    """The rolling buffer as a `models.unet.Companion`: the memory of one stream's calls of a UNet with `Motion`."""

    def __init__(self, motion: Motion, window: Window, rows: int) -> None:
        shapes = [(spec.shape[1], spec.shape[3]) for spec in motion.outputs]
        self.rolling = Rolling(window, shapes, rows)
        self._names = [spec.name for spec in motion.inputs]
        self._new = [spec.name for spec in motion.outputs]

    def inputs(self, call: Call) -> dict[str, Tensor]:
        """Positions, mask, scale (the newest frame's) and caches; z too, behind the frames to be computed again."""
        self.rolling.to(call.z.device)
        scale: float = call.frames[0].guides["motion_scale"]
        given = dict(zip(self._names, self.rolling.inputs(scale, call.rows), strict=True))
        return {"z": self.rolling.join(call.z, call.rows), **given}

    def keep(self, call: Call, found: Mapping[str, Tensor]) -> None:
        """Store the new keys and values."""
        self.rolling.commit([found[name] for name in self._new], call.rows, call.live)

    def reset(self, row: int | None = None) -> None:
        """Forget every frame, of one row or of all."""
        self.rolling.reset(row)
