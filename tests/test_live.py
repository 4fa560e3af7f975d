"""A named live stream: always a picture, whatever its source, its model and its outputs do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accel.errors import UserError
from models.params import Params
from stream import feed
from stream.config import patched
from stream.frame import Frame, VideoSpec
from stream.hub import Busy, Hub, LiveSettings
from stream.live import Event, Stream
from stream.mailbox import Mailbox
from stream.source import Size, Source, SourceChanged, SourceLost
from tests.fakes import PATIENCE, SIZE, FakeSink, FakeSource, FakeState, FakeStylizer, picture


class Camera:
    """A live source that delivers what it is told: a picture per `show`, a break per `lose`, and the end."""

    def __init__(self, size: tuple[int, int] = SIZE) -> None:
        self.spec = VideoSpec(*size, 30.0, True)
        self.warnings: list[str] = []
        self.skipped = 0
        self.opened = threading.Semaphore(0)
        self.closed = threading.Semaphore(0)
        self._next: Mailbox[Any] = Mailbox(100)

    def open(self, size: Size | None, fit: str) -> Source:
        self.opened.release()
        return self

    def show(self, value: int = 10) -> None:
        self._next.put(value)

    def lose(self, error: Exception | None = None) -> None:
        self._next.put(error or SourceLost("pulled out"))

    def end(self) -> None:
        self._next.put(END)

    def frames(self) -> Iterator[Frame]:
        for seq in range(1_000_000):
            item = self._next.get(PATIENCE)
            if item is END:
                return
            if isinstance(item, Exception):
                raise item
            size = self.spec.width, self.spec.height
            yield Frame(picture(item, size), seq * 33_333, seq, time.monotonic())

    def close(self) -> None:
        self.closed.release()


END = object()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("stream.feed.retry_delays", lambda: iter([0.0] * 100))
    hub = Hub(LiveSettings(box=SIZE, stall_s=30.0), load=load())
    yield hub
    hub.close()


def load(before: Callable[[FakeState, Params], None] = lambda state, params: None) -> Callable[..., FakeStylizer]:
    def loading(model: str, size: Size, engine: str, say: Callable[[str], None], **window: int) -> FakeStylizer:
        if model == "broken":
            raise UserError("no such model: broken", hint="mini")
        say(f"engine null: {model}")
        return FakeStylizer(size, before)

    return loading


def until(true: Callable[[], object]) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def shown(box: Mailbox[Frame], value: int) -> Frame:
    """The first frame in the box that is all of this grey."""
    for _ in range(2000):
        frame = box.get(PATIENCE)
        if (frame.image == value).all():
            return frame
    raise AssertionError("it was never shown")


def live(stream: Stream, camera: Camera, value: int = 10) -> Frame:
    """Show pictures until one comes out stylized."""
    box = stream.outlets.subscribe(100)
    for _ in range(1000):
        camera.show(value)
        try:
            frame = box.get(0.01)
        except TimeoutError:
            continue
        if (frame.image == 255 - value).all():
            box.close()
            return frame
    raise AssertionError("nothing came out")


def test_a_camera_comes_out_stylized_and_the_stream_says_so(hub: Hub) -> None:
    stream, camera = hub.open("cam"), Camera()
    assert stream.phase == "waiting"
    stream.feed(camera.open, "a camera", retry=True)
    live(stream, camera)
    assert stream.phase == "live"
    status = stream.status()
    assert status["source"]["label"] == "a camera"
    assert status["frames_out"] >= 1
    assert status["model"] == "mini"
    assert status["size"] == list(SIZE)


def test_without_a_source_there_is_a_slate(hub: Hub) -> None:
    stream = hub.open("cam")
    frame = stream.outlets.subscribe(1).get(PATIENCE)
    assert frame.image.shape == (SIZE[1], SIZE[0], 3)


def test_a_lost_camera_comes_back_and_its_pictures_go_on_in_time(hub: Hub) -> None:
    stream, camera = hub.open("cam"), Camera()
    stream.feed(camera.open, "a camera", retry=True)
    before = live(stream, camera)
    camera.lose()
    assert camera.opened.acquire(timeout=PATIENCE)
    assert camera.opened.acquire(timeout=PATIENCE)
    after = live(stream, camera, 20)
    assert after.pts > before.pts
    assert after.seq > before.seq
    assert stream.reconnects == 1


def test_a_publisher_that_hangs_up_leaves_the_stream_waiting(hub: Hub) -> None:
    stream, camera = hub.open("cam"), Camera()
    stream.feed(camera.open, "WHIP", retry=False)
    live(stream, camera)
    camera.end()
    until(lambda: stream.feeding is None)
    assert stream.phase == "waiting"


def test_a_new_source_takes_the_place_of_the_old_one_without_a_gap_in_pts(hub: Hub) -> None:
    stream, first, second = hub.open("cam"), Camera(), Camera()
    stream.feed(first.open, "first", retry=True)
    before = live(stream, first)
    feed = stream.feed(second.open, "second", retry=True)
    first.show()
    assert first.closed.acquire(timeout=PATIENCE)
    after = live(stream, second, 30)
    assert stream.feeding is feed
    assert after.pts > before.pts
    stream.unfeed(feed)
    assert stream.feeding is None


def test_a_camera_of_another_shape_gets_networks_of_its_shape(hub: Hub) -> None:
    stream, wide, tall = hub.open("cam"), Camera(), Camera((48, 64))
    opened = iter([wide, tall])
    stream.feed(lambda size, fit: next(opened), "a phone", retry=True)
    live(stream, wide)
    wide.lose(SourceChanged("turned"))
    frame = live(stream, tall)
    assert frame.image.shape == (64, 48, 3)
    assert stream.size == (48, 64)
    assert stream.reconnects == 0


def test_settings_change_live_and_a_bad_one_changes_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path))
    stream, camera = hub.open("cam"), Camera()
    stream.feed(camera.open, "a camera", retry=True)
    live(stream, camera)
    assert stream.patch({"style.prompt": "ink"}).style.prompt == "ink"
    assert stream._seat.params.style.prompt == "ink"
    with pytest.raises(UserError):
        stream.patch({"style.steps": 99})
    with pytest.raises(UserError, match="raft-small is not here yet"):
        stream.patch({"temporal.flow": "raft"})
    assert stream.params.style.prompt == "ink"


def test_a_model_that_raises_once_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = [True]

    def before(state: FakeState, params: Params) -> None:
        if failing:
            failing.clear()
            raise MemoryError("out of memory")

    hub = Hub(LiveSettings(box=SIZE), load=load(before))
    stream, camera = hub.open("cam"), Camera()
    stream.feed(camera.open, "a camera", retry=True)
    live(stream, camera)
    assert stream.phase == "live"
    hub.close()


def test_a_model_that_always_raises_fails_its_stream_alone_until_something_is_changed(hub: Hub) -> None:
    bad, good = hub.open("bad", params=patched(Params(), {"style.prompt": "boom"})), hub.open("good")
    one, two = Camera(), Camera()
    bad.feed(one.open, "one", retry=True)
    good.feed(two.open, "two", retry=True)

    def failed() -> bool:
        one.show()
        return bad.phase == "failed"

    until(failed)
    assert "boom" in bad.words()
    live(good, two)
    bad.patch({"style.prompt": "ink"})
    live(bad, one)
    assert bad.phase == "live"


def test_a_recording_begins_again_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "AGAIN_S", 0.0)
    opened: list[FakeSource] = []

    def film(size: object, fit: str) -> FakeSource:
        opened.append(FakeSource(3, before=lambda seq: time.sleep(0.005)))
        return opened[-1]

    stream = hub.open("film")
    feeding = stream.feed(film, "a film", retry=True)
    until(lambda: len(opened) >= 4)
    assert (stream.reconnects, feeding.lost) == (0, "")
    assert opened[0].closed
    stream.unfeed()


def test_a_model_that_cannot_be_loaded_is_said_and_the_slate_goes_on(hub: Hub) -> None:
    stream, camera = hub.open("cam", model="broken"), Camera()
    stream.feed(camera.open, "a camera", retry=True)
    camera.show()
    until(lambda: stream.phase == "failed")
    assert "no such model" in stream.words()
    stream.swap("mini")
    live(stream, camera)


def test_an_output_that_breaks_ends_alone(hub: Hub) -> None:
    stream, camera = hub.open("cam"), Camera()
    stream.feed(camera.open, "a camera", retry=True)
    broken, fine = stream.attach(FakeSink(raises=UserError("the disk is full"))), stream.attach(FakeSink())
    live(stream, camera)
    until(lambda: not broken.is_alive())
    assert isinstance(broken.error, UserError)
    assert fine.is_alive()
    fine.stop()
    fine.join(PATIENCE)
    assert fine.sink.closed.is_set()  # type: ignore[attr-defined]


def test_closing_the_hub_closes_every_output() -> None:
    hub = Hub(LiveSettings(box=SIZE), load=load())
    output = hub.open("cam").attach(FakeSink())
    hub.close()
    assert output.sink.closed.is_set()  # type: ignore[attr-defined]
    assert not hub.alive
    assert not hub.worker.is_alive()


def test_names_and_numbers_of_streams_are_limited(hub: Hub) -> None:
    hub.open("a")
    for name in ("a", "", "x" * 65, "../etc", "ä"):
        with pytest.raises(UserError):
            hub.open(name)
    for number in range(7):
        hub.open(f"s{number}")
    with pytest.raises(Busy):
        hub.open("one-more")
    assert hub.remove("a")
    assert not hub.remove("a")
    hub.open("one-more")


def test_no_room_where_a_stated_latency_could_not_be_kept(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.open("cam", params=patched(Params(), {"temporal.latency_ms": 50}))
    monkeypatch.setattr(Stream, "turn_ms", lambda self: 30.0)
    with pytest.raises(Busy, match="60 ms") as refused:
        hub.open("more")
    assert refused.value.retry_after_s > 0


def test_what_happens_is_told(hub: Hub) -> None:
    box = hub.events.subscribe(1000)
    stream, camera = hub.open("cam"), Camera()
    stream.feed(camera.open, "a camera", retry=True)
    live(stream, camera)
    until(lambda: stream.phase == "live")
    stream.patch({"style.prompt": "ink"})
    seen: list[Event] = []

    def told() -> bool:
        while (event := box.poll()) is not None:
            seen.append(event)
        return {"source", "phase", "params"} <= {event.kind for event in seen}

    until(told)
    assert all(event.stream == "cam" for event in seen)


def test_the_originals_are_what_came_in(hub: Hub) -> None:
    stream, camera = hub.open("cam"), Camera()
    box = stream.originals.subscribe(100)
    stream.feed(camera.open, "a camera", retry=True)
    camera.show(77)
    assert np.all(box.get(PATIENCE).image == 77)


def test_a_stream_made_for_a_publisher_is_forgotten_when_nobody_uses_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream.hub.FORGET_S", 0.3)
    hub.open("kept")
    hub.open("watched", transient=True).viewers += 1
    hub.open("left", transient=True)
    until(lambda: hub.get("left") is None)
    assert {stream.name for stream in hub.streams()} == {"kept", "watched"}
