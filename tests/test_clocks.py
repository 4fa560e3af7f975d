"""The two clocks: which frames are diffused, what is shown for the others, and that nobody waits who should not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accel.errors import UserError
from models import temporal
from models.flow import Dis
from models.lane import made
from models.params import Params, Temporal
from models.reproject import GUIDE, Key, Track
from models.state import State
from stream.clocks import FADE, Clocks, StyleLane, Turn
from stream.config import patched
from stream.gather import Asked, Diffused
from stream.pacing import Costs, Plan, affordable, plan
from stream.pump import start_pump
from stream.worker import Worker
from tests.fakes import PATIENCE, FakeLaunched, FakeSink, FakeSource, FakeState, FakeStylizer, turned
from tests.fakes import frame as grey_frame
from tests.scenes import SIZE, Image, sliding, texture

FEATURES = {
    "every-frame": {"temporal.mode": "every-frame", "temporal.refiner": "off"},
    "every-frame, refined": {"temporal.mode": "every-frame", "temporal.refiner": "analytic"},
    "cadence 1": {"temporal.mode": "cadence", "temporal.cadence": 1, "temporal.refiner": "off"},
    "cadence 2": {"temporal.mode": "cadence", "temporal.cadence": 2, "temporal.refiner": "off"},
    "cadence 4": {"temporal.mode": "cadence", "temporal.cadence": 4, "temporal.refiner": "off"},
    "cadence 4, refined": {"temporal.mode": "cadence", "temporal.cadence": 4, "temporal.refiner": "analytic"},
    "reproject": {"temporal.mode": "reproject", "temporal.refiner": "off"},
    "reproject, refined": {"temporal.mode": "reproject", "temporal.refiner": "analytic"},
    "noise that moves": {"temporal.mode": "every-frame", "temporal.refiner": "off", "style.seed_mode": "flow"},
    "feedback": {"temporal.mode": "every-frame", "temporal.refiner": "off", "temporal.feedback": 0.2},
}


def settings(**changes: Any) -> Params:
    """`mode="cadence"` is temporal.mode, `debug_flicker` is debug.flicker."""
    names = {key: key.replace("debug_", "debug.") if "debug" in key else f"temporal.{key}" for key in changes}
    return patched(Params(), {names[key]: value for key, value in changes.items()})


class Watched(StyleLane):
    """Keeps what is under way in its thread."""

    def __init__(self, stylizer: Any) -> None:
        super().__init__(stylizer)
        self.started: list[Future[tuple[Diffused, Key]]] = []

    def later(self, *args: Any, **settings: Any) -> Future[tuple[Diffused, Key]]:
        self.started.append(super().later(*args, **settings))
        return self.started[-1]


class Instant(StyleLane):
    """A device so fast that a key is there by the next frame."""

    def later(
        self, state: State, image: Image, params: Params, track: Track, **told: Any
    ) -> Future[tuple[Diffused, Key]]:
        future: Future[tuple[Diffused, Key]] = Future()
        asked = Asked(self.stylizer, state, image, params, **told)
        self.device.diffuse([asked])
        future.set_result((asked.picture(), made(track, asked.picture().image)))
        return future


class Gate:
    """Holds up what the style lane's own thread diffuses; the worker thread passes."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.reached = threading.Semaphore(0)

    def __call__(self, state: FakeState, params: Params) -> None:
        if threading.current_thread().name.startswith("style"):
            self.reached.release()
            assert self.open.wait(PATIENCE)


class Told(FakeStylizer):
    """Writes down when steps begin and end, and when a state is to forget."""

    def __init__(self, before: Callable[[FakeState, Params], None] = lambda state, params: None) -> None:
        super().__init__(SIZE, before)
        self.log: list[str] = []

    def step(self, state: Any, image: Image, params: Params) -> FakeLaunched:
        self.log.append("begin")
        try:
            return super().step(state, image, params)
        finally:
            self.log.append("end")

    def forget(self, state: Any) -> None:
        self.log.append("forget")
        super().forget(state)


def run(
    frames: Iterable[Image],
    params: Params,
    *,
    style: StyleLane | None = None,
    clocks: Clocks | None = None,
    state: Any = None,
) -> list[Turn]:
    """Every frame through the clocks of one session."""
    style = style or Instant(FakeStylizer(SIZE))
    clocks = clocks or Clocks(style, live=True, period_ms=1e9)
    state = state or style.stylizer.open(params)
    return [turned(clocks, state, frame, params) for frame in frames]


