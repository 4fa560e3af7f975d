"""The two clocks of a session: which frames are diffused, and what is shown for all the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from stream.gather import Asked, Device, Diffused
from stream.pacing import Costs, Plan, plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from models.flow import Flow
    from models.lane import FrameLane
    from models.params import Params
    from models.reproject import Key, Track
    from models.similar import Similar
    from models.state import State
    from models.stylizer import Stylizer

FADE = 2  # frames in which a key that came late takes over


class StyleLane:
    """Where a session's pictures are diffused: in the caller's turn, or in a thread that nobody waits for.

    The lanes of one device's models share it.
    """

    def __init__(self, stylizer: Stylizer, device: Device | None = None) -> None:
        self.stylizer = stylizer
        self.device = device or Device()

    def now(
        self,
        state: State,
        image: NDArray[np.uint8],
        params: Params,
        launched: Callable[[], None] = lambda: None,
        *,
        cut: bool = False,
        moved: Flow | None = None,
    ) -> Generator[Asked, None, Diffused]:
        """Ask for one picture, and go on once that has come to something. Arguments are those of `Asked`."""
        asked = Asked(self.stylizer, state, image, params, launched, cut, moved)
        yield asked
        return flickering(asked)

    def later(
        self,
        state: State,
        image: NDArray[np.uint8],
        params: Params,
        track: Track | None,
        *,
        cut: bool,
        moved: Flow | None = None,
    ) -> Future[tuple[Diffused, Key | None]]:
        """The same in the style lane's own thread, made into the key of the frame that `track` follows."""
        asked = Asked(self.stylizer, state, image, params, cut=cut, moved=moved)

        def diffuse() -> tuple[Diffused, Key | None]:
            from models.lane import made

            self.device.diffuse([asked])
            picture = flickering(asked)
            key = made(track, picture.image) if track is not None and picture.image is not None else None
            return picture, key

        self.device.put(asked)
        return self.device.thread.submit(diffuse)

    def close(self) -> None:
        """Let go of the device's thread; a picture under way is finished first."""
        self.device.close()


def flickering(asked: Asked) -> Diffused:
    """What came of it, with the noise that `debug.flicker` adds."""
    picture = asked.picture()
    if not asked.params.debug.flicker or picture.image is None:
        return picture
    from models.temporal import flickered

    return replace(picture, image=flickered(picture.image, asked.params.debug.flicker))


@dataclass(frozen=True, slots=True)
class Turn:
    """What one captured frame came to: the picture of the frame `ago` frames back, None where there is none yet."""

    image: NDArray[np.uint8] | None
    stages_ms: dict[str, float]  # of the frame lane
    key: Diffused | None = None  # a picture that was diffused
    waited: bool = False  # for that picture: its stages are part of this frame's time
    ago: int = 0


def remembers(params: Params) -> bool:
    """Whether the model uses what came before, and must be told of cuts and motion by the frame lane."""
    temporal = params.temporal
    return bool(temporal.window or temporal.feedback) or params.style.seed_mode == "flow"


