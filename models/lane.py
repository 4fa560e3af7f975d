"""The frame lane of one stream: what runs for every captured frame, however slow the diffusion is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accel.transfer import Verdict, device_errors, frame_stream, handed
from models.filters import CPU, halved, on_cpu, sample, share_cores, to_image, to_picture, weigh
from models.flow import Dis, chosen_flow, engines_on, flow_estimator
from models.launched import Stages
from models.params import Temporal
from models.reproject import GUIDE, Guide, Key, Motion, Track, scaled
from models.temporal import Past, refine

FADING = 0.95  # how much of what was only held counts as held a frame later

Refiner = Callable[[Tensor, Motion | None, Past], Tensor]


class FrameLane:
    """Follows the source, carries the keys to now, fills what they do not show, and refines.

    Every frame: `advance`; where it is diffused `ask`, and `answer` when its picture is there; then `show`.

    On a GPU all of it is on the frame stream, which goes first; the CPU waits once, for the picture.

    >>> lane.advance(image); lane.answer(lane.ask(), stylized); picture = lane.show()
    """

    def __init__(self, guide: Guide, refiner: Refiner | None = refine, sight: torch.device = CPU) -> None:
        self.guide = guide
        self.refiner = refiner
        self.sight = sight  # where the guide's estimators look at pictures: its own device, or the CPU
        self.motion: Motion | None = None
        self.crowded = False  # a picture is being diffused meanwhile; whoever knows says so
        self.cut = False  # another scene has begun; on a GPU that is told with the next frame
        self.stages = Stages()  # of the present frame
        self._size = (0, 0)  # of the present frame, (width, height)
        self._past = Past()
        self._known: Tensor | None = None  # where the last output showed a key or something carried from one
        self._key: Key | None = None
        self._older: Key | None = None  # being faded out
        self._asked: list[Track] = []
        self._same = Verdict()  # scene as before
        self._shown = 0  # frames since the key came, with the present one
        self._fade = 1

    @property
    def ready(self) -> bool:
        """Whether there is anything to show: a first key has come."""
        return self._key is not None

    @property
    def moved(self) -> Tensor | None:
        """The motion since the frame of the newest key, (1, 2, h, w); None where there is none that holds.

        For work on the current stream.
        """
        if self._key is None or self._key.track.cut or self._key.track.flow is None:
            return None
        flow, lost = self._key.track.flow, self._key.track.lost
        with _apart(self.guide.device):
            flow = flow if lost is None else flow.masked_fill(lost, 0)
        return handed(flow)

    def advance(self, image: NDArray[np.uint8]) -> None:
        """A frame was captured, (H, W, 3) uint8."""
        share_cores(self.crowded)
        self.stages = Stages()
        self._size = (image.shape[1], image.shape[0])
        with self.stages("flow"), _apart(self.guide.device):
            motion = self.motion = self.guide.advance(halved(image, self.sight))
            self.cut = motion is not None and motion.cut
            if motion is not None and motion.lost is not None:
                self.cut = self._same.refused(~motion.lost)
            self._shown += 1
            tracks = [key.track for key in (self._key, self._older) if key]
            for track in (*tracks, *self._asked):
                if self.motion is None:  # another size
                    track.cut = True
                else:
                    track.advance(self.motion)

    def ask(self) -> Track:
        """The present frame is to be diffused."""
        self._asked.append(Track(self.guide.frame))
        return self._asked[-1]

    def answer(self, track: Track, image: NDArray[np.uint8], fade: int = 1) -> None:
        """The picture that was asked for, (H, W, 3) uint8; it takes over within `fade` frames: 1/fade, 2/fade … 1."""
        with self.stages("key"), _apart(self.guide.device):
            self.adopt(Key(track, to_picture(image, self.guide.device)), fade)

    def adopt(self, key: Key, fade: int = 1) -> None:
        """The same with a key that was made elsewhere, see `made`."""
        self._asked.remove(key.track)
        self._older, self._key = self._key, key
        self._fade, self._shown = fade, 1

    def show(self) -> NDArray[np.uint8]:
        """The picture for the present frame, (H, W, 3) uint8."""
        share_cores(self.crowded)
        with _apart(self.guide.device):
            picture = self.drawn()
            with self.stages("refine" if on_cpu(self.guide.device) else "download"):
                return to_image(picture)

    def drawn(self) -> Tensor:
        """The same on the guide's device, (1, 3, H, W) float; nothing is waited for."""
        with _apart(self.guide.device):
            with self.stages("warp"):
                picture = self._fill(*self._keys_now())
            with self.stages("refine"):
                if self.refiner:
                    picture = self.refiner(picture, self.motion, self._past)
                self._past.output = picture
                return picture

    def _keys_now(self) -> tuple[Tensor, Tensor | None]:
        """What the newest key says, the one before fading out beneath it."""
        assert self._key is not None, "show before the first answer"
        picture, trust = self._key.now(self.guide.frame, self._size)
        weight = self._shown / self._fade
        if weight >= 1 or self._older is None:
            self._older = None
            return picture, trust
        before, trust_before = self._older.now(self.guide.frame, self._size)
        if trust is not None and trust_before is not None:
            trust = torch.lerp(trust_before, trust, weight)
        return torch.lerp(before, picture, weight), trust

    def _fill(self, picture: Tensor, trust: Tensor | None) -> Tensor:
        """Where the keys show nothing of their own, hold on to what the last output showed there."""
        motion, before, past = self.motion, self._known, self._past.output
        if trust is None:
            self._known = None
        elif motion is None or motion.cut or past is None:
            self._known = trust
        else:
            held = motion.trust if before is None else motion.trust * sample(before, motion.flow)
            self._known = trust + (1 - trust) * FADING * held
            # The refiner needs the last output carried too; without one a cheaper look-up does.
            carried = self._past.carried(motion) if self.refiner else sample(past, scaled(motion.flow, self._size))
            return picture + weigh((1 - trust) * held, carried - picture)
        return picture


