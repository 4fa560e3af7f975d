"""Which sessions' pictures share a launch: what is there, what is due, and nobody who would lose by it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.params import Params
from stream.clocks import Clocks, StyleLane
from stream.config import patched
from stream.gather import Asked, Device
from stream.pump import start_pump
from stream.session import Session
from stream.worker import GATHER_S, Worker
from tests.fakes import PATIENCE, FakeClock, FakeLaunched, FakeSink, FakeSource, FakeState, FakeStylizer, frame, turned
from tests.scenes import SIZE, Image, texture

EVERY = {"temporal.mode": "every-frame"}


def settings(**changes: Any) -> Params:
    return patched(Params(), {**EVERY, **{key.replace("__", "."): value for key, value in changes.items()}})


def wide(width: int = 4, before: Callable[[FakeState, Params], None] = lambda state, params: None) -> FakeStylizer:
    stylizer = FakeStylizer(before=before)
    stylizer.widen(width)
    return stylizer


def opened(worker: Worker, count: int, params: Params | None = None) -> list[Session]:
    return [worker.open(params or settings(), live=True) for _ in range(count)]


def test_what_is_there_goes_in_one_launch_and_everybody_gets_his_own() -> None:
    stylizer = wide()
    worker = Worker(stylizer)
    sessions = opened(worker, 3)
    outlets = [session.outlets.subscribe(2) for session in sessions]
    for number, session in enumerate(sessions):
        session.inbox.put(frame(10 * number))
    assert worker.turn()
    assert stylizer.launches == [3]
    for number, out in enumerate(outlets):
        shown = out.get(0)
        assert shown.seq == 10 * number
        assert (shown.image == 255 - frame(10 * number).image).all()
    assert not worker.turn()
    assert all(set(s.meter.samples()[1]) == {"encode", "unet", "decode", "handover"} for s in sessions)


@pytest.mark.parametrize(("width", "batch", "launches"), [(2, None, [2, 2]), (4, 2, [2, 2]), (4, 3, [3]), (4, 1, [])])
def test_no_more_than_the_engines_and_the_worker_take(width: int, batch: int | None, launches: list[int]) -> None:
    stylizer = wide(width)
    worker = Worker(stylizer, batch=batch)
    sessions = opened(worker, 4)
    for session in sessions:
        session.inbox.put(frame(0))
    turns = 0
    while worker.turn():
        turns += 1
    assert stylizer.launches == launches
    assert turns == 4 - sum(launches) + len(launches)
    assert all(session.meter.keys == 1 for session in sessions)


def test_turns_go_round_when_not_all_find_room() -> None:
    order: list[str] = []
    worker = Worker(wide(2, before=lambda state, params: order.append(params.style.prompt)))
    sessions = [worker.open(settings(style__prompt=name), live=True) for name in "abc"]
    for _ in range(4):
        for session in sessions:
            session.inbox.put(frame(0))
        worker.turn()
    assert [order.count(name) for name in "abc"] in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_sessions_with_other_loras_models_or_modes_share_nothing() -> None:
    stylizer, other = wide(), wide()
    worker = Worker(stylizer)
    sessions = [
        worker.open(settings(style__lora="ink:0.5"), live=True),
        worker.open(settings(style__lora="ink:0.7"), live=True),
        worker.open(settings(style__lora="ink:0.5"), live=True, stylizer=other),
        worker.open(settings(style__lora="ink:0.5", temporal__mode="cadence", temporal__cadence=2), live=True),
    ]
    for seq in range(4):
        for session in sessions:
            session.inbox.put(frame(seq))
        while worker.turn():
            pass
    assert all(session.error is None for session in sessions)
    assert (stylizer.launches, other.launches) == ([2, 2], [])  # a cadence of two and the first one, now and then


def test_a_session_that_fails_in_a_launch_ends_alone() -> None:
    worker = Worker(wide())
    sessions = [worker.open(settings(style__prompt=name), live=True) for name in ("fine", "boom", "well")]
    outlets = [session.outlets.subscribe(2) for session in sessions]
    for seq in range(2):
        for session in sessions:
            session.inbox.put(frame(seq))
        while worker.turn():
            pass
    assert isinstance(sessions[1].error, ArithmeticError)
    assert [session.error for session in (sessions[0], sessions[2])] == [None, None]
    assert [len(out) for out in outlets] == [2, 0, 2]


def test_files_side_by_side_come_out_whole_and_in_order() -> None:
    stylizer, sinks, ready = wide(), [FakeSink() for _ in range(4)], [threading.Event() for _ in range(4)]
    worker = Worker(stylizer)
    sessions = [worker.open(settings(style__prompt=f"style {n}"), live=False) for n in range(4)]
    for number, (session, sink) in enumerate(zip(sessions, sinks, strict=True)):
        session.attach(sink, lossless=True)
        put = session.inbox.put
        session.inbox.put = lambda one, put=put, there=ready[number]: (put(one), there.set())[0]  # type: ignore[method-assign, misc]
        start_pump(lambda n=number: FakeSource(20 + 5 * n), session)  # each ends at another time
    assert all(there.wait(PATIENCE) for there in ready)
    with worker:
        assert all(session.join(PATIENCE) for session in sessions)
    assert [sink.seqs for sink in sinks] == [list(range(20 + 5 * n)) for n in range(4)]
    assert all((one.image == 255 - frame(one.seq).image).all() for sink in sinks for one in sink.frames)
    assert stylizer.launches[0] == 4
    assert all(len({params.style.prompt for params in state.params}) == 1 for state in stylizer.states)


class TestWaiting:
    """A clock that stands still, and a wait that does what it is told."""

    @pytest.fixture
    def clock(self) -> FakeClock:
        return FakeClock()

    def regular(self, worker: Worker, clock: FakeClock, sessions: list[Session], late: float = 0.0) -> None:
        """Three frames of each 40 ms apart, the second session's `late`; then the first's fourth."""
        for seq in range(3):
            for number, session in enumerate(sessions):
                session.inbox.put(frame(seq, clock.now + late * number))
            while worker.turn():
                pass
            clock.advance(0.04)

    def waits(self, worker: Worker, then: Callable[[], object] = lambda: None) -> list[float]:
        """How long the worker waited, each time; `then` happens meanwhile."""
        waited: list[float] = []

        def wait(seconds: float | None = None) -> bool:
            assert seconds is not None
            waited.append(seconds)
            return then() is not None

        worker._wake.wait = wait  # type: ignore[method-assign]
        return waited

    def test_one_session_is_never_held_up(self, clock: FakeClock) -> None:
        worker = Worker(wide(), clock=clock)
        waited = self.waits(worker)
        sessions = opened(worker, 2)
        sessions[1].stop()  # it was there a moment ago
        self.regular(worker, clock, sessions[:1])
        assert not waited

    def test_a_frame_that_is_due_is_waited_for_and_shares_the_launch(self, clock: FakeClock) -> None:
        stylizer = wide()
        worker = Worker(stylizer, clock=clock)
        sessions = opened(worker, 2)
        self.regular(worker, clock, sessions, late=0.001)
        stylizer.launches.clear()
        waited = self.waits(worker, lambda: sessions[1].inbox.put(frame(3, clock.now + 0.001)))
        sessions[0].inbox.put(frame(3, clock.now))
        assert worker.turn()
        assert waited == [pytest.approx(GATHER_S)]
        assert stylizer.launches == [2]

    def test_a_frame_that_does_not_come_is_not_waited_for_longer(self, clock: FakeClock) -> None:
        stylizer = wide()
        worker = Worker(stylizer, clock=clock)
        sessions = opened(worker, 2)
        self.regular(worker, clock, sessions)
        stylizer.launches.clear()
        waited = self.waits(worker)
        sessions[0].inbox.put(frame(3, clock.now))
        assert worker.turn()
        assert waited == [pytest.approx(GATHER_S)]
        assert not stylizer.launches
        clock.advance(0.04)  # its camera has stopped: it is not due any more
        sessions[0].inbox.put(frame(4, clock.now))
        assert worker.turn()
        assert len(waited) == 1

    @pytest.mark.parametrize("late", [0.01, 0.02, 0.03])
    def test_a_camera_of_another_phase_is_not_waited_for(self, clock: FakeClock, late: float) -> None:
        worker = Worker(wide(), clock=clock)
        sessions = opened(worker, 2)
        self.regular(worker, clock, sessions, late)
        waited = self.waits(worker)
        sessions[0].inbox.put(frame(3, clock.now))
        assert worker.turn()
        assert not waited

    def test_nobody_waits_while_another_session_would_be_held_up(self, clock: FakeClock) -> None:
        worker = Worker(wide(), clock=clock)
        sessions = [*opened(worker, 2), *opened(worker, 1, settings(temporal__mode="reproject"))]
        self.regular(worker, clock, sessions)
        waited = self.waits(worker)
        sessions[0].inbox.put(frame(3, clock.now))
        assert worker.turn()
        assert not waited
        worker._device.close()


class Gate:
    """Holds up the first step in the style lane's own thread."""

    def __init__(self) -> None:
        self.open, self.reached = threading.Event(), threading.Event()

    def __call__(self, state: FakeState, params: Params) -> None:
        if threading.current_thread().name.startswith("style"):
            self.reached.set()
            assert self.open.wait(PATIENCE)