@dataclass(slots=True)
class Clocks:
    """One session's two clocks; the worker thread's own.

    `period_ms` is the time between two frames of the source, where it is live; the sessions in turn share it.
    """

    style: StyleLane
    live: bool
    period_ms: float
    share: int = 1  # how many sessions take turns on the device
    costs: Costs = field(default_factory=Costs)
    plan: Plan = field(default_factory=Plan)
    _lane: FrameLane | None = None
    _built: tuple[str, str] = ("", "")  # flow and refiner the lane was built with
    _under_way: Future[tuple[Diffused, Key | None]] | None = None
    _similar: Similar | None = None  # made when first asked for: it needs OpenCV
    _shown: NDArray[np.uint8] | None = None  # the last diffused picture, where it may be shown again
    _asked: deque[Track] = field(default_factory=deque)  # frames in a stream batch, oldest first
    _since: int = 0  # frames since the last key
    _cut: bool = False  # another scene has begun since a frame was last diffused

    @property
    def asks(self) -> bool:
        """Whether the next frame is one that will be diffused in its turn, as far as can be told."""
        return self.plan.mode != "reproject" and self._since + 1 >= self.plan.every

    def turn(
        self, state: State, image: NDArray[np.uint8], params: Params, launched: Callable[[], None] = lambda: None
    ) -> Generator[Asked, None, Turn]:
        """The picture to show for a captured frame, once what it asks for on the way has come to something.

        `launched` is called when the next frame may be fetched.
        """
        period_ms = self.period_ms / self.share
        self.plan = plan(params.temporal, self.costs, self.plan, live=self.live, period_ms=period_ms)
        if self.plan.mode == "every-frame" and self._refiner(params) == "off" and not remembers(params):
            self._drop()
            if self._wasted(state, image, params, must=self._shown is None):
                launched()
                return Turn(self._shown, {}, waited=True)
            key = yield from self.style.now(state, image, params, launched)
            self._shown = key.image if params.temporal.skip_similar else None
            self.costs.add_style(key.took_ms)
            return Turn(key.image, {}, key, waited=True, ago=self.style.stylizer.delay)
        self._shown = None
        lane = self._follow(state, params, image)
        lane.crowded = self._under_way is not None
        lane.advance(image)
        self._cut |= lane.cut
        self._since += 1
        late = self.plan.mode == "reproject" and lane.ready
        arrived = self._arrived(lane, wait=not late)
        if late:  # a frame's rest between two keys: neither is quick
            asking = self._under_way is None and not arrived
        else:
            asking = self._since >= self.plan.every or self._cut or not lane.ready
        if asking and self._wasted(state, image, params, must=self._cut or not lane.ready):
            asking = False
        if asking and not late:
            track, moved = self._ask(lane), lane.moved
            arrived = yield from self.style.now(state, image, params, launched, cut=self._cut, moved=moved)
            while not lane.ready and arrived.image is None:  # fill a stream batch with the first frame
                track, arrived = self._ask(lane), (yield from self.style.now(state, image, params))
            if track is not None and arrived.image is not None:
                lane.answer(track, arrived.image, 1 if self._cut else self.plan.every)
            self._since, self._cut = 0, False
        elif asking:
            self._under_way = self.style.later(state, image, params, self._ask(lane), cut=self._cut, moved=lane.moved)
            self._cut = False
        launched()
        lane.crowded = self._under_way is not None
        picture = lane.show()
        if arrived:
            self.costs.add_style(arrived.took_ms)
        self.costs.add_lane(sum(lane.stages.ms.values()))
        return Turn(picture, lane.stages.ms, arrived, waited=not late)

    def _wasted(self, state: State, image: NDArray[np.uint8], params: Params, *, must: bool) -> bool:
        """Whether to diffuse a frame would be a waste, so like is it to the last diffused one; not where it `must` be.

        Never while prompts blend, which takes so many diffused frames.
        """
        threshold = params.temporal.skip_similar
        if not threshold or self.style.stylizer.delay or state.transition:
            self._similar = None
            return False
        if self._similar is None or must:
            from models.similar import Similar

            self._similar = Similar()
        return self._similar.skip(image, threshold, params)

    def _arrived(self, lane: FrameLane, *, wait: bool) -> Diffused | None:
        """Take in the key that was under way, if it is there."""
        if self._under_way is None or not (wait or self._under_way.done()):
            return None
        future, self._under_way = self._under_way, None
        picture, key = future.result()
        if key is not None:
            lane.adopt(key, FADE)
        return picture

    def rest(self, state: State) -> list[NDArray[np.uint8]]:
        """The pictures of the newest frames that a stream batch still holds, at the end; oldest first.

        None where keys are carried to the present frame, since then every frame has had its picture.
        """
        return [] if self._lane else self.style.stylizer.drain(state)

    def _ask(self, lane: FrameLane) -> Track | None:
        """Ask for the present frame; what comes next is the picture of the frame whose track this is."""
        self._asked.append(lane.ask())
        return self._asked.popleft() if len(self._asked) > self.style.stylizer.delay else None

    def _follow(self, state: State, params: Params, image: NDArray[np.uint8]) -> FrameLane:
        """The frame lane for these settings and pictures like this."""
        refiner = self._refiner(params)
        built = params.temporal.flow, refiner
        if self._lane is None or self._built != built:
            from models.lane import frame_lane

            self._drop()
            self.style.stylizer.drain(state)  # frames in a stream batch that this lane has not followed
            temporal = params.temporal.model_copy(update={"refiner": refiner})
            size = (image.shape[1], image.shape[0])
            self._lane = frame_lane(temporal, size, self.style.stylizer.device)
            self._built = built
        return self._lane

    def _drop(self) -> None:
        """Leave the frame lane, and the key that is under way for it."""
        if self._under_way is not None:
            self._under_way.exception()  # its stream's memory is free again once it is through
        self._lane = self._under_way = None
        self._asked.clear()

    def _refiner(self, params: Params) -> str:
        """Which refiner frames go through: `auto` refines what would flicker, with the better one where time allows."""
        if params.temporal.refiner != "auto":
            return params.temporal.refiner
        if params.style.seed_mode != "per-frame" and not params.debug.flicker:
            return "off"
        return "analytic" if self.live else "learned"
