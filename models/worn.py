"""The setting `style.lora`: which LoRAs a stream wears, and how much room they take, by the heads of their files."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from accel.errors import UserError
from models.lora import KEY, NETWORKS, PEFT, opened
from models.rows import models_root

LoraSet = tuple[tuple[Path, float], ...]  # files and scales; they add up

MOST = 16  # LoRAs at once
LOUDEST = 10.0  # scale; pictures fall apart long before
SCALE = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)\s*")
FORM = 'style.lora is a list such as: ink.safetensors:0.8, "oil, wet.safetensors":-0.3'
ATTENTION = re.compile(r"attn|attention|transformer_blocks|proj_(in|out)$")  # however a file spells its blocks


def lora_set(text: str) -> LoraSet:
    """Files, each with a scale behind a colon or 1, between commas; quotes keep a name's own commas.

    A name may be in the present folder or in `$LIVESTYLE_MODELS/loras`, and ".safetensors" may be left out. A file
    named twice has both scales together. UserError where the text cannot be read, or a file is not there.

    >>> lora_set("ink.safetensors:0.8, C:/loras/oil")
    ((PosixPath('/home/me/ink.safetensors'), 0.8), (PosixPath('C:/loras/oil.safetensors'), 1.0))
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
    return tuple(found.items())


def lora_file(name: str) -> Path:
    """Where a LoRA is: as named, or in the folder of LoRAs; UserError where it is in neither."""
    folder = models_root() / "loras"
    for path in (Path(name), folder / name):
        for candidate in (path, path.with_name(f"{path.name}.safetensors")) if path.name else ():
            if is_file(candidate):
                return candidate.absolute()
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
    together = sum(max(ranks(path).values(), default=0) for path, _ in worn)
    return max(asked, in_eights(together))


def in_eights(rank: int) -> int:
    """A rank rounded up, so that LoRAs of nearly the same rank share an engine."""
    return -(-rank // 8) * 8


def beyond_attention(worn: LoraSet) -> bool:
    """Whether one of them changes layers outside the attention blocks, as LoCon and LCM-LoRA do."""
    return any(not ATTENTION.search(layer) for path, _ in worn for layer in ranks(path))


def ranks(path: Path) -> dict[str, int]:
    """The rank of each layer of an image model that a file changes, by the file's own names; its head alone is read.

    UserError for no file, another format and half a file. Whether it fits a model, `models.adapters.Loras` says.
    """
    found = {}
    with opened(path) as file:
        for key in file.keys():  # noqa: SIM118
            match = KEY.fullmatch(key)
            if match and NETWORKS.get(match["network"] or "unet.") == "unet":
                shape = file.get_slice(key).get_shape()
                if (match["part"] or PEFT[match["peft"]]) == "up" and len(shape) > 1:
                    found[match["layer"]] = int(shape[1])
    return found
