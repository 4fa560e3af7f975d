"""A stream's seat at the worker: the session that takes its pictures, made anew for another model or size."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import cv2
import numpy as np

from accel.errors import UserError
from models.params import Params
from models.structure import Structure, structure_of
from stream.fit import round_size
from stream.frame import Frame
from stream.session import Clock, Session, Shared
from stream.source import Size

if TYPE_CHECKING:
    from models.stylizer import Stylizer
    from stream.worker import Worker

log = logging.getLogger(__name__)

Say = Callable[[str], None]
Progress = Callable[[str, float], None]  # (what is being compiled, share done)

RESTARTS = 3  # times that a model which raises is started again within…
RESTARTS_S = 60.0
SHAPE = 0.05  # pictures whose aspect differs by more cannot be scaled to each other


@dataclass(frozen=True, slots=True)
class Engineering:
    """What a session is built for; another one is another session."""

    model: str
    size: Size
    structure: Structure

    def covers(self, other: Engineering) -> bool:
        """Whether a session built for this can do what the other needs."""
        return (self.model, self.size) == (other.model, other.size) and self.structure.covers(other.structure)


class House(Protocol):
    """What the streams of one server share."""

    worker: Worker
    loader: ThreadPoolExecutor
    clock: Clock

    def stylizer(self, build: Engineering, say: Say, progress: Progress) -> Stylizer: ...


class Seat:
    """Hands pictures to a session of the worker, and sees to it that there is a fitting one.

    Models are loaded in the house's loader; until then pictures are let go by. `say(kind, text)` tells what happens.
    Thread-safe.
    """

    def __init__(self, house: House, shared: Shared, say: Callable[[str, str], None]) -> None:
        self.params = Params()  # of the session, with what the level takes from them
        self._structure = Structure()  # that they need
        self._stylizer: Stylizer | None = None
        self.error: str | None = None
        self.progress: tuple[str, float] | None = None  # while a model is compiled
        self.info: Mapping[str, Any] = {}  # of the model
        self.built: Engineering | None = None  # what the session was built for
        self.building: Engineering | None = None
        self._house, self._shared, self._say = house, shared, say
        self._lock = threading.RLock()
        self._session: Session | None = None
        self._failed: Engineering | None = None  # not tried again until something is changed
        self._failures: deque[float] = deque(maxlen=RESTARTS)
        self._closed = False

    @property
    def taken(self) -> bool:
        """Whether there is a session."""
        return self._session is not None

    @property
    def turn_ms(self) -> float:
        """What one frame lately took of the worker."""
        session = self._session
        return session.turn_ms if session is not None else 0.0

    def take(self, frame: Frame, model: str, scale: float, fps: float) -> None:
        """One picture, to be shown at `scale` times its size; let go by where no session is ready for it."""
        height, width = frame.image.shape[:2]
        size = round_size(width * scale, height * scale)
        session = self._session_for(Engineering(model, size, self._structure), fps)
        if session is None or self.built is None:
            return
        width, height = self.built.size
        if frame.image.shape[:2] != (height, width):
            smaller = cv2.resize(frame.image, (width, height), interpolation=cv2.INTER_AREA)
            frame = replace(frame, image=np.asarray(smaller, np.uint8))
        session.inbox.put(frame)

    def prepare(self, params: Params) -> None:
        """Work ahead for settings that are to come, in the caller's thread; UserError where they cannot be met."""
        structure = structure_of(params)
        with self._lock:
            stylizer, built = self._stylizer, self.built
        if stylizer is not None and built is not None and built.structure.covers(structure):
            stylizer.prepare(params)

    def retune(self, params: Params) -> None:
        """Other settings, from the next picture on."""
        structure = structure_of(params)
        with self._lock:
            self.params, self._structure = params, structure
            if self._session is not None:
                self._session.params = params

    def forgive(self) -> None:
        """Something was changed: what failed may be tried again."""
        with self._lock:
            self._failed = self.error = None
            self._failures.clear()

    def close(self, timeout: float) -> None:
        """End the session, and wait for the worker to let go of it."""
        with self._lock:
            self._closed = True
            session = self._session
        if session is not None:
            session.stop()
            session.join(timeout)

    def _session_for(self, wanted: Engineering, fps: float) -> Session | None:
        """The session that takes pictures like this; None while one is being made."""
        with self._lock:
            session, built = self._session, self.built
            if session is not None and session.error is not None:
                self._broke(session.error)
                session = None
            elif session is not None and built is not None and not _alike(built.size, wanted.size):
                session.stop()
                session = self._session = self.built = None
            fits = built is not None and built.covers(wanted)
            if (session is None or not fits) and wanted not in (self.building, self._failed):
                self.building = wanted
                self._house.loader.submit(self._prepare, wanted, fps)
        return session

    def _prepare(self, wanted: Engineering, fps: float) -> None:
        """In the loader's thread: a stylizer and a session for it, which takes the place of the one before."""
        try:
            stylizer = self._house.stylizer(wanted, lambda line: self._say("note", line), self._advance)
            stylizer.prepare(self.params)
            session = self._house.worker.open(self.params, True, fps=fps, stylizer=stylizer, shared=self._shared)
        except Exception as error:  # whatever loading a model raises is this stream's failure alone
            if self._closed:
                return  # the process may be ending: nobody waits for it
            if not isinstance(error, UserError):
                log.error("%s cannot be prepared", wanted.model, exc_info=error)
            with self._lock:
                self.building, self.progress, self._failed = None, None, wanted
                text = f"{wanted.model} cannot be prepared: {error or type(error).__name__}"
                if self._session is None:
                    self.error = text
                else:  # asked for while pictures come out: they go on as they were
                    text = f"{text}; it goes on as before"
            self._say("error", text)
            return
        with self._lock:
            old, self._session, self._stylizer = self._session, session, stylizer
            self.built, self.building, self.progress = wanted, None, None
            self.info = getattr(stylizer, "info", {})
            self.error = None
            session.params = self.params
            closed = self._closed
        if old is not None:
            old.stop()
        if closed:
            session.stop()
        elif advice := stylizer.advice(self.params):
            self._say("note", advice)

    def _broke(self, error: Exception) -> None:
        """A session failed: another is made, unless that has happened too often."""
        now = self._house.clock()
        if isinstance(error, UserError):
            text = str(error)
        else:
            text = f"the model failed: {error or type(error).__name__}"
            log.error("a session failed", exc_info=error)
        often = len(self._failures) == RESTARTS and now - self._failures[0] < RESTARTS_S
        self._failures.append(now)
        self._failed = self.built if often else None
        self._session = self.built = None
        if often:
            self.error = text
        self._say("error", text if often else f"{text}; starting it again")

    def _advance(self, part: str, done: float) -> None:
        self.progress = part, done


def _alike(one: Size, other: Size) -> bool:
    return abs(one[0] / one[1] - other[0] / other[1]) <= SHAPE
