"""What we ask of the operating system: few arenas, no hurry."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from accel.machine import giving_way, limit_arenas, trim_memory


def test_a_result_or_an_error_comes_back_from_the_other_thread() -> None:
    assert giving_way(lambda: threading.current_thread() is threading.main_thread()) is (sys.platform != "linux")
    with pytest.raises(ZeroDivisionError):
        giving_way(lambda: 1 / 0)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no policy of their own")
def test_what_it_starts_gives_way_and_we_do_not() -> None:
    def started_inside() -> int:
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(os.sched_getscheduler(0)))
        thread.start()
        thread.join()
        return seen[0]

    before = os.sched_getscheduler(0)
    assert giving_way(started_inside) == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == before


def test_arenas_are_limited_in_a_process_of_its_own_and_trimming_is_safe() -> None:
    code = "from accel.machine import limit_arenas, trim_memory; limit_arenas(); trim_memory()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_users_own_number_of_arenas_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    monkeypatch.setattr("accel.machine.ctypes.CDLL", lambda name: pytest.fail("not to be touched"))
    limit_arenas()


def test_another_c_library_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    monkeypatch.setattr("accel.machine.ctypes.CDLL", lambda name: object())
    limit_arenas()
    trim_memory()
