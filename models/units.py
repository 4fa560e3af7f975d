"""The setting `style.control`, read: which control pictures steer the network, how much, in which steps and how.

    canny:0.8, tile:0.5@0-0.6, lineart:1!prompt, depth=FOLDER:1

A unit is a kind of picture, then, where wanted, `=folder` of its ControlNet, `:weight` (0 to 2), `@start-end` (shares
of the denoising steps) and `!mode`. Commas separate units. The meaning is that of the ControlNet extension of the
Stable Diffusion web UI, whose units these are, and of diffusers' pipelines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from accel.errors import UserError

KINDS = ("canny", "lineart", "softedge", "tile", "depth", "openpose")
MODES = ("balanced", "prompt", "control")
MOST = 2.0  # weight
UNITS = 8  # more than any machine runs, and than five, the most that known workflows use
FADE = 0.825  # mode "prompt": each residual counts so much of the next deeper one
EXAMPLE = "kind[=folder][:weight][@start-end][!mode], such as canny:0.8, tile:0.5@0-0.6, depth=FOLDER:1!prompt"
NUMBER = r"[+-]?[.\d]+"
UNIT = re.compile(
    rf"(?P<kind>\w+)\s*(?:=\s*(?P<source>.*?)\s*)?(?::\s*(?P<weight>{NUMBER})\s*)?"
    rf"(?:@\s*(?P<start>{NUMBER})\s*-\s*(?P<end>{NUMBER})\s*)?(?:!\s*(?P<mode>\w+)\s*)?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Unit:
    """One control picture, and how much its ControlNet has to say."""

    kind: str  # of `KINDS`
    source: str = ""  # folder of the ControlNet, "" = the fetched one of the kind
    weight: float = 1.0
    start: float = 0.0  # share of the steps before which it is silent
    end: float = 1.0  # and after which
    mode: str = "balanced"  # or "prompt": weaker, the more so the finer; "control": on the wanted pass alone

    @property
    def name(self) -> str:
        """What tells its ControlNet from others: kind, or kind=folder."""
        return f"{self.kind}={self.source}" if self.source else self.kind

    def speaks(self, step: int, of: int, *, wanted: bool = True) -> bool:
        """Whether it counts in a step, 0 = the noisiest; as diffusers' pipelines decide, so both ends must be inside.

        >>> [Unit("canny", end=0.5).speaks(step, of=4) for step in range(4)]
        [True, True, False, False]
        """
        inside = not (step / of < self.start or (step + 1) / of > self.end)
        return inside and self.weight > 0 and (wanted or self.mode != "control")

    def scales(self, residuals: int) -> list[float]:
        """The weight of each residual, the finest first, the middle block's last.

        >>> [round(scale, 4) for scale in Unit("canny", mode="prompt").scales(13)[::6]]
        [0.0994, 0.3153, 1.0]
        """
        fade = FADE if self.mode == "prompt" else 1.0
        return [self.weight * fade ** (residuals - 1 - i) for i in range(residuals)]


@lru_cache(maxsize=64)
def units_of(text: str) -> tuple[Unit, ...]:
    """The units of a setting, in its order; UserError where it cannot be read. An empty one, or end, is no unit.

    >>> units_of("canny:0.8, tile@0-0.6")
    (Unit(kind='canny', source='', weight=0.8, start=0.0, end=1.0, mode='balanced'), \
Unit(kind='tile', source='', weight=1.0, start=0.0, end=0.6, mode='balanced'))
    """
    if not text.replace("\n", " ").replace("\t", " ").isprintable():
        raise UserError("style.control has characters that cannot be shown", hint=EXAMPLE)
    units = tuple(_unit(item.strip()) for item in text.split(",") if item.strip())
    if len(units) > UNITS:
        raise UserError(f"style.control has {len(units)} units", hint=f"{UNITS} at most")
    return units


def controls_of(text: str) -> tuple[str, ...]:
    """The ControlNets that a setting needs, each once and in alphabetical order; kind, or kind=folder.

    Weights, modes and the order of the units may change between two frames, these may not.

    >>> controls_of("tile:0.5, canny@0-0.5, canny:0.3@0.5-1")
    ('canny', 'tile')
    """
    return tuple(sorted({unit.name for unit in units_of(text)}))


def advice(text: str, steps: int) -> str:
    """One line on units that never count, or "".

    >>> advice("tile@0-0.6", steps=1)
    'tile control counts in none of 1 steps: a step must lie within start and end'
    """
    for unit in units_of(text):
        if unit.weight and not any(unit.speaks(step, steps) for step in range(steps)):
            return f"{unit.name} control counts in none of {steps} steps: a step must lie within start and end"
    return ""


def _unit(item: str) -> Unit:
    found = UNIT.fullmatch(item)
    if not found or found["source"] == "":
        raise UserError(f"style.control cannot be read: {item[:80]}", hint=EXAMPLE)
    kind, mode = found["kind"].lower(), (found["mode"] or MODES[0]).lower()
    if kind not in KINDS:
        raise UserError(f"no such control: {kind[:80]}", hint=f"one of: {', '.join(KINDS)}")
    if mode not in MODES:
        raise UserError(f"no such mode of a control: {mode[:80]}", hint=f"one of: {', '.join(MODES)}")
    weight, start, end = _numbers(item, found)
    if not 0 <= weight <= MOST:
        raise UserError(f"weight of {kind} control is {weight:g}", hint=f"0 to {MOST:g}; 0 = off, 1 = as trained")
    if not 0 <= start <= end <= 1:
        raise UserError(f"{kind} control from {start:g} to {end:g}", hint="shares of the steps, such as @0-0.6")
    return Unit(kind, found["source"] or "", weight, start, end, mode)


def _numbers(item: str, found: re.Match[str]) -> Iterator[float]:
    for name, default in (("weight", "1"), ("start", "0"), ("end", "1")):
        try:
            yield float(found[name] or default)
        except ValueError as error:
            raise UserError(f"{name} is not a number in {item[:80]}", hint=EXAMPLE) from error
