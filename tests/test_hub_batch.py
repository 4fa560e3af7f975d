"""Streams of one model and size share launches, once there are two of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from accel.errors import UserError
from stream.hub import Hub, LiveSettings
from tests.fakes import FakeStylizer
from tests.test_live import SIZE, Camera, live, until


class Widened(FakeStylizer):
    """Has no memory for three."""

    asked: tuple[int | None, ...] = ()

    def widen(self, count: int | None = None) -> None:
        try:
            if count == 3:
                raise UserError("too little memory", hint="")
            super().widen(count)
        finally:
            self.asked = *self.asked, count


@pytest.fixture
def made() -> list[Widened]:
    return []


@pytest.fixture
def hub(request: pytest.FixtureRequest, made: list[Widened]) -> Iterator[Hub]:
    def load(model: str, size: tuple[int, int], *rest: Any, **build: Any) -> Widened:
        made.append(Widened(size))
        return made[-1]

    hub = Hub(LiveSettings(box=SIZE, stall_s=30.0, batch=request.param), load=load)
    yield hub
    hub.close()


@pytest.mark.parametrize(("hub", "width"), [(4, 4), (None, 1), (3, 1)], indirect=["hub"])
def test_the_second_stream_of_a_model_has_engines_made_for_both(hub: Hub, width: int, made: list[Widened]) -> None:
    first, second = Camera(), Camera()
    stream = hub.open("one")
    stream.feed(first.open, "a camera", retry=True)
    live(stream, first)
    assert not made[0].asked  # nobody to share with
    other = hub.open("two")
    other.feed(second.open, "another", retry=True)
    live(other, second)
    until(lambda: made[0].asked)
    assert made[0].asked == (hub.settings.batch,)
    assert len(made) == 1
    assert made[0].width == width
    live(stream, first)
    live(other, second)
