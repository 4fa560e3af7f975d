"""The files that settings name: as they are given, or in the user's folders of LoRAs, pictures and embeddings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from accel.errors import UserError
from models.rows import models_root

Kind = Literal["loras", "pictures", "embeddings"]

KEYS = ("style.lora", "style.picture", "style.picture_adapter", "style.embeddings", "style.control")  # that name files
GONE = (0, 0)  # the stamp of no file
PATH = re.compile(r"[/\\~]|\.\.|(^|[,=\s])[A-Za-z]:(?![\d.+-])")  # what a bare name, even with a scale, has none of


def asset(name: str, kind: Kind) -> Path:
    """Where a named file is: as given, or in `$LIVESTYLE_MODELS/<kind>`; as given where it is in neither."""
    path, kept = Path(name).expanduser(), models_root() / kind / name
    try:
        return kept if not path.exists() and kept.is_file() else path
    except OSError:  # a name that is too long
        return path


def stamp_of(file: Path) -> tuple[int, int]:
    """What changes with a file's content, as a rule: time and size; zeros where there is no such file."""
    try:
        found = file.stat()
    except OSError:
        return GONE
    return found.st_mtime_ns, found.st_size


def check_bare(key: str, value: object) -> None:
    """UserError where a setting from a client says where on this machine a file is, instead of naming one."""
    if key in KEYS and isinstance(value, str) and PATH.search(value):
        kept = models_root()
        raise UserError(
            f"{key}: clients name files, they give no paths",
            hint=f"put the file into loras, pictures or embeddings in {kept.name}/ of this server, and give its name",
        )
