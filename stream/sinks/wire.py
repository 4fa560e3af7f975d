"""Pictures and sound through a pipe, to the process that publishes them."""

from __future__ import annotations

import struct
from typing import IO, Any

import numpy as np

from stream.frame import Frame
from stream.sound import Sound, samples_of, sound_of

HEAD = struct.Struct("!cqdIII")  # kind, pts in µs, captured in s, width, height, bytes that follow
PICTURE, SOUND = b"P", b"S"


def send(pipe: IO[bytes], item: Frame | Sound) -> None:
    """Write one picture or piece of sound; blocks while the pipe is full, raises OSError when nobody reads it."""
    if isinstance(item, Frame):
        height, width = item.image.shape[:2]
        pipe.write(HEAD.pack(PICTURE, item.pts, item.captured, width, height, item.image.nbytes))
        pipe.write(np.ascontiguousarray(item.image).data)
    else:
        samples = samples_of(item)
        pipe.write(HEAD.pack(SOUND, 0, item.captured, 0, 0, samples.nbytes))
        pipe.write(samples.tobytes())


def receive(pipe: IO[bytes]) -> Frame | Sound | None:
    """The next picture or piece of sound; None at the end, also where it comes in mid-sentence."""
    head = pipe.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    kind, pts, captured, width, height, count = HEAD.unpack(head)
    body: Any = np.empty(count, np.uint8)
    if pipe.readinto(body) < count:  # type: ignore[attr-defined] # a buffered reader has it
        return None
    if kind == SOUND:
        return sound_of(body.view(np.int16).reshape(-1, 2), captured)
    return Frame(body.reshape(height, width, 3), pts, 0, captured)