def test_keys_that_come_while_the_device_is_busy_go_together_and_no_frame_waits_for_them() -> None:
    gate = Gate()
    stylizer = FakeStylizer(SIZE, before=gate)
    stylizer.widen(4)
    device, still, params = Device(), texture(), settings(temporal__mode="reproject")
    lanes = [Clocks(StyleLane(stylizer, device), live=True, period_ms=33.0) for _ in range(4)]
    states = [stylizer.open(params) for _ in lanes]
    for clocks, state in zip(lanes, states, strict=True):
        turned(clocks, state, still, params)  # the first one is waited for
    assert turned(lanes[0], states[0], still, params).key is None
    assert gate.reached.wait(PATIENCE)  # its key is being diffused
    for _ in range(3):
        for clocks, state in zip(lanes, states, strict=True):
            assert turned(clocks, state, still, params).image is not None
    assert stylizer.launches == []
    gate.open.set()
    for clocks in lanes:
        assert clocks._under_way is not None
        assert clocks._under_way.result(PATIENCE)[1] is not None
    assert stylizer.launches == [3]
    found = [turned(clocks, state, still, params).key for clocks, state in zip(lanes, states, strict=True)]
    assert [key and key.together for key in found] == [1, 3, 3, 3]
    device.close()


def test_a_launch_of_frames_takes_a_key_along_that_waits() -> None:
    stylizer, device = wide(), Device()
    waiting, alone = (Asked(stylizer, stylizer.open(Params()), frame(n).image, settings()) for n in (1, 2))
    stranger = Asked(wide(), FakeState(), frame(3).image, settings())
    for key in (waiting, stranger):
        device.put(key)
    device.diffuse([alone])
    assert stylizer.launches == [2]
    assert alone.picture().together == waiting.picture().together == 2
    assert (waiting.picture().image == 255 - frame(1).image).all()
    assert stranger.found is None
    device.diffuse([waiting])  # has come to something already
    assert stylizer.launches == [2]
    device.close()


