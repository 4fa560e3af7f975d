"""The setting `style.lora`: which LoRAs a stream wears, and how much room they take, by the heads of their files."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from accel.errors import UserError
from models.assets import GONE, stamp_of
from models.kept import Kept
from models.lora import KEY, NETWORKS, PEFT
from models.rows import models_root
from models.tensor_file import opened

Stamp = tuple[int, int]  # of a file as it was looked at: `assets.stamp_of`
LoraSet = tuple[tuple[Path, Stamp, float], ...]  # files and scales; they add up
Head = tuple[Stamp, dict[str, int]]  # and the rank of each layer that a file changes

MOST = 16  # LoRAs at once
LOUDEST = 10.0  # scale; pictures fall apart long before
SCALE = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)\s*")
FORM = 'style.lora is a list such as: ink.safetensors:0.8, "oil, wet.safetensors":-0.3'
ATTENTION = re.compile(r"attn|attention|transformer_blocks|proj_(in|out)$")  # however a file spells its blocks

HEADS: Kept[Path, Head] = Kept(64)  # of files that were looked at: one that is gone, but worn, goes on
SETS: Kept[str, LoraSet] = Kept(64)  # what settings came to when they were last read


def lora_set(text: str) -> LoraSet:
    """Files, each with a scale behind a colon or 1, between commas; quotes keep a name's own commas.

    A name may be in the present folder or in `$LIVESTYLE_MODELS/loras`, and ".safetensors" may be left out. A file
    named twice has both scales together. UserError where the text cannot be read, or a file is not there. A file that
    was written over is another one, one that has gone is still what it was.

    >>> [(path.name, scale) for path, _, scale in lora_set("ink.safetensors:0.8, C:/loras/oil")]
    [('ink.safetensors', 0.8), ('oil.safetensors', 1.0)]
    """
    try:
        items = next(csv.reader([text], skipinitialspace=True), [])
    except csv.Error as error:  # a line break, a zero byte
        raise UserError(f"cannot read style.lora: {shown(text)}", hint=FORM) from error
    found: dict[Path, float] = {}
    for item in filter(str.strip, items):
        name, _, number = item.rpartition(":")
        if not SCALE.fullmatch(number):  # a Windows drive, or no colon
            name, number = item, "1"
        if not name.strip():
            raise UserError(f"a LoRA without a name in style.lora: {shown(item)}", hint=FORM)
        scale = float(number)
        if abs(scale) > LOUDEST:
            raise UserError(f"the scale of {shown(name)} is {shown(number)}", hint=f"-{LOUDEST:g} to {LOUDEST:g}")
        path = lora_file(name.strip())
        found[path] = found.get(path, 0.0) + scale
    if len(found) > MOST:
        raise UserError(f"{len(found)} LoRAs at once", hint=f"{MOST} at most")
    worn = tuple((path, stamp_now(path), scale) for path, scale in found.items())
    SETS.put(text, worn)
    return worn


def last_set(text: str) -> LoraSet:
    """The same as it was last read, without a look at the disk: for every frame."""
    found = SETS.known(text)
    return lora_set(text) if found is None else found


def stamp_now(path: Path) -> Stamp:
    """A file's stamp; of one that has gone, the last one that was seen."""
    stamp, head = stamp_of(path), HEADS.known(path)
    return head[0] if head and stamp == GONE else stamp


def lora_file(name: str) -> Path:
    """Where a LoRA is: as named, or in the folder of LoRAs; UserError where it is in neither, and never was."""
    folder = models_root() / "loras"
    named = [path for path in (Path(name), folder / name) if path.name]
    places = [found for path in named for found in (path, path.with_name(f"{path.name}.safetensors"))]
    for place in places:
        if is_file(place):
            return place.absolute()
    for place in places:
        if HEADS.known(place.absolute()):
            return place.absolute()
    raise UserError(f"no such LoRA: {shown(name)}", hint=f"a .safetensors file, here or in {folder}")


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def shown(text: str, most: int = 60) -> str:
    """Hostile text on one short line."""
    line = "".join(c if c.isprintable() else "?" for c in text.strip())
    return line if len(line) <= most else f"{line[:most]}…"


def rank_of(worn: LoraSet, asked: int = 0) -> int:
    """The room a session needs: what is asked for, or all these LoRAs side by side, in eights.

    >>> rank_of(lora_set("rank-4-and-12.safetensors, rank-32.safetensors"))
    48
    """
    together = sum(max(ranks(path).values(), default=0) for path, *_ in worn)
    return max(asked, in_eights(together))


def in_eights(rank: int) -> int:
    """A rank rounded up, so that LoRAs of nearly the same rank share an engine."""
    return -(-rank // 8) * 8


def beyond_attention(worn: LoraSet) -> bool:
    """Whether one of them changes layers outside the attention blocks, as LoCon and LCM-LoRA do."""
    return any(not ATTENTION.search(layer) for path, *_ in worn for layer in ranks(path))


def ranks(path: Path) -> dict[str, int]:
    """The rank of each layer of an image model that a file changes, by the file's own names; its head alone is read.

    UserError for no file, another format and half a file; one that has gone is as it last was. Whether it fits a model,
    `models.loras.Loras` says.
    """
    stamp, head = stamp_now(path), HEADS.known(path)
    if head and stamp == head[0]:
        return head[1]
    found = {}
    with opened(path) as file:
        for key in file.keys():  # noqa: SIM118
            match = KEY.fullmatch(key)
            if match and NETWORKS.get(match["network"] or "unet.") == "unet":
                shape = file.get_slice(key).get_shape()
                if (match["part"] or PEFT[match["peft"]]) == "up" and len(shape) > 1:
                    found[match["layer"]] = int(shape[1])
    HEADS.put(path, (stamp, found))
    return found
