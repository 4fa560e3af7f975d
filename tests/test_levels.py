"""What is given up to hold a latency, in which order, and when it is taken back. No time passes here."""

from __future__ import annotations

import pytest

from models.params import Params
from stream.config import patched
from stream.levels import DOWN_AFTER_S, RELAPSE_S, UP_AFTER_S, Controller, ladder


def levels(controller: Controller, latencies: list[float], started: float = 0.0, target: float = 50.0) -> list[int]:
    """One look a second."""
    return [controller.observe(started + i, ms, target_ms=target, top=3) for i, ms in enumerate(latencies)]


def test_each_level_gives_up_one_thing_more() -> None:
    slow = patched(Params(), {"style.steps": 4})
    words = [level.words for level in ladder(slow)]
    assert words == [
        "full quality",
        "one step",
        "keys carried along",
        "three quarters of the size",
        "half the size",
    ]
    last = ladder(slow)[-1]
    assert dict(last.settings) == {"style.steps": 1, "temporal.mode": "reproject"}
    assert last.scale == 0.5


def test_what_is_so_already_is_not_given_up() -> None:
    assert len(ladder(patched(Params(), {"temporal.mode": "reproject"}))) == 3


def test_without_a_target_nothing_is_given_up() -> None:
    assert levels(Controller(), [500.0] * 30, target=0.0) == [0] * 30


def test_a_level_is_left_only_after_the_latency_was_too_high_for_a_while() -> None:
    assert levels(Controller(), [80.0] * 3) == [0, 0, 1]
    assert levels(Controller(), [80.0, 40.0] * 20) == [0] * 40


def test_it_goes_down_as_far_as_it_must_and_no_further() -> None:
    assert levels(Controller(), [80.0] * 30)[-1] == 3
    assert max(levels(Controller(), [80.0] * 3 + [45.0] * 60)) == 1


def test_nothing_more_is_given_up_while_the_last_step_is_not_there_yet() -> None:
    controller = Controller()
    assert levels(controller, [80.0] * 3) == [0, 0, 1]
    for now in range(3, 20):
        controller.wait()
        controller.observe(float(now), 80.0, target_ms=50.0, top=3)
    assert controller.level == 1
    assert levels(controller, [80.0] * 3, started=20.0)[-1] == 2


def test_quality_comes_back_when_there_has_been_room_for_long() -> None:
    controller = Controller(level=2)
    found = levels(controller, [20.0] * int(2 * UP_AFTER_S + 3))
    assert found[int(UP_AFTER_S) - 1] == 2
    assert found[-1] == 0


def test_between_too_high_and_room_to_spare_nothing_changes() -> None:
    assert set(levels(Controller(level=1), [45.0] * 100)) == {1}


@pytest.mark.parametrize("rounds", [4])
def test_a_step_back_that_did_not_hold_is_tried_ever_less_often(rounds: int) -> None:
    controller, now, waits = Controller(level=1), 0.0, []
    for _ in range(rounds):
        began = now
        while controller.observe(now, 20.0, target_ms=50.0, top=3):  # room at the lower quality
            now += 1
        waits.append(now - began)
        while not controller.observe(now, 80.0, target_ms=50.0, top=3):  # none at the higher
            now += 1
    assert waits == [UP_AFTER_S * 2**i for i in range(rounds)]
    assert DOWN_AFTER_S < RELAPSE_S
