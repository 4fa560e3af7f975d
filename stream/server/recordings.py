"""Recordings on the server: a file per recording, playable whatever ends it."""

from __future__ import annotations

import errno
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from accel.errors import UserError
from stream.frame import Frame, VideoSpec
from stream.live import Stream
from stream.mailbox import Mailbox, MailboxClosed
from stream.output import Attached
from stream.server.errors import Refused
from stream.sinks.file import FileSink
from stream.sinks.letterbox import boxed
from stream.sound import Sound

ID = re.compile(r"(?P<stream>[A-Za-z0-9_-]{1,64})-\d{8}-\d{6}-[0-9a-f]{4}")
SPARE = 64 << 20  # bytes; with less on the disk none is begun
FINISH_S = 10.0  # s the end of a file may take
SOUND_S = 0.1  # how long the first picture waits for sound; without any by then there is no track for it
SOUND_ROOM = 100  # pieces of 20 ms
KEPT = 256  # records of finished recordings that are remembered

State = Literal["recording", "done", "failed"]


class Recorder:
    """A sink around a file's: the first frame's size, times of capture, and what became of it.

    Frames of another size get bars; a source that comes back with its clock at 0 leaves no gap and no jump. Sound that
    is there at the beginning is recorded with them.
    """

    def __init__(self, sink: FileSink, size: tuple[int, int], path: Path, sound: Mailbox[Sound]) -> None:
        self.written = 0
        self.warnings: list[str] = []
        self.state: State = "recording"
        self.error: UserError | None = None
        self.full = False  # the disk was
        self.seconds = 0.0
        self._sink, self._size, self._path, self._sound = sink, size, path, sound
        self._first: float | None = None  # s

    def write(self, frame: Frame) -> None:
        """Write one frame at the time it was captured; raises UserError when the disk is full or gone."""
        if self._first is None:
            self._first = frame.captured
            with suppress(TimeoutError, MailboxClosed):
                piece = self._sound.get(SOUND_S)
                self._sink.sounding()
                self._sink.hear(piece)
        while (heard := self._sound.poll()) is not None:
            self._sink.hear(heard)
        at = max(0.0, frame.captured - self._first)
        image = boxed(frame.image, self._size)
        with self._failing():
            self._sink.write(replace(frame, image=image, pts=round(at * 1e6)))
        self.written, self.seconds = self._sink.written, at

    def close(self) -> None:
        """Finish the file."""
        self._sound.close(discard=True)
        with self._failing():
            self._sink.close()
        if self.state == "recording":
            self.state = "done"

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Note what ends it, and say it without the folder: that is nobody's business."""
        try:
            yield
        except UserError as error:
            cause = error.__context__
            self.full = self.full or getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            self.state = "failed"
            self.error = self.error or UserError(error.message.replace(f"{self._path.parent}/", ""), error.hint)
            raise self.error from None


@dataclass(slots=True)
class Recording:
    """One recording that this server made."""

    id: str
    stream: str
    path: Path
    started: float  # time.time(), s
    recorder: Recorder
    attached: Attached | None = field(default=None, repr=False)

    def record(self) -> dict[str, Any]:
        """What there is to say about it, ready for JSON; `status` is 200, or 507 when the disk was full."""
        recorder = self.recorder
        error = recorder.error
        return {
            "id": self.id,
            "stream": self.stream,
            "file": self.path.name,
            "url": url_of(self.id),
            "started": round(self.started, 3),
            "state": recorder.state,
            "status": 200 if error is None else 507 if recorder.full else 500,
            "frames": recorder.written,
            "seconds": round(recorder.seconds, 3),
            "error": None if error is None else error.message,
        }


class Recordings:
    """The recordings in a folder; everything here may touch the disk: call it in a thread.

    >>> recordings = Recordings(settings.recordings, limit=4)
    >>> recordings.start(stream).record()["url"]
    '/api/v1/recordings/cam-20261120-181500-9f3a'
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self._limit = folder, limit
        self._made: dict[str, Recording] = {}
        self._lock = threading.Lock()

    def start(self, stream: Stream) -> Recording:
        """Begin a file of what comes out; raises Refused 409 or 507, UserError where it cannot be written."""
        with self._lock:
            if sum(recording.recorder.state == "recording" for recording in self._made.values()) >= self._limit:
                raise Refused(409, f"{self._limit} recordings are running", "end one first")
            self._room()
            width, height = stream.size
            id = f"{stream.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
            path = self.folder / f"{id}.mp4"
            sink = FileSink(path, VideoSpec(width, height, stream.fps, live=True), "h264", stream.params.sink.crf)
            recorder = Recorder(sink, (width, height), path, stream.heard.subscribe(SOUND_ROOM))
            recording = Recording(id, stream.name, path, time.time(), recorder)
            self._made[id] = recording
            for old in list(self._made)[:-KEPT]:
                if self._made[old].recorder.state != "recording":
                    del self._made[old]
        recording.attached = stream.attach(recording.recorder, lossless=True)
        return recording

    def stop(self, stream: str, id: str) -> Recording:
        """End a recording and wait until its file is complete; again is the same answer. Raises Refused 404."""
        recording = self._made.get(id)
        if recording is None or recording.stream != stream:
            raise Refused(404, "no such recording of this stream")
        if recording.attached is not None:
            recording.attached.stop()
            recording.attached.join(FINISH_S)
        return recording

    def of(self, stream: str) -> list[dict[str, Any]]:
        """Every recording of a stream, newest first, those of earlier runs of the server too."""
        records = {id: recording.record() for id, recording in list(self._made.items()) if recording.stream == stream}
        for id, path in self._files():
            match = ID.fullmatch(id)
            if match and match["stream"] == stream and id not in records:
                records[id] = _found(id, stream, path)
        return sorted(records.values(), key=lambda record: -float(record["started"]))

    def path(self, id: str) -> Path:
        """The finished file; raises Refused 404, or 409 while it is being written."""
        recording = self._made.get(id)
        if recording is not None and recording.recorder.state == "recording":
            raise Refused(409, "it is still being recorded", "end it first")
        path = self.folder / f"{id}.mp4"
        if not ID.fullmatch(id) or path.is_symlink() or not path.is_file():
            raise Refused(404, "no such recording")
        return path

    def _files(self) -> Iterator[tuple[str, Path]]:
        if self.folder.is_dir():
            for path in self.folder.glob("*.mp4"):
                yield path.stem, path

    def _room(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise Refused(507, f"recordings cannot be kept: {why}", "choose another folder for recordings") from None
        if free < SPARE:
            raise Refused(507, "the disk is full", f"{SPARE >> 20} MB are needed to begin")


def url_of(id: str) -> str:
    """Where a finished recording is fetched."""
    return f"/api/v1/recordings/{id}"


def _found(id: str, stream: str, path: Path) -> dict[str, Any]:
    return {
        "id": id,
        "stream": stream,
        "file": path.name,
        "url": url_of(id),
        "started": round(path.stat().st_mtime, 3),
        "state": "done",
        "status": 200,
        "frames": None,
        "seconds": None,
        "error": None,
    }
