"""The files of a model's folder: in which form each part has its weights, and whether all are there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

VARIANTS = ("fp16", "bf16")  # half-width files beside, or in place of, the plain ones
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
STEM = r"(?:diffusion_pytorch_model|pytorch_model|model)"
WEIGHTS = re.compile(rf"{STEM}(?:\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?\.(?P<kind>safetensors|bin)")


def form_of(part: Path) -> dict[str, Any]:
    """Arguments of `from_pretrained` by which the weights of a part are read: safetensors before pickled ones, of which
    nothing but tensors is read, and plain before half-width ones.

    >>> UNet2DConditionModel.from_pretrained(folder / "unet", **form_of(folder / "unet"))
    """
    variant, kind = _form(part) or ("", "safetensors")  # where nothing is, the reader says so
    return {"variant": variant or None, "use_safetensors": kind == "safetensors"}


def weight_files(part: Path) -> list[Path]:
    """The files that `form_of` has read."""
    form = _form(part)
    return sorted(part / match[0] for match in _weights(part) if (match["variant"] or "", match["kind"]) == form)


def missing(folder: Path) -> str:
    """What a model's folder lacks, the first thing as a sentence, or "": weights and tables are not read."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError):
        return "model_index.json cannot be read"
    if not isinstance(index, dict) or not all(isinstance(index.get(part) or [], list) for part in PARTS):
        return "model_index.json is no list of a model's parts"
    for part in PARTS:
        wanted = bool(index[part] and index[part][0]) if part in index else not part.endswith("_2")
        if wanted and (lost := _lost(folder / part)):
            return f"{lost} is missing"
    return ""


def _lost(part: Path) -> str:
    """The first file that is not in a part's folder, as part/file; "" where none is needed any more."""
    wanted = {"scheduler": "scheduler_config.json", "tokenizer": ""}.get(part.name.removesuffix("_2"), "config.json")
    if not part.is_dir():
        return part.name
    if wanted and not (part / wanted).is_file():
        return f"{part.name}/{wanted}"
    if not wanted:
        pair = all((part / file).is_file() for file in ("vocab.json", "merges.txt"))
        return "" if pair or (part / "tokenizer.json").is_file() else f"{part.name}/tokenizer.json (or a vocab.json)"
    if part.name == "scheduler":
        return ""
    for listed in part.glob("*.index*.json"):
        try:
            shards = {*map(str, json.loads(listed.read_text())["weight_map"].values())}
        except (OSError, ValueError, LookupError, AttributeError, TypeError):
            return f"what {part.name}/{listed.name} should say"
        if lost := sorted(shard for shard in shards if not (part / shard).is_file()):
            return f"{part.name}/{lost[0]}"
    return "" if _weights(part) else f"a file of weights (.safetensors) in {part.name}"


def _form(part: Path) -> tuple[str, str] | None:
    """Variant and kind of the weights to be read."""
    kinds = {(match["variant"] or "", match["kind"]) for match in _weights(part)}
    order = [(variant, kind) for kind in ("safetensors", "bin") for variant in ("", *VARIANTS)]
    return next((form for form in order if form in kinds), None)


def _weights(part: Path) -> list[re.Match[str]]:
    names = [file.name for file in part.iterdir()] if part.is_dir() else []
    return [match for name in names if (match := WEIGHTS.fullmatch(name))]
