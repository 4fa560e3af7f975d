"""Every fake of the tests: a clock, sources, sinks and a stylizer that do what they are told."""

from __future__ import annotations

import functools
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.launched import Failed, Launched, Stages
from models.params import Params
from stream.clocks import Clocks, Turn
from stream.frame import Frame, VideoSpec
from stream.source import SourceLost

PATIENCE = 10.0  # s until a test that waits for a thread gives up; never how long it takes
SIZE = (64, 48)  # (width, height)


def in_a_quiet_moment(test: Callable[..., None]) -> Callable[..., None]:
    """Of a test that measures real time on a machine that others use too: it holds in one of three attempts."""

    @functools.wraps(test)
    def attempts(*arguments: Any, **fixtures: Any) -> None:
        for left in (2, 1, 0):
            try:
                return test(*arguments, **fixtures)
            except AssertionError:
                if not left:
                    raise

    return attempts


class FakeClock:
    """Time that stands still until it is advanced."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def picture(value: int, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """A flat grey picture."""
    return np.full((size[1], size[0], 3), value % 256, np.uint8)


def frame(seq: int, captured: float | None = None, fps: float = 25.0) -> Frame:
    """The frame number `seq` of a stream, its grey telling its number."""
    return Frame(picture(seq), int(seq * 1e6 / fps), seq, time.monotonic() if captured is None else captured)


class FakeSource:
    """`count` frames, then the end or, with `lost`, a break. `before(seq)` runs before each frame is made."""

    def __init__(
        self,
        count: int = 10,
        *,
        live: bool = False,
        lost: bool = False,
        size: tuple[int, int] = SIZE,
        before: Callable[[int], None] = lambda seq: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = VideoSpec(size[0], size[1], 25.0, live, frames=count)
        self.warnings: list[str] = []
        self.skipped = 0
        self.closed = 0
        self._count, self._lost, self._before, self._clock = count, lost, before, clock

    def frames(self) -> Iterator[Frame]:
        for seq in range(self._count):
            self._before(seq)
            yield frame(seq, self._clock())
        if self._lost:
            raise SourceLost("the camera went away")

    def close(self) -> None:
        self.closed += 1


class FakeSink:
    """Keeps what it is given. With `gated`, every write waits for `let(n)`; `raises` comes at frame `at`."""

    def __init__(self, *, gated: bool = False, raises: BaseException | None = None, at: int = 0) -> None:
        self.frames: list[Frame] = []
        self.written = 0
        self.warnings: list[str] = []
        self.closed = threading.Event()
        self.entered = threading.Semaphore(0)
        self._gate = threading.Semaphore(0) if gated else None
        self._raises, self._at = raises, at

    def let(self, count: int = 1) -> None:
        assert self._gate
        self._gate.release(count)

    def write(self, frame: Frame) -> None:
        self.entered.release()
        if self._gate:
            assert self._gate.acquire(timeout=PATIENCE)
        if self._raises and len(self.frames) == self._at:
            raise self._raises
        self.frames.append(frame)
        self.written += 1

    def close(self) -> None:
        self.closed.set()

    @property
    def seqs(self) -> list[int]:
        return [frame.seq for frame in self.frames]


@dataclass
class FakeLaunched:
    picture: NDArray[np.uint8]
    stages_ms: dict[str, float]

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None

    def image(self) -> NDArray[np.uint8]:
        return self.picture


@dataclass
class FakeState:
    params: list[Params] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    cuts: int = 0
    moves: list[Any] = field(default_factory=list)  # flows it was told of
    transition: None = None


class FakeStylizer:
    """Inverts the picture; remembers settings and threads. A prompt of "boom" raises; `before` runs in each step."""

    device = "cpu"

    def __init__(
        self, size: tuple[int, int] = SIZE, before: Callable[[FakeState, Params], None] = lambda state, params: None
    ) -> None:
        self.size = size
        self.info: dict[str, object] = {"model": "fake", "engine": "null", "device": "cpu", "versions": {"numpy": "2"}}
        self.states: list[FakeState] = []
        self.launches: list[int] = []  # of several frames: how many
        self._before = before

    def open(self, params: Params) -> Any:
        self.states.append(FakeState())
        return self.states[-1]

    def step(self, state: Any, image: NDArray[np.uint8], params: Params) -> FakeLaunched:
        state.params.append(params)
        state.threads.add(threading.current_thread().name)
        self._before(state, params)
        if params.style.prompt == "boom":
            raise ArithmeticError("boom")
        return FakeLaunched(255 - image, {"encode": 1.0, "unet": 2.0, "decode": 0.5})

    delay = 0
    width = 1  # frames of a launch

    def step_together(self, frames: Sequence[tuple[Any, NDArray[np.uint8], Params]]) -> list[Launched]:
        assert 1 < len(frames) <= self.width
        self.launches.append(len(frames))
        return [self._or_failed(*frame) for frame in frames]

    def _or_failed(self, state: Any, image: NDArray[np.uint8], params: Params) -> Launched:
        try:
            return self.step(state, image, params)
        except Exception as error:  # noqa: BLE001 what it must be told with
            return Failed(error, Stages())

    def company(self, params: Params) -> str:
        return params.style.lora

    def widen(self, count: int | None = None) -> None:
        self.width = count or 1

    def prepare(self, params: Params) -> None:
        """Nothing to do ahead."""

    def drain(self, state: Any) -> list[NDArray[np.uint8]]:
        return []

    def forget(self, state: Any) -> None:
        state.cuts += 1

    def moved(self, state: Any, flow: Any) -> None:
        state.moves.append(flow)

    def advice(self, params: Params) -> str:
        return "words this model does not know: zorp" if "zorp" in params.style.prompt else ""


def turned(clocks: Clocks, *arguments: Any) -> Turn:
    """A frame's turn of a session that is alone on its device."""
    turn = clocks.turn(*arguments)
    try:
        while True:
            clocks.style.device.diffuse([next(turn)])
    except StopIteration as done:
        found: Turn = done.value
        return found


def install(step_s: float = 0.0) -> None:
    """Put the fake stylizer where `models.load` is looked for: for subprocesses that test the command line."""

    def load(
        model: str,
        size: tuple[int, int],
        engine: str = "auto",
        log: Callable[[str], None] = print,
        **build: object,
    ) -> FakeStylizer:
        log(f"engine null: {model}")
        return FakeStylizer(size, before=lambda state, params: time.sleep(step_s))

    fake = types.ModuleType("models.load")
    fake.load = load  # type: ignore[attr-defined]
    sys.modules["models.load"] = fake