def made(track: Track, image: NDArray[np.uint8]) -> Key:
    """A key of a frame that was asked for, with all that can be worked out ahead; in any thread."""
    device = track.frame.device
    with _apart(device):
        key = Key(track, to_picture(image, device))
        _ = key.residual
        if not on_cpu(device):
            _ = key.overall  # needed there for every frame
        return key


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """On the frame stream, its errors the user's; no gradients, and one torch thread.

    Pictures are too small to share between threads, and OpenMP's waiting threads cost others.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), frame_stream(device), device_errors("frame lane"):
            yield
    finally:
        torch.set_num_threads(threads)


def frame_lane(temporal: Temporal, size: tuple[int, int], device: torch.device | str = CPU) -> FrameLane:
    """The frame lane that the settings ask for, for pictures of (width, height); UserError where a part is missing.

    `device` is the model's: on a GPU the lane is there too, but for DIS.
    """
    device = torch.device(device)
    flow = chosen_flow(temporal.flow, device)
    estimator = flow_estimator(flow)
    dis = flow == "dis"
    guide = Guide(estimator, Dis(refine=0) if dis else None, device)
    lane = FrameLane(guide, _refiner(temporal.refiner, size, device), CPU if dis else device)
    if not dis:  # compiled now, and not with the first frame
        small = torch.zeros(1, 3, size[1] // GUIDE, size[0] // GUIDE, device=device)
        with _apart(device):
            estimator(small, small)
    return lane


def _refiner(name: str, size: tuple[int, int], device: torch.device) -> Refiner | None:
    if name != "learned":
        return None if name == "off" else refine
    from accel.cache import default_root
    from models.refiner import load_refiner

    with _apart(device):
        return load_refiner(size, engines_on(device), default_root())