def images(turns: list[Turn]) -> list[Image]:
    return [turn.image for turn in turns]


def held(thing: object, seen: set[int] | None = None) -> tuple[int, int]:
    """How many tensors and arrays an object keeps, and their bytes."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, type | Params | FakeState):
        return 0, 0
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return 1, thing.untyped_storage().nbytes()
    if isinstance(thing, np.ndarray):
        return 1, thing.nbytes
    parts: list[object] = []
    if isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, Iterable) and hasattr(thing, "__len__") and not isinstance(thing, (str, bytes)):
        parts = list(thing)
    else:
        parts = list(getattr(thing, "__dict__", {}).values())
        if is_dataclass(thing):
            parts += [getattr(thing, part.name) for part in fields(thing)]
    counts = [held(part, seen) for part in parts]
    return sum(count for count, _ in counts), sum(size for _, size in counts)


class TestEveryFeature:
    """What holds for all of them."""

    pytestmark = pytest.mark.parametrize("feature", FEATURES)

    def test_a_frame_does_not_depend_on_those_after_it(self, feature: str) -> None:
        params = patched(Params(), FEATURES[feature])
        seen = sliding(9)
        one, other = (
            images(run([*seen, *after], params)) for after in (sliding(5, seed=1), [texture(s) for s in range(2, 7)])
        )
        assert all((a == b).all() for a, b in zip(one[:9], other[:9], strict=True))
        assert any((a != b).any() for a, b in zip(one[9:], other[9:], strict=True))

    def test_a_picture_comes_out_for_every_one_that_goes_in(self, feature: str) -> None:
        frames = [np.full((SIZE[1], SIZE[0], 3), 20 * i, np.uint8) for i in range(11)]  # each another scene: cuts
        turns = run(frames, patched(Params(), FEATURES[feature]))
        assert len(turns) == 11
        assert all(turn.image.shape == frames[0].shape and turn.image.dtype == np.uint8 for turn in turns)
        means = [float(turn.image.mean()) for turn in turns]
        assert means == sorted(means, reverse=True)  # inverted, in order

    def test_a_still_source_shows_its_stylized_picture_to_the_byte(self, feature: str) -> None:
        still = texture()
        output = images(run([still] * 9, patched(Params(), FEATURES[feature])))
        assert all((image == 255 - still).all() for image in output)

    def test_it_holds_no_more_after_hundreds_of_frames(self, feature: str) -> None:
        size = (64, 48)
        params = patched(Params(), FEATURES[feature])
        style = Instant(FakeStylizer(size))
        clocks = Clocks(style, live=True, period_ms=1e9)
        state = style.stylizer.open(params)
        scenes = sliding(20, (1, 1), size=size), sliding(20, (-2, 0), seed=3, size=size)
        frames = [*scenes[0], *scenes[1]]
        run(frames, params, style=style, clocks=clocks, state=state)
        first = held(clocks)
        for _ in range(4):
            run(frames, params, style=style, clocks=clocks, state=state)
        assert held(clocks) == first
        assert (first[0] > 0) == (feature != "every-frame")
        assert first[1] < 30 * 4 * 3 * size[0] * size[1]  # and that is some thirty pictures at most


@pytest.mark.parametrize("feature", ["every-frame", "cadence 1"])
def test_neutral_settings_pass_the_stylized_bytes_on(feature: str) -> None:
    frames = [*sliding(5), *sliding(5, (3, 1), seed=2)]
    output = images(run(frames, patched(Params(), FEATURES[feature])))
    assert all((image == 255 - frame).all() for image, frame in zip(output, frames, strict=True))


@pytest.mark.parametrize("every", [1, 2, 4])
def test_cadence_diffuses_every_nth_frame(every: int) -> None:
    style = Instant(FakeStylizer(SIZE))
    turns = run(sliding(13, (1, 0)), settings(mode="cadence", cadence=every), style=style)
    assert [number for number, turn in enumerate(turns) if turn.key] == list(range(0, 13, every))
    assert len(style.stylizer.states[0].params) == len(range(0, 13, every))  # type: ignore[attr-defined]


def test_a_key_counts_towards_the_time_of_a_frame_that_waited_for_it() -> None:
    first, second, *_ = run(sliding(3), settings(mode="cadence", cadence=2))
    assert first.key is not None
    assert first.key.stages_ms == {"encode": 1.0, "unet": 2.0, "decode": 0.5}
    assert first.waited
    assert second.key is None
    assert {"flow", "warp", "refine"} <= set(second.stages_ms)


class TestReproject:
    """A style lane that is far slower than the frames."""

    params = settings(mode="reproject")

    def test_no_frame_waits_for_a_slow_key_and_it_is_shown_when_it_is_there(self) -> None:
        gate, still = Gate(), texture()
        stylizer = FakeStylizer(SIZE, before=gate)
        style = Watched(stylizer)
        clocks, state = Clocks(style, live=True, period_ms=33.0), stylizer.open(self.params)

        def turns(count: int) -> list[Turn]:
            return run([still] * count, self.params, style=style, clocks=clocks, state=state)

        first, *others = turns(6)
        assert first.key is not None  # the first one is waited for: there is nothing to show
        assert first.waited
        assert gate.reached.acquire(timeout=PATIENCE)  # another one is being diffused, and is not let through
        assert len(style.started) == 1
        assert not style.started[0].done()
        assert all(turn.key is None and not turn.waited for turn in others)
        assert all((turn.image == 255 - still).all() for turn in others)
        gate.open.set()
        style.started[0].result(PATIENCE)
        (arrival,) = turns(1)
        assert arrival.key is not None
        assert not arrival.waited
        assert len(style.started) == 1  # a frame's rest
        turns(1)
        assert len(style.started) == 2  # the next one is on its way
        style.close()

    def test_a_late_key_fades_in(self) -> None:
        gate, still = Gate(), texture()
        level = [10]

        class Flat(FakeStylizer):
            def step(self, state: Any, image: Image, params: Params) -> FakeLaunched:
                launched = super().step(state, image, params)
                return FakeLaunched(np.full_like(image, level[0]), launched.stages_ms)

        stylizer = Flat(SIZE, before=gate)
        style = Watched(stylizer)
        clocks = Clocks(style, live=True, period_ms=33.0)
        params, state = settings(mode="reproject", refiner="off"), stylizer.open(Params())
        run([still], params, style=style, clocks=clocks, state=state)
        level[0] = 210
        run([still], params, style=style, clocks=clocks, state=state)
        gate.open.set()
        style.started[0].result(PATIENCE)
        gate.open.clear()  # nothing more comes
        faded = run([still] * (FADE + 1), params, style=style, clocks=clocks, state=state)
        expected = [10 + 200 * min(1, (i + 1) / FADE) for i in range(FADE + 1)]
        np.testing.assert_allclose([turn.image.mean() for turn in faded], expected, atol=1)
        gate.open.set()
        style.close()

    def test_only_one_key_is_under_way(self) -> None:
        gate = Gate()
        style = Watched(FakeStylizer(SIZE, before=gate))
        run([texture()] * 20, self.params, style=style)
        assert len(style.started) == 1
        gate.open.set()
        style.close()

    def test_the_memory_of_a_stream_is_never_touched_while_a_key_is_under_way(self) -> None:
        """A cut comes while the style lane diffuses: it forgets before the next key, not in the middle of this one."""
        gate = Gate()
        stylizer = Told(gate)
        style = Watched(stylizer)
        clocks, state = Clocks(style, live=True, period_ms=33.0), stylizer.open(self.params)

        def turn(image: Image) -> None:
            turned(clocks, state, image, self.params)

        turn(texture(0))
        turn(texture(0))
        assert gate.reached.acquire(timeout=PATIENCE)
        turn(texture(1))
        turn(texture(1))
        assert stylizer.log == ["begin", "end", "begin"]
        gate.open.set()
        style.started[0].result(PATIENCE)
        turn(texture(1))  # the key comes in
        turn(texture(1))  # the next one is begun
        style.started[1].result(PATIENCE)
        assert stylizer.log == ["begin", "end", "begin", "end", "forget", "begin", "end"]
        assert state.cuts == 1
        style.close()

    def test_a_failing_key_ends_that_session_alone(self) -> None:
        def fails(state: FakeState, params: Params) -> None:
            if threading.current_thread().name.startswith("style") and params.style.prompt == "bad":
                raise ArithmeticError("the key failed")

        sinks = FakeSink(), FakeSink()
        with Worker(FakeStylizer(before=fails)) as worker:
            bad = worker.open(patched(self.params, {"style.prompt": "bad"}), live=False)
            good = worker.open(self.params, live=False)
            for session, sink, count in ((bad, sinks[0], 100_000), (good, sinks[1], 30)):
                session.attach(sink, lossless=True)
                start_pump(lambda n=count: FakeSource(n), session)
            assert bad.join(PATIENCE)
            assert good.join(PATIENCE)
        assert isinstance(bad.error, ArithmeticError)
        assert bad.phase == "failed"
        assert good.error is None
        assert sinks[1].seqs == list(range(30))

    def test_a_session_may_end_with_a_key_under_way(self) -> None:
        gate, sink = Gate(), FakeSink()
        with Worker(FakeStylizer(before=gate)) as worker:
            session = worker.open(self.params, live=False)
            session.attach(sink, lossless=True)
            start_pump(lambda: FakeSource(10), session)
            assert session.join(PATIENCE)
            gate.open.set()
        assert session.error is None
        assert sink.seqs == list(range(10))


@pytest.mark.parametrize("feature", FEATURES)
def test_all_frames_of_a_file_come_out_in_order(feature: str) -> None:
    sink = FakeSink()
    with Worker(FakeStylizer()) as worker:
        session = worker.open(patched(Params(), FEATURES[feature]), live=False)
        session.attach(sink, lossless=True)
        start_pump(lambda: FakeSource(25), session)
        assert session.join(PATIENCE)
    assert session.error is None
    assert sink.seqs == list(range(25))


def test_settings_may_change_at_any_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.lane.flow_estimator", lambda name: Dis())  # whatever its name
    order = ("reproject", "cadence 2", "every-frame", "reproject, refined", "every-frame, refined", "cadence 1")
    style = StyleLane(FakeStylizer(SIZE))
    clocks, state = Clocks(style, live=True, period_ms=33.0), style.stylizer.open(Params())
    for number, frame in enumerate(sliding(48, (1, 0))):
        params = patched(Params(), FEATURES[order[number // 4 % len(order)]])
        if number % 8 > 5:
            params = patched(params, {"temporal.flow": "raft"})
        turn = turned(clocks, state, frame, params)
        assert turn.image.shape == frame.shape
        assert np.abs(turn.image.astype(int) - (255 - frame)).mean() < 8
    style.close()


def test_a_flow_without_its_weights_ends_that_session_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path))
    worker = Worker(FakeStylizer())
    bad = worker.open(settings(mode="cadence", flow="raft"), live=True)
    good = worker.open(settings(mode="cadence"), live=True)
    out = good.outlets.subscribe(2)
    for session in (bad, good):
        session.inbox.put(grey_frame(0))
    worker.turn()
    worker.turn()
    assert isinstance(bad.error, UserError)
    assert good.error is None
    assert out.get(0).seq == 0


def test_going_from_reproject_to_cadence_takes_the_key_that_is_under_way() -> None:
    style = Watched(FakeStylizer(SIZE))
    clocks, state = Clocks(style, live=True, period_ms=33.0), style.stylizer.open(Params())
    run([texture()] * 2, settings(mode="reproject"), clocks=clocks, style=style, state=state)
    turns = run([texture()] * 5, settings(mode="cadence", cadence=4), clocks=clocks, style=style, state=state)
    assert turns[0].key is not None
    assert all(turn.waited for turn in turns)
    assert len(style.started) == 1
    style.close()


@pytest.mark.parametrize("mode", ["every-frame", "cadence", "reproject"])
def test_a_cut_starts_the_stylizers_window_anew(mode: str) -> None:
    stylizer = Told()
    params = settings(mode=mode, cadence=2, refiner="analytic")
    frames = [texture(0)] * 5 + [texture(1)] * 5 + [texture(2)] * 3
    run(frames, params, style=Instant(stylizer))
    assert stylizer.states[0].cuts == 2
    # Between two forgets there are steps: each shot has its own.
    shots = "".join(entry[0] for entry in stylizer.log if entry != "end").split("f")
    assert len(shots) == 3
    assert all(shots)


def test_a_key_after_a_cut_is_the_first_of_its_shot() -> None:
    """At cadence 1 the very frame of the cut is diffused, and by then the old shot is forgotten."""
    stylizer = Told()
    run([texture(0)] * 3 + [texture(1)] * 2, settings(mode="cadence", cadence=1), style=Instant(stylizer))
    assert [entry for entry in stylizer.log if entry != "end"] == ["begin"] * 3 + ["forget"] + ["begin"] * 2


@pytest.mark.parametrize("mode", ["every-frame", "cadence", "reproject"])
def test_a_delay_slows_the_style_lane_by_so_much(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("stream.gather.time.sleep", slept.append)
    turns = run([texture()] * 3, settings(mode=mode, cadence=1, debug_style_delay_ms=250.0))
    assert slept
    assert set(slept) == {0.25}
    assert len(slept) >= sum(turn.key is not None for turn in turns)
    slept.clear()
    run([texture()] * 3, settings(mode=mode, cadence=1))
    assert not slept


def test_flicker_is_on_the_key_and_the_refiner_takes_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporal, "CHANCE", np.random.default_rng(0))
    still = texture()

    def wavering(**changes: Any) -> float:
        """Standard deviation over time, levels."""
        output = images(run([still] * 24, settings(mode="every-frame", debug_flicker=0.5, **changes)))
        return float(np.stack(output[12:]).astype(float).std(0).mean())

    raw, steadied = wavering(refiner="off"), wavering(refiner="analytic")
    assert raw > 5  # levels; half of the σ that a grid of 1/8 keeps of 18
    assert steadied < 0.4 * raw


def test_every_frame_is_refined_where_asked_for_or_where_it_would_flicker() -> None:
    frames = [texture()] * 2
    plain = run(frames, settings(mode="every-frame"))[1]
    assert plain.stages_ms == {}
    noisy = run(frames, patched(settings(mode="every-frame"), {"style.seed_mode": "per-frame"}))[1]
    assert "refine" in noisy.stages_ms
    asked = run(frames, settings(mode="every-frame", refiner="analytic"))[1]
    assert "refine" in asked.stages_ms


def test_auto_reprojects_a_live_source_that_it_cannot_keep_up_with() -> None:
    style = Instant(FakeStylizer(SIZE))
    slow = Clocks(style, live=True, period_ms=33.0, costs=Costs(style_ms=100.0))
    run([texture()], settings(), clocks=slow, style=style)
    assert slow.plan.mode == "reproject"
    file = Clocks(style, live=False, period_ms=33.0, costs=Costs(style_ms=100.0))
    run([texture()], settings(), clocks=file, style=style)
    assert file.plan.mode == "every-frame"


@pytest.mark.parametrize("feature", FEATURES)
def test_the_reader_is_let_go_in_every_turn(feature: str) -> None:
    style, params, released = Instant(FakeStylizer(SIZE)), patched(Params(), FEATURES[feature]), set()
    clocks, state = Clocks(style, live=True, period_ms=1e9), style.stylizer.open(params)
    for number, frame in enumerate(sliding(5)):
        turned(clocks, state, frame, params, lambda n=number: released.add(n))
        assert released == set(range(number + 1))


AUTO = Temporal()
EVERY, REPROJECT = Plan(), Plan("reproject")


@pytest.mark.parametrize(
    ("style_ms", "before", "latency_ms", "mode"),
    [
        (0.0, EVERY, 0, "every-frame"),  # not measured yet
        (33.0, EVERY, 0, "every-frame"),
        (34.0, EVERY, 0, "reproject"),
        (30.0, REPROJECT, 0, "reproject"),  # it would fit, without room to spare
        (26.0, REPROJECT, 0, "every-frame"),
        (30.0, EVERY, 20, "reproject"),  # it fits between two frames and not in the latency asked for
        (17.0, REPROJECT, 20, "reproject"),
        (15.0, REPROJECT, 20, "every-frame"),
        (40.0, EVERY, 500, "reproject"),  # more latency does not make a device faster
    ],
)
def test_auto_diffuses_what_fits_and_comes_back_with_room_to_spare(
    style_ms: float, before: Plan, latency_ms: float, mode: str
) -> None:
    costs = Costs(style_ms=style_ms)
    assert plan(Temporal(latency_ms=latency_ms), costs, before, live=True, period_ms=33.3).mode == mode
    assert plan(Temporal(latency_ms=latency_ms), costs, before, live=False, period_ms=33.3).mode == "every-frame"


def test_auto_does_not_swing_around_the_edge() -> None:
    now, changes = EVERY, 0
    for number in range(100):
        before, now = now, plan(AUTO, Costs(style_ms=33.3 + (-1) ** number), now, live=True, period_ms=33.3)
        changes += before.mode != now.mode
    assert changes == 1


@pytest.mark.parametrize("mode", ["every-frame", "reproject", "cadence"])
def test_a_mode_that_is_asked_for_is_kept_at_any_cost(mode: str) -> None:
    asked = Temporal.model_validate({"mode": mode, "cadence": 3})
    for live in (True, False):
        for style_ms in (0.0, 1.0, 1e4):
            decided = plan(asked, Costs(style_ms=style_ms), EVERY, live=live, period_ms=33.3)
            assert decided == Plan(mode, 3 if mode == "cadence" else 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("style_ms", "lane_ms", "period_ms", "every"),
    [
        (0.0, 0.0, 33.0, 1),  # not measured yet
        (20.0, 8.0, 33.0, 1),
        (25.0, 8.0, 33.0, 1),
        (26.0, 8.0, 33.0, 2),
        (100.0, 8.0, 33.0, 4),
        (100.0, 33.0, 33.0, 60),  # the frame lane alone takes all the time
        (1e6, 0.0, 33.0, 60),
    ],
)
def test_cadence_by_cost_keeps_up_on_average(style_ms: float, lane_ms: float, period_ms: float, every: int) -> None:
    costs = Costs(style_ms, lane_ms)
    assert affordable(costs, Plan(), period_ms) == every
    decided = plan(Temporal(mode="cadence"), costs, Plan(), live=True, period_ms=period_ms)
    assert decided == Plan("cadence", every)
    if style_ms and every < 60:
        assert style_ms + every * lane_ms <= every * period_ms


def test_a_cadence_is_left_downwards_only_with_room_to_spare() -> None:
    at_four = Plan("cadence", 4)
    assert affordable(Costs(style_ms=90.0), at_four, 33.0) == 4  # three would do, barely
    assert affordable(Costs(style_ms=70.0), at_four, 33.0) == 3
    assert affordable(Costs(style_ms=20.0), at_four, 33.0) == 1
    assert affordable(Costs(style_ms=140.0), at_four, 33.0) == 5  # upwards at once


def test_costs_follow_what_is_measured() -> None:
    costs = Costs()
    costs.add_style(100.0)
    costs.add_lane(10.0)
    assert (costs.style_ms, costs.lane_ms) == (100.0, 10.0)
    for _ in range(30):
        costs.add_style(50.0)
        costs.add_lane(5.0)
    assert costs.style_ms == pytest.approx(50, rel=0.01)
    assert costs.lane_ms == pytest.approx(5, rel=0.01)


@pytest.mark.parametrize("mode", ["every-frame", "cadence", "reproject"])
def test_a_model_that_remembers_is_told_how_far_the_scene_has_moved_since_it_was_last_asked(mode: str) -> None:
    stylizer = FakeStylizer(SIZE)
    params = patched(settings(mode=mode, cadence=3, refiner="off"), {"style.seed_mode": "flow"})
    run(sliding(10, (2, 0)), params, style=Instant(stylizer))
    (state,) = stylizer.states
    assert len(state.moves) == len(state.params) - 1
    frames = 1 if mode == "every-frame" else 3 if mode == "cadence" else 2  # between two diffused ones
    inner = (..., slice(12, -12), slice(12, -12))
    wanted = 2 * frames / GUIDE
    assert all(abs(float(flow[inner][0, 0].mean()) - wanted) < 0.25 for flow in state.moves[1:])


def test_a_model_that_remembers_is_told_of_a_cut_instead_of_a_motion() -> None:
    stylizer = FakeStylizer(SIZE)
    params = patched(settings(mode="every-frame"), {"temporal.feedback": 0.2})
    run([texture(0)] * 3 + [texture(1)] * 2, params, style=Instant(stylizer))
    (state,) = stylizer.states
    assert state.cuts == 1
    assert len(state.moves) == 3
