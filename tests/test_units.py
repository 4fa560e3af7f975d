"""The setting `style.control`: read as written, refused with a hint, never a hang."""

from __future__ import annotations

import time

import pytest

from accel.errors import UserError
from models.control import CONTROLS
from models.units import KINDS, UNITS, Unit, advice, controls_of, units_of


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("", ()),
        (" , ,", ()),
        ("canny", (Unit("canny"),)),
        ("canny:0.8", (Unit("canny", weight=0.8),)),
        ("Canny : .8 ,", (Unit("canny", weight=0.8),)),
        ("tile:0.5@0-0.6", (Unit("tile", weight=0.5, end=0.6),)),
        ("tile @ 0.25 - 1 ! Prompt", (Unit("tile", start=0.25, mode="prompt"),)),
        ("lineart:1!prompt", (Unit("lineart", mode="prompt"),)),
        ("softedge!control", (Unit("softedge", mode="control"),)),
        ("depth=some where/net:1", (Unit("depth", "some where/net"),)),
        (r"depth=C:\nets\depth:2@0-0.5", (Unit("depth", r"C:\nets\depth", 2.0, end=0.5),)),
        ("canny=me@home/net", (Unit("canny", "me@home/net"),)),
        ("canny:0, tile:2", (Unit("canny", weight=0), Unit("tile", weight=2))),
        ("canny@0-0.5, canny:0.3@0.5-1", (Unit("canny", end=0.5), Unit("canny", weight=0.3, start=0.5))),
    ],
)
def test_units_are_read_as_written(text: str, units: tuple[Unit, ...]) -> None:
    assert units_of(text) == units


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sketch:1", "no such control"),
        ("canny!loud", "no such mode"),
        ("canny=net!loud", "no such mode"),
        ("canny:2.1", "weight"),
        ("canny:-1", "weight"),
        ("canny:1.2.3", "not a number"),
        ("canny:.", "not a number"),
        ("canny@0.6-0.2", "from 0.6 to 0.2"),
        ("canny@0-1.5", "from 0 to 1.5"),
        ("canny@0.5", "cannot be read"),
        ("canny:nan", "cannot be read"),
        ("canny:1e400", "cannot be read"),
        ("canny=", "cannot be read"),
        ("canny= :1", "cannot be read"),
        ("canny tile", "cannot be read"),
        ("=folder", "cannot be read"),
        (":::@@@!!!===", "cannot be read"),
        ("canny=\x00", "characters"),
        ("canny=\u202egnp.eniltuo", "characters"),
        ("canny:٣", "cannot be read"),
        (",".join(["canny"] * (UNITS + 1)), "units"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_hint(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        units_of(text)
    assert caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", ["canny=" + ":1" * 496, "canny" + ":" * 990, "canny=" + "!a@0-1:1" * 120 + "?"])
def test_hostile_text_takes_no_time(text: str) -> None:
    started = time.perf_counter()
    try:
        units_of(text)
    except UserError as error:
        assert len(error.message) < 200  # noqa: PT017
    assert time.perf_counter() - started < 0.5


def test_the_kinds_are_those_that_can_be_drawn() -> None:
    assert set(KINDS) == {*CONTROLS, "depth"}


def test_only_kinds_and_folders_decide_which_networks_are_needed() -> None:
    assert controls_of("") == ()
    assert controls_of("tile:0.5, canny") == controls_of("canny:0@0.5-1!prompt, tile") == ("canny", "tile")
    assert controls_of("canny=a, canny=b, canny") == ("canny", "canny=a", "canny=b")


def test_soft_weights_are_the_published_ones() -> None:
    scales = Unit("canny", mode="prompt").scales(13)
    assert [round(scales[i], 4) for i in (0, 6, 12)] == [0.0994, 0.3153, 1.0]
    assert Unit("canny", weight=0.8).scales(13) == [0.8] * 13
    assert Unit("canny", weight=0.5, mode="prompt").scales(10)[-1] == 0.5  # SDXL has ten


def test_start_and_end_choose_whole_steps() -> None:
    def steps(unit: Unit, of: int) -> list[int]:
        return [step for step in range(of) if unit.speaks(step, of)]

    assert steps(Unit("canny"), 4) == [0, 1, 2, 3]
    assert steps(Unit("canny", end=0.6), 4) == [0, 1]
    assert steps(Unit("canny", start=0.5), 4) == [2, 3]
    assert steps(Unit("canny", start=0.3, end=0.9), 4) == [2]
    assert steps(Unit("canny", end=0.6), 1) == []  # the one step reaches beyond it, as in diffusers
    assert steps(Unit("canny", weight=0), 4) == []


def test_units_that_never_count_are_pointed_out() -> None:
    assert "tile control counts in none of 1 steps" in advice("canny, tile:0.5@0-0.6", 1)
    assert advice("canny, tile:0.5@0-0.6, canny:0@0-0.1", 4) == ""


def test_mode_control_is_silent_in_the_unwanted_pass() -> None:
    assert not Unit("canny", mode="control").speaks(0, 1, wanted=False)
    assert Unit("canny", mode="control").speaks(0, 1)
    assert Unit("canny", mode="prompt").speaks(0, 1, wanted=False)
