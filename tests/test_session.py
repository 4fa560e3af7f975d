from __future__ import annotations

import gc
import os
import sys
import threading

import pytest

from models.params import Params
from stream.pump import start_pump
from stream.session import Session
from stream.sink import SinkClosed
from stream.worker import Worker
from tests.fakes import PATIENCE, FakeClock, FakeSink, FakeSource, FakeStylizer, frame


def test_latency_is_from_capture_to_just_before_the_sink_writes() -> None:
    clock = FakeClock()
    session = Session("1", Params(), live=True, clock=clock)

    class SlowSink(FakeSink):
        def write(self, frame: object) -> None:
            clock.advance(5.0)

    session.attach(SlowSink(), lossless=True)
    captured = clock()
    clock.advance(0.25)
    session.outlets.put(frame(0, captured))
    session.retire()
    assert session.join(PATIENCE)
    assert session.meter.latency_ms(50) == pytest.approx(250.0)
    assert session.meter.samples()[1]["write"] == [pytest.approx(5000.0)]


def test_a_slow_file_holds_back_the_source_and_loses_nothing() -> None:
    pulled: list[int] = []
    sink = FakeSink(gated=True)
    with Worker(FakeStylizer()) as worker:
        session = worker.open(Params(), live=False)
        session.attach(sink, lossless=True)
        reader = start_pump(lambda: FakeSource(30, before=pulled.append), session)
        assert sink.entered.acquire(timeout=PATIENCE)
        # one in the sink, two in its mailbox, one in the inbox: everything else waits in the source
        while len(pulled) < 4:
            assert reader.is_alive()
        assert len(pulled) == 4
        sink.let(30)
        assert session.join(PATIENCE)
    assert sink.seqs == list(range(30))
    assert (session.meter.frames_in, session.meter.frames_out, session.meter.dropped) == (30, 30, 0)


def test_live_every_captured_frame_is_written_or_counted_as_dropped() -> None:
    sink = FakeSink(gated=True)
    with Worker(FakeStylizer()) as worker:
        session = worker.open(Params(), live=True)
        session.attach(sink, lossless=False)
        reader = start_pump(lambda: FakeSource(200, live=True), session)
        reader.join(PATIENCE)
        sink.let(200)
        assert session.join(PATIENCE)
    meter = session.meter
    assert meter.frames_in == 200 == meter.frames_out + meter.dropped
    assert sink.seqs == sorted(sink.seqs)
    assert sink.seqs[-1] == 199


def test_a_broken_sink_ends_its_session_and_the_other_sink_is_flushed_and_closed() -> None:
    broken, file = FakeSink(raises=OSError("disk full"), at=3), FakeSink()
    with Worker(FakeStylizer()) as worker:
        session = worker.open(Params(), live=False)
        session.attach(file, lossless=True)
        session.attach(broken, lossless=True)
        start_pump(lambda: FakeSource(1000), session).join(PATIENCE)
        assert session.join(PATIENCE)
    assert session.phase == "failed"
    assert str(session.error) == "disk full"
    assert broken.closed.is_set()
    assert file.closed.is_set()
    assert file.seqs == list(range(len(file.seqs)))
    assert 3 <= len(file.seqs) < 1000


def test_closing_the_window_ends_the_session_without_an_error() -> None:
    window = FakeSink(raises=SinkClosed("closed"), at=2)
    with Worker(FakeStylizer()) as worker:
        session = worker.open(Params(), live=False)
        session.attach(window, lossless=True)
        start_pump(lambda: FakeSource(1000), session).join(PATIENCE)
        assert session.join(PATIENCE)
    assert session.error is None
    assert session.phase == "ended"
    assert window.closed.is_set()


def test_a_sink_that_cannot_be_closed_fails_the_session() -> None:
    class Unclosable(FakeSink):
        def close(self) -> None:
            raise OSError("no room for the index")

    with Worker(FakeStylizer()) as worker:
        session = worker.open(Params(), live=False)
        session.attach(Unclosable(), lossless=True)
        start_pump(lambda: FakeSource(2), session)
        assert session.join(PATIENCE)
    assert session.phase == "failed"


def test_stopping_lets_what_is_under_way_reach_the_sink() -> None:
    sink = FakeSink(gated=True)
    with Worker(FakeStylizer()) as worker:
        session = worker.open(Params(), live=False)
        session.attach(sink, lossless=True)
        reader = start_pump(lambda: FakeSource(1000), session)
        assert sink.entered.acquire(timeout=PATIENCE)
        session.stop()
        reader.join(PATIENCE)
        sink.let(1000)
        assert session.join(PATIENCE)
    assert session.phase == "ended"
    assert sink.closed.is_set()
    assert len(sink.seqs) == session.meter.frames_in == session.meter.frames_out


def test_a_session_that_is_over_never_runs_again_and_keeps_its_first_error() -> None:
    session = Session("1", Params(), live=True)
    session.fail(OSError("first"))
    session.fail(OSError("second"))
    session.enter("running")
    session.retire()
    assert str(session.error) == "first"
    assert session.phase == "failed"


def test_join_gives_up_after_its_timeout() -> None:
    assert not Session("1", Params(), live=True).join(0)


@pytest.mark.skipif(sys.platform != "linux", reason="counts /proc/self/fd")
def test_a_hundred_sessions_leave_no_threads_and_no_files_open() -> None:
    def cycle() -> None:
        session = worker.open(Params(), live=False)
        session.attach(FakeSink(), lossless=True)
        reader = start_pump(lambda: FakeSource(2), session)
        assert session.join(PATIENCE)
        reader.join(PATIENCE)

    with Worker(FakeStylizer()) as worker:
        cycle()
        gc.collect()
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        for _ in range(100):
            cycle()
        gc.collect()
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    assert not worker.is_alive()
