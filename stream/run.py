"""One run from source to sinks: everything checked, opened, joined, watched, closed and reported in order."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from accel.errors import UserError
from models.params import Params
from models.structure import structure_of
from stream.config import patched
from stream.frame import Frame
from stream.pump import start_pump
from stream.session import Session
from stream.sink import Sink, check_sink, is_outward, open_sink
from stream.sink import scheme_of as sink_scheme
from stream.sound import Sound
from stream.source import Source, SourceLost, open_source
from stream.source import scheme_of as source_scheme
from stream.status import Status
from stream.worker import Worker

POLL = 0.1  # s between two looks at a running session
READER_PATIENCE = 3.0  # s a reader that hangs in its source is waited for
TOUR = 2_000_000  # µs each prompt of a tour lasts


@dataclass(frozen=True, slots=True)
class Job:
    """What to run. `tour`: prompts to change between every two seconds of the source's time."""

    source: str
    sinks: tuple[str, ...]
    params: Params = field(default_factory=Params)
    model: str = "mini"
    engine: str = "auto"
    size: tuple[int, int] = (512, 288)  # the box pictures are fitted into: (width, height)
    frames: int | None = None
    realtime: bool = False
    stats: Path | None = None
    quiet: bool = False
    tour: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # said once the run can start
    decode: str = "auto"
    encoder: str = "auto"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: its `--stats` report, and whether it was interrupted."""

    stats: dict[str, Any]
    interrupted: bool


class Interrupts:
    """Ctrl-C and SIGTERM: the first asks, the second forces. While `raises`, the first is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.count = 0
        self.raises = True

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # the progress bar hid the cursor
            os._exit(130)
        if self.raises:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def installed(self) -> Iterator[Interrupts]:
        """Take the signals, and give them back."""
        before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(job: Job, say: Callable[[str], None]) -> Outcome:
    """Run to the end of the source, the frame limit or an interrupt; the files are closed and playable after it.

    Raises what ended the session, after the sinks are closed and the stats are written.
    """
    from models.lane import frame_lane
    from models.load import load
    from stream import hardware

    with Interrupts().installed() as interrupts, contextlib.ExitStack() as opened:
        check_paths(job)
        hardware.choose(job.decode, job.encoder)

        sinks: list[Sink] = []
        realtime = job.realtime or any(is_outward(url) for url in job.sinks)

        def hear(sound: Sound) -> None:
            for sink in sinks:
                if hasattr(sink, "hear"):
                    sink.hear(sound)

        def open() -> Source:
            source = open_source(job.source, size=job.size, fit=job.params.frame.fit, realtime=realtime)
            if hasattr(source, "sound"):
                source.sound = hear
            return source

        source = open()
        opened.callback(source.close)
        spec = source.spec
        size = (spec.width, spec.height)
        temporal = job.params.temporal
        stylizer = load(job.model, size, job.engine, say, structure=structure_of(job.params))
        stylizer.prepare(job.params)
        frame_lane(temporal, size, stylizer.device)  # what it lacks is said before any file is begun
        advice = stylizer.advice(job.params)
        told = [*job.notes, *source.warnings, *([advice] if advice else [])]
        for note in told:
            say(note)
        for url in job.sinks:
            settings = job.params.sink
            sinks.append(open_sink(url, spec, codec=settings.codec, crf=settings.crf))
            opened.callback(sinks[-1].close)
            if getattr(source, "has_sound", False) and hasattr(sinks[-1], "sounding"):
                sinks[-1].sounding()
        opened.pop_all()  # from here on their threads close them
        interrupts.raises = False
        total = min([count for count in (job.frames, None if spec.live else spec.frames) if count], default=None)
        with Worker(stylizer) as worker, Status(total, quiet=job.quiet) as status:
            session = worker.open(job.params, spec.live, frames=job.frames if spec.live else None, fps=spec.fps or 30.0)
            for url, sink in zip(job.sinks, sinks, strict=True):
                session.attach(sink, lossless=not spec.live or is_file(url))
            first = _Tour(source, session, job.tour, stylizer.prepare) if job.tour else source
            reader = start_pump(open, session, first=first, frames=None if spec.live else job.frames)
            while not session.join(POLL):
                if interrupts.count:
                    session.stop()
                status.show(session.meter, session.phase)
            reader.join(READER_PATIENCE)
            status.show(session.meter, session.phase)
        for note in (*source.warnings, *(line for sink in sinks for line in sink.warnings)):  # complete only now
            if note not in told:
                say(note)
        stats = session.meter.stats(stylizer.info, size)
        if job.stats:
            write_json(job.stats, stats)
        if isinstance(session.error, SourceLost):
            raise UserError(f"{job.source}: {session.error}", hint="check the source; what came before it is written")
        if session.error:
            raise session.error
        return Outcome(stats, bool(interrupts.count))


class _Tour:
    """A source whose passing time changes the session's prompt."""

    def __init__(
        self, source: Source, session: Session, prompts: tuple[str, ...], prepare: Callable[[Params], None]
    ) -> None:
        self.spec = source.spec
        self.warnings = source.warnings
        self.skipped = 0
        self.close = source.close
        self._source = source
        self._session = session
        self._prompts, self._prepare = prompts, prepare

    def frames(self) -> Iterator[Frame]:
        stop = -1
        for frame in self._source.frames():
            if frame.pts // TOUR != stop:
                stop = frame.pts // TOUR
                prompt = self._prompts[stop % len(self._prompts)]
                params = patched(self._session.params, {"style.prompt": prompt})
                self._prepare(params)
                self._session.params = params
            yield frame


def is_file(url: str) -> bool:
    """Whether a SINK is a file."""
    return sink_scheme(url) == "file"


def default_sink(source: str, codec: str) -> str:
    """A window where there is a display, else a file in the current directory named after the source."""
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return "window"
    name = Path(source).stem if source_scheme(source) == "file" else re.sub(r"\W+", "-", source).strip("-")
    return f"{name}-livestyle.{'mkv' if codec == 'ffv1' else 'mp4'}"


def check_paths(job: Job) -> None:
    """Raise UserError for an output that could not be written, or would destroy the input or another output."""
    origin = job.source.removeprefix("file://") if source_scheme(job.source) == "file" else ""
    read = Path(origin) if origin and Path(origin).exists() else None
    for url in job.sinks:
        check_sink(url, codec=job.params.sink.codec, origin=str(read) if read else None)
    if job.stats:
        check_report(job.stats)
    seen = {read.resolve()} if read else set()
    for path in [Path(url.removeprefix("file://")) for url in job.sinks if is_file(url)] + [job.stats]:
        if path and path.resolve() in seen:
            raise UserError(f"{path} is used twice", hint="give the input, every --to and --stats a file of its own")
        if path:
            seen.add(path.resolve())


def check_report(path: Path) -> None:
    """Raise UserError for a report that could not be written."""
    if not path.parent.is_dir():
        raise UserError(f"no such folder: {path.parent}", hint="create it first, or choose another place")
    if path.is_dir():
        raise UserError(f"{path} is a folder", hint="name a file inside it")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise _unwritten(path, error) from None


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report so that a reader sees all of it or the old one; raises UserError."""
    scratch = ""
    try:
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
        os.chmod(scratch, 0o644)  # mkstemp's 0600 is for secrets
        os.replace(scratch, path)
    except BaseException as error:
        if scratch:
            os.unlink(scratch)
        if isinstance(error, OSError):
            raise _unwritten(path, error) from None
        raise


def _unwritten(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {(error.strerror or str(error)).lower()}", hint="choose another place")
