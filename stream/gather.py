"""Pictures that sessions ask for, and the device that diffuses them: one launch for as many as can share it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel.machine import give_way

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from models.flow import Flow
    from models.launched import Launched
    from models.params import Params
    from models.state import State
    from models.stylizer import Stylizer


@dataclass(frozen=True, slots=True)
class Diffused:
    """A picture out of the style lane; None while a stream batch still fills."""

    image: NDArray[np.uint8] | None
    stages_ms: dict[str, float]  # of the whole launch: the picture came with the others of it
    took_ms: float  # of the device: of a launch that others shared, this picture's share
    together: int = 1  # pictures of that launch


@dataclass(eq=False, slots=True)
class Asked:
    """A picture that a session asks for, and what came of it.

    `launched` is called while its last network still runs. `cut`: another scene begins. `moved`: the flow back to the
    picture diffused before this one.
    """

    stylizer: Stylizer
    state: State
    image: NDArray[np.uint8]
    params: Params
    launched: Callable[[], None] = lambda: None
    cut: bool = False
    moved: Flow | None = None
    found: Diffused | Exception | None = None

    @property
    def company(self) -> tuple[int, Hashable]:
        """What all pictures of a launch have in common."""
        return id(self.stylizer), self.stylizer.company(self.params)

    def picture(self) -> Diffused:
        """What came of it; raises what it failed of."""
        assert self.found is not None
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


class Device:
    """What diffuses the pictures of every session, launch by launch, and a thread to wait for them in.

    Pictures that nobody waits for are `put` here; a launch takes along those that can share it, whoever makes it. So
    keys that come while the device is busy go together, and no frame lane waits for them. `most` bounds how many.
    """

    def __init__(self, most: int | None = None) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="style", initializer=give_way)
        self._most = most
        self._lock = threading.Lock()
        self._waiting: list[Asked] = []  # put in by any thread, taken out by the one that has the lock

    def width(self, stylizer: Stylizer) -> int:
        """Pictures that one launch of this model takes."""
        return min(stylizer.width, self._most or stylizer.width)

    def put(self, asked: Asked) -> None:
        """Leave a picture to be diffused with others, or by whoever comes to `diffuse` it."""
        self._waiting.append(asked)

    def diffuse(self, asked: Sequence[Asked]) -> None:
        """See to it that each of these has come to something, in as few launches as can be."""
        with self._lock:
            while rest := [one for one in asked if one.found is None]:
                known = [*rest, *(one for one in tuple(self._waiting) if one not in rest)]
                sharing = [one for one in known if one.company == rest[0].company]
                launch = sharing[: self.width(rest[0].stylizer)]
                for one in launch:
                    with suppress(ValueError):  # nobody put it there
                        self._waiting.remove(one)
                diffuse(launch)

    def close(self) -> None:
        """Let go of the thread; a picture under way is finished first."""
        self.thread.shutdown()


def diffuse(asked: Sequence[Asked]) -> None:
    """One launch. What fails of one session's picture is what comes of that, and the others have theirs."""
    started = time.perf_counter()
    told = [one for one in asked if _told(one)]
    if not told:
        return
    stylizer, frames = told[0].stylizer, [(one.state, one.image, one.params) for one in told]
    try:
        going = stylizer.step_together(frames) if len(told) > 1 else [stylizer.step(*frames[0])]
    except Exception as error:  # noqa: BLE001 not swallowed: it is what came of every picture
        for one in told:
            one.found = error
        return
    for one in told:
        one.launched()
    pictures = [_waited(launched) for launched in going]
    if delay_ms := max(one.params.debug.style_delay_ms for one in told):
        time.sleep(delay_ms / 1000)
    took_ms = (time.perf_counter() - started) * 1000 / len(told)
    for one, launched, picture in zip(told, going, pictures, strict=True):
        if isinstance(picture, Exception):
            one.found = picture
        else:
            one.found = Diffused(picture, dict(launched.stages_ms), took_ms, len(told))


def _told(one: Asked) -> bool:
    """Tell its stream's memory of a cut, or how the scene has moved; False where that failed."""
    try:
        if one.cut:
            one.stylizer.forget(one.state)
        elif one.moved is not None:
            one.stylizer.moved(one.state, one.moved)
    except Exception as error:  # noqa: BLE001 not swallowed: it is what came of this picture
        one.found = error
    return one.found is None


def _waited(launched: Launched) -> NDArray[np.uint8] | Exception | None:
    try:
        launched.wait()
        return launched.image()
    except Exception as error:  # noqa: BLE001 not swallowed: it is what came of this picture
        return error
