"""Settings from every side: defaults < the model's recipe < preset < TOML < `--set` < explicit flags, one schema."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from accel.errors import UserError
from models.params import Params
from models.recipe import recipe_of

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"style.steps": 1, "style.guidance": 1.0, "sink.crf": 23},
    "quality": {"style.steps": 4, "sink.crf": 14},
}
SIZE_STEP = 8  # pixels; a latent is 1/8 of the picture
SIZE_MIN = 64
SIZE_MAX = 4096


def keys() -> list[str]:
    """Every settings key, as `--set` takes it.

    >>> "style.prompt" in keys()
    True
    """
    return list(flatten(Params().model_dump()))


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def load_params(
    preset: str | None = None,
    config: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    model: str = "mini",
) -> Params:
    """The settings of a run; a later layer wins. Raises UserError for an unknown key, value, preset or file.

    >>> load_params(model="sd-turbo", sets=["style.steps=2"]).style.strength
    0.5
    """
    params = Params()
    for layer in (recipe_of(model).settings, _preset(preset), _toml(config), _sets(sets), dict(flags or {})):
        params = patched(params, layer)
    return params


def moved(params: Params, before: str, after: str) -> Params:
    """Settings taken over to another model: what is still as the one before is run becomes as the new one is run.

    >>> moved(load_params(model="sd-turbo"), "sd-turbo", "sd15-lcm").style.steps
    4
    """
    kept = flatten(params.model_dump())
    old, new = (flatten(patched(Params(), recipe_of(model).settings).model_dump()) for model in (before, after))
    return patched(params, {key: new[key] for key in new if old[key] != new[key] and kept[key] == old[key]})


def patched(params: Params, changes: Mapping[str, Any]) -> Params:
    """New settings with some keys changed; values may be text. Raises UserError naming the key that is wrong.

    >>> patched(Params(), {"style.steps": "2"}).style.steps
    2
    """
    nested = params.model_dump()
    known = flatten(nested)
    for key, value in changes.items():
        if key not in known:
            raise UserError(f"unknown setting: {key}", hint=_nearest(key, list(known)))
        section, _, name = key.rpartition(".")
        nested[section][name] = value
    try:
        return Params.model_validate(nested)
    except ValidationError as error:
        raise _bad_value(error) from None


def parse_size(text: str) -> tuple[tuple[int, int], str]:
    """(width, height) in pixels from `WxH`, and a line to say when it had to be adjusted, else "".

    >>> parse_size("513x77")
    ((512, 80), 'size 513x77 → 512x80: multiples of 8, at least 64')
    """
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text.strip())
    if not match or not 1 <= min(asked := (int(match[1]), int(match[2]))) <= max(asked) <= SIZE_MAX:
        raise UserError(f"bad size: {text}", hint=f"--size takes WIDTHxHEIGHT up to {SIZE_MAX}, for example 512x288")
    size = _snap(asked[0]), _snap(asked[1])
    limits = f"multiples of {SIZE_STEP}, at least {SIZE_MIN}"
    note = "" if size == asked else f"size {asked[0]}x{asked[1]} → {size[0]}x{size[1]}: {limits}"
    return size, note


def _snap(side: int) -> int:
    return max(SIZE_MIN, (side + SIZE_STEP // 2) // SIZE_STEP * SIZE_STEP)


def _preset(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    if name not in PRESETS:
        raise UserError(f"unknown preset: {name}", hint=f"choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _toml(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        return flatten({name: value for name, value in table.items() if name != "server"})  # that one is for `serve`
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", hint="check the path given to --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not TOML: {reason}", hint='for example: [style] prompt = "ink drawing"') from None


def _sets(pairs: Sequence[str]) -> dict[str, Any]:
    layer = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: no value", hint="write KEY=VALUE, for example --set style.steps=2")
        layer[key.strip()] = value.strip()
    return layer


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:  # right word in the wrong section, or without one
        word = key.rpartition(".")[2]
        close = [k for k in known if difflib.get_close_matches(word, [k.rpartition(".")[2]], cutoff=0.7)][:1]
    return f"did you mean {close[0]}?" if close else f"the settings are: {', '.join(known)}"


def _bad_value(error: ValidationError) -> UserError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path[:2])
    section = Params.model_fields[path[0]].default
    about = type(section).model_fields[path[1]].description if len(path) > 1 else None
    return UserError(
        f"{key} = {first['input']!r}: {first['msg'].lower()}", hint=f"{key}: {about or 'see the settings'}"
    )
