"""What was worked out lately is kept up to a size, and found while something else is being made."""

from __future__ import annotations

import threading

import pytest

from accel.errors import UserError
from models.kept import Kept
from tests.fakes import PATIENCE


def test_what_was_not_asked_for_lately_is_forgotten_but_never_the_newest() -> None:
    kept: Kept[str, int] = Kept(10, float)
    made: list[str] = []

    def ask(key: str, size: int) -> None:
        kept.get(key, lambda: made.append(key) or size)  # type: ignore[func-returns-value]

    for key, size in [("a", 5), ("b", 5), ("a", 5), ("c", 4), ("a", 5), ("b", 5), ("huge", 99), ("huge", 99), ("a", 5)]:
        ask(key, size)
    assert made == ["a", "b", "c", "b", "huge", "a"]


def test_what_fails_is_not_kept_and_lets_others_go_on() -> None:
    kept: Kept[object, int] = Kept(128)

    def fails() -> int:
        raise UserError("no")

    with pytest.raises(UserError):
        kept.get("a", fails)
    assert kept.get("a", lambda: 1) == 1
    assert kept.get("b", lambda: kept.get("a", fails) + 1) == 2
    for i in range(256):
        kept.get(i, lambda: 0)
    assert len(kept) == 128
    assert kept.known("a") is None


def test_what_is_put_replaces_and_counts_as_the_newest() -> None:
    kept: Kept[str, int] = Kept(2)
    for key, value in [("a", 1), ("b", 1), ("a", 2), ("c", 1)]:
        kept.put(key, value)
    assert [kept.known(key) for key in "abc"] == [2, None, 1]


def test_what_is_there_is_found_while_something_else_is_made_once_for_all_who_ask() -> None:
    kept: Kept[str, int] = Kept(8)
    begun, go, made = threading.Event(), threading.Event(), []

    def slow() -> int:
        made.append(1)
        begun.set()
        assert go.wait(PATIENCE)
        return 7

    kept.put("there", 1)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(kept.get("slow", slow))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(PATIENCE)
    assert kept.get("there", lambda: 2) == 1
    go.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert found == [7, 7, 7]
    assert made == [1]
