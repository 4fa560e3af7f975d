from __future__ import annotations

import threading

import pytest

from models.params import Params
from stream.config import patched
from stream.pump import start_pump
from stream.worker import Worker
from tests.fakes import PATIENCE, FakeSink, FakeSource, FakeState, FakeStylizer, frame

STILL = Params()


def prompt(text: str) -> Params:
    return patched(STILL, {"style.prompt": text})


def test_a_turn_stylizes_one_frame_and_keeps_its_times() -> None:
    worker = Worker(FakeStylizer())
    session = worker.open(STILL, live=True)
    out = session.outlets.subscribe(2)
    before = frame(3)
    session.inbox.put(before)
    assert worker.turn()
    after = out.get(0)
    assert (after.pts, after.seq, after.captured) == (before.pts, before.seq, before.captured)
    assert (after.image == 255 - before.image).all()
    assert not worker.turn()


def test_stages_tell_the_models_times_and_the_cost_of_handing_over() -> None:
    worker = Worker(FakeStylizer())
    session = worker.open(STILL, live=True)
    session.inbox.put(frame(0))
    worker.turn()
    assert set(session.meter.samples()[1]) == {"encode", "unet", "decode", "handover"}
    assert session.meter.keys == 1


def test_sessions_take_turns() -> None:
    order: list[str] = []
    worker = Worker(FakeStylizer(before=lambda state, params: order.append(params.style.prompt)))
    sessions = [worker.open(prompt(name), live=True) for name in ("a", "b", "c")]
    for _ in range(3):
        for session in sessions:
            session.inbox.put(frame(0))
        for _ in sessions:
            worker.turn()
    assert order == ["a", "b", "c"] * 3


def test_every_session_has_its_own_memory_and_gets_its_own_pictures() -> None:
    stylizer = FakeStylizer()
    sinks = [FakeSink(), FakeSink()]
    with Worker(stylizer) as worker:
        sessions = [worker.open(prompt(f"style {n}"), live=False) for n in range(2)]
        for number, (session, sink) in enumerate(zip(sessions, sinks, strict=True)):
            session.attach(sink, lossless=True)
            start_pump(lambda n=number: FakeSource(20 + n), session)
        assert all(session.join(PATIENCE) for session in sessions)
    assert [len(sink.frames) for sink in sinks] == [20, 21]
    assert len(stylizer.states) == 2
    for state in stylizer.states:
        assert len({params.style.prompt for params in state.params}) == 1
        assert state.threads == {"worker"}  # nobody else ever touches the device


def test_a_failing_session_ends_alone() -> None:
    bad_sink, good_sink = FakeSink(), FakeSink()
    with Worker(FakeStylizer()) as worker:
        bad, good = worker.open(prompt("boom"), live=False), worker.open(STILL, live=False)
        bad.attach(bad_sink, lossless=True)
        good.attach(good_sink, lossless=True)
        for session in (bad, good):
            start_pump(lambda: FakeSource(30), session)
        assert bad.join(PATIENCE)
        assert good.join(PATIENCE)
    assert isinstance(bad.error, ArithmeticError)
    assert bad.phase == "failed"
    assert bad_sink.closed.is_set()
    assert good.error is None
    assert good_sink.seqs == list(range(30))


def test_a_full_file_of_one_session_does_not_stop_the_others() -> None:
    stuck, fine = FakeSink(gated=True), FakeSink()
    with Worker(FakeStylizer()) as worker:
        first, second = worker.open(STILL, live=False), worker.open(STILL, live=False)
        first.attach(stuck, lossless=True)
        second.attach(fine, lossless=True)
        start_pump(lambda: FakeSource(50), first)
        assert stuck.entered.acquire(timeout=PATIENCE)
        start_pump(lambda: FakeSource(50), second)
        assert second.join(PATIENCE)
        assert fine.seqs == list(range(50))
        assert stuck.seqs == []
        stuck.let(50)
        assert first.join(PATIENCE)
    assert stuck.seqs == list(range(50))


def test_settings_change_between_frames_never_within_one() -> None:
    new = prompt("new")

    def change(state: FakeState, params: Params) -> None:
        session.params = new  # while the frame is being stylized

    stylizer = FakeStylizer(before=change)
    worker = Worker(stylizer)
    session = worker.open(prompt("old"), live=True)
    for seq in range(2):
        session.inbox.put(frame(seq))
        worker.turn()
    assert [params.style.prompt for params in stylizer.states[0].params] == ["old", "new"]


def test_a_live_frame_limit_is_of_stylized_frames() -> None:
    sink = FakeSink()
    with Worker(FakeStylizer()) as worker:
        session = worker.open(STILL, live=True, frames=3)
        session.attach(sink, lossless=True)
        start_pump(lambda: FakeSource(100_000, live=True), session)
        assert session.join(PATIENCE)
    assert len(sink.frames) == 3
    assert session.phase == "ended"


def test_commands_run_between_turns_on_the_worker_thread() -> None:
    with Worker(FakeStylizer()) as worker:
        assert worker.call(lambda: threading.current_thread().name).result(PATIENCE) == "worker"
        with pytest.raises(ZeroDivisionError):
            worker.call(lambda: 1 // 0).result(PATIENCE)
        assert worker.call(lambda: "still there").result(PATIENCE) == "still there"


def test_a_closed_worker_refuses_and_a_closing_one_ends_its_sessions_cleanly() -> None:
    sink = FakeSink()
    worker = Worker(FakeStylizer())
    worker.start()
    session = worker.open(STILL, live=True)
    session.attach(sink, lossless=False)
    assert worker.close(PATIENCE)
    assert session.join(PATIENCE)
    assert session.phase == "ended"
    assert sink.closed.is_set()
    with pytest.raises(RuntimeError):
        worker.call(lambda: None)
