"""Files of tensors: safetensors, read with two lines for what is wrong; and what families of models are called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from accel.errors import UserError

FETCH = "fetch it again"
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL's second", 2048: "SDXL"}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata; UserError for no file, another format and half a file."""
    with opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file; UserError for no file, another format and half a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {path} ({type(error).__name__})", hint="check the path") from error
    except SafetensorError as error:
        if path.read_bytes()[8:9] == b"{":  # eight bytes of length, then JSON
            raise UserError(f"{path.name} is cut short or damaged ({error})", hint=FETCH) from error
        raise UserError(
            f"{path.name} is not a safetensors file", hint="other formats can run code; take its .safetensors version"
        ) from error
