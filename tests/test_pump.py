from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from accel.errors import UserError
from models.params import Params
from stream.frame import Frame
from stream.pump import pump, start_pump
from stream.session import Session
from stream.source import SourceLost
from tests.fakes import PATIENCE, FakeClock, FakeSource


def session_of(live: bool = True, clock: FakeClock | None = None) -> Session:
    return Session("1", Params(), live=live, clock=clock or FakeClock())


def collect(session: Session) -> tuple[list[Frame], threading.Thread]:
    """Take everything from the inbox, which is made lossless so that nothing depends on timing."""
    session.inbox.lossless = True
    taken: list[Frame] = []
    thread = threading.Thread(target=lambda: taken.extend(session.inbox))
    thread.start()
    return taken, thread


def test_the_end_of_the_source_closes_the_inbox_and_the_source() -> None:
    session, source = session_of(live=False), FakeSource(5)
    taken, reader = collect(session)
    pump(lambda: source, session)
    reader.join(PATIENCE)
    assert [frame.seq for frame in taken] == [0, 1, 2, 3, 4]
    assert session.inbox.drained
    assert source.closed == 1
    assert session.meter.frames_in == 5


def test_a_lossless_reader_pulls_no_frame_before_there_is_room() -> None:
    session = session_of(live=False)
    pulled = threading.Semaphore(0)
    count: list[int] = []
    source = FakeSource(3, before=lambda seq: (count.append(seq), pulled.release())[0])
    thread = start_pump(lambda: source, session)
    assert pulled.acquire(timeout=PATIENCE)
    while len(session.inbox) == 0:
        pass  # the frame is on its way into the inbox
    assert count == [0]
    for seq in range(3):
        assert session.inbox.get(PATIENCE).seq == seq
        session.inbox.release()
    thread.join(PATIENCE)
    assert session.inbox.drained


def test_a_lost_source_is_opened_again_and_seq_and_pts_go_on() -> None:
    clock = FakeClock()
    session = session_of(clock=clock)
    sources = [FakeSource(3, live=True, lost=True, clock=clock), FakeSource(3, live=True, clock=clock)]
    opened = iter(sources)
    waited: list[float] = []
    phases: list[str] = []

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        phases.append(session.phase)
        clock.advance(seconds)
        return False

    taken, reader = collect(session)
    pump(lambda: next(opened), session, wait=wait, delays=lambda: iter((1.0, 2.0)))
    reader.join(PATIENCE)
    assert [frame.seq for frame in taken] == [0, 1, 2, 3, 4, 5]
    pts = [frame.pts for frame in taken]
    assert pts == sorted(set(pts))
    assert pts[3] - pts[2] == 1_000_000
    assert waited == [1.0]
    assert phases == ["reconnecting"]
    assert session.phase == "running"
    assert [source.closed for source in sources] == [1, 1]


def test_attempts_that_fail_wait_longer_and_a_healthy_spell_starts_over() -> None:
    clock = FakeClock()
    session = session_of(clock=clock)
    long_lived = FakeSource(2, live=True, lost=True, before=lambda seq: clock.advance(20))
    script: list[FakeSource | Exception] = [
        *(FakeSource(1, live=True, lost=True), UserError("no route", "wait"), SourceLost("again")),
        *(FakeSource(1, live=True, lost=True), long_lived, FakeSource(1, live=True)),
    ]
    waited: list[float] = []

    def open() -> FakeSource:
        step = script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    taken, reader = collect(session)
    pump(open, session, wait=lambda s: bool(waited.append(s)), delays=lambda: iter((1.0, 2.0, 4.0, 8.0, 16.0)))
    reader.join(PATIENCE)
    assert waited == [1.0, 2.0, 4.0, 8.0, 1.0]
    assert len(taken) == 5


def test_the_first_open_is_not_retried() -> None:
    session = session_of()

    def open() -> FakeSource:
        raise UserError("no such camera", "plug it in")

    with pytest.raises(UserError):
        pump(open, session, wait=lambda s: pytest.fail("waited"))
    assert session.inbox.drained


def test_a_users_error_while_reading_is_not_retried() -> None:
    session = session_of()

    def spoil(seq: int) -> None:
        raise UserError("damaged file", "repair it")

    with pytest.raises(UserError, match="damaged"):
        pump(lambda: FakeSource(3, before=spoil), session, wait=lambda s: pytest.fail("waited"))


def test_patience_that_runs_out_raises_the_last_failure() -> None:
    session = session_of()
    with pytest.raises(SourceLost):
        pump(lambda: FakeSource(1, live=True, lost=True), session, wait=lambda s: False, delays=lambda: iter(()))


def test_stopping_interrupts_the_wait_for_the_next_attempt() -> None:
    session = session_of()
    opened: list[FakeSource] = []

    def delays() -> Iterator[float]:
        session.stop()  # just before the wait, which then must not take its hour
        yield 3600.0

    def open() -> FakeSource:
        opened.append(FakeSource(1, live=True, lost=True))
        return opened[-1]

    pump(open, session, delays=delays)
    assert [source.closed for source in opened] == [1]


def test_a_source_that_comes_back_in_another_size_is_the_users_error() -> None:
    session = session_of()
    opened = iter([FakeSource(1, live=True, lost=True), FakeSource(1, live=True, size=(48, 64))])
    with pytest.raises(UserError, match="48x64"):
        pump(lambda: next(opened), session, wait=lambda s: False, delays=lambda: iter((1.0,)))


def test_a_gap_in_seq_counts_as_captured_and_dropped() -> None:
    session = session_of()

    class Gappy(FakeSource):
        def frames(self) -> Iterator[Frame]:
            return (frame for frame in super().frames() if frame.seq not in (2, 3))

    taken, reader = collect(session)
    pump(lambda: Gappy(6, live=True), session)
    reader.join(PATIENCE)
    assert len(taken) == 4
    assert (session.meter.frames_in, session.meter.dropped) == (6, 2)


def test_a_frame_limit_ends_the_reading() -> None:
    session = session_of(live=False)
    taken, reader = collect(session)
    pump(lambda: FakeSource(100), session, frames=7)
    reader.join(PATIENCE)
    assert len(taken) == 7 == session.meter.frames_in