def test_a_picture_costs_its_share_of_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.03])
    slept: list[float] = []
    monkeypatch.setattr("stream.gather.time", SimpleNamespace(perf_counter=lambda: next(times), sleep=slept.append))
    stylizer, device = wide(), Device()
    delays = (0, 40, 10)
    asked = [
        Asked(stylizer, FakeState(), frame(n).image, settings(debug__style_delay_ms=ms)) for n, ms in enumerate(delays)
    ]
    device.diffuse(asked)
    assert [one.picture().took_ms for one in asked] == [pytest.approx(10.0)] * 3
    assert all(one.picture().stages_ms == {"encode": 1.0, "unet": 2.0, "decode": 0.5} for one in asked)
    assert slept == [0.04]
    device.close()


def test_a_sessions_turn_is_its_share_of_the_workers_time() -> None:
    clock = FakeClock()
    worker = Worker(wide(before=lambda state, params: clock.advance(0.01)), clock=clock)
    sessions = opened(worker, 2)
    for session in sessions:
        session.inbox.put(frame(0, clock.now))
    worker.turn()
    assert sum(session.turn_ms for session in sessions) == pytest.approx(0.2 * 20.0)  # of 20 ms, as fast as it learns


class Unmoved(FakeStylizer):
    """Cannot be told of motion."""

    def moved(self, state: Any, flow: Any) -> None:
        raise ArithmeticError("no motion")


@pytest.mark.parametrize("bad", [0, 1])
def test_what_cannot_be_told_of_motion_fails_alone(bad: int) -> None:
    stylizer, device = Unmoved(), Device()
    stylizer.widen(2)
    asked = [Asked(stylizer, FakeState(), frame(n).image, settings()) for n in range(2)]
    asked[bad].moved = np.zeros(1)  # type: ignore[assignment]
    device.diffuse(asked)
    with pytest.raises(ArithmeticError):
        asked[bad].picture()
    assert asked[1 - bad].picture().together == 1
    device.close()


class Lost(FakeStylizer):
    """A device that is gone."""

    def step_together(self, frames: Any) -> Any:
        raise RuntimeError("the card is gone")

    def step(self, state: Any, image: Image, params: Params) -> FakeLaunched:
        raise RuntimeError("the card is gone")


@pytest.mark.parametrize("count", [1, 3])
def test_a_launch_that_fails_is_what_came_of_every_picture_and_the_device_goes_on(count: int) -> None:
    stylizer, device = Lost(), Device()
    stylizer.widen(4)
    asked = [Asked(stylizer, FakeState(), frame(n).image, settings()) for n in range(count)]
    device.diffuse(asked)
    for one in asked:
        with pytest.raises(RuntimeError, match="gone"):
            one.picture()
    fine = Asked(wide(), FakeState(), frame(0).image, settings())
    device.diffuse([fine])
    assert fine.picture().image is not None
    device.close()
