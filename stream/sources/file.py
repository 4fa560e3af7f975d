"""A video file, read as fast as it is wanted."""

from __future__ import annotations

from pathlib import Path

import av

from accel.errors import UserError
from stream.sources.container import ContainerSource, Opening, reason


def open_source(url: str, size: tuple[int, int] | None, fit: str) -> ContainerSource:
    """Open a path or `file://` URL; raises UserError for anything that is not a readable video."""
    path = Path(url.removeprefix("file://"))
    if not path.exists():
        raise UserError(f"no such file: {path}", hint="check the path; `livestyle run demo` needs no file")
    if path.is_dir():
        raise UserError(f"{path} is a folder", hint="name one video file inside it")
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes)", hint="was its recording or download interrupted?")
        container = av.open(f"file:{path}")  # with the scheme a name like `concat:x` stays a name
    except av.EOFError:
        raise UserError(f"no picture can be decoded from {path.name}", hint="is it a damaged or empty video?") from None
    except OSError as error:  # some of FFmpeg's errors are OSErrors as well
        raise UserError(
            f"cannot read {path}: {(error.strerror or str(error)).lower()}", hint="check its permissions"
        ) from None
    except av.FFmpegError as error:
        raise UserError(
            f"{path} is not a video that can be read ({reason(error)})",
            hint="it may be cut off, damaged or something else by that name; does it play in a player?",
        ) from None
    name = str(path)
    return ContainerSource(container, Opening(path.name, live=False, size=size, fit=fit, origin=name, audio=name))
