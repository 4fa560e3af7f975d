"""The frame lane on a device other than the CPU: what it shows is what it shows there, and nothing on the way is read.

Twice: with torch's own operations on the CPU in place of OpenCV's, beside the lane as it is there; and on PyTorch's
"meta" device, whose tensors have no numbers, so that whatever waits for one on a GPU is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from accel import transfer
from accel.errors import UserError
from models import filters, lane, reproject
from models.flow import Dis
from models.lane import FrameLane, frame_lane, made
from models.params import Temporal
from models.raft import RaftNet
from models.reproject import GUIDE, Guide
from models.temporal import refine
from stream.source import open_source
from tests.media import CLIPS
from tests.scenes import SIZE, Image, psnr, sliding, texture

META = torch.device("meta")
W, H = SIZE
MIX = np.array([[0.5, 0.3, -0.1], [-0.2, 0.6, 0.2], [0.1, -0.4, 0.7]])


def painted(source: Image) -> Image:
    """Other colours, and strokes."""
    colours = source @ MIX.T + (51, 76, 102)
    strokes = 40 * (np.indices(source.shape[:2]).sum(0)[..., None] % 24 < 3)
    return (colours + strokes).clip(0, 255).astype(np.uint8)


def on_host(function: Callable[..., Image]) -> Callable[..., Image]:
    """The same by OpenCV: it is not what is compared."""

    def call(*given: object) -> Image:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(filters, "HOSTS", ("cpu",))
            return function(*given)

    return call


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on all but DIS takes the way of other devices."""
    monkeypatch.setattr(lane, "halved", on_host(lane.halved))  # type: ignore[arg-type]
    monkeypatch.setattr(Dis, "__call__", on_host(Dis.__call__))  # type: ignore[arg-type]
    return lambda: monkeypatch.setattr(filters, "HOSTS", ())


def played(one: FrameLane, frames: list[Image], way: str) -> Iterator[Image]:
    """Through a lane: every frame diffused, every third, or each key four frames late."""
    track = None
    for number, frame in enumerate(frames):
        one.advance(frame)
        if way == "late":
            if number % 4 == 0:
                if number:
                    assert track is not None
                    one.adopt(made(track, painted(frames[number - 4])), 2)
                else:
                    one.answer(one.ask(), painted(frame))
                track = one.ask()
        elif number % (1 if way == "every" else 3) == 0:
            one.answer(one.ask(), painted(frame), 1 if way == "every" else 3)
        yield one.show()


@pytest.mark.parametrize(
    ("way", "refiner"),
    [("every", "analytic"), ("every", "learned"), ("third", "off"), ("late", "off"), ("late", "analytic")],
)
def test_it_shows_what_it_shows_on_a_cpu(way: str, refiner: str, there: Callable[[], None]) -> None:
    """To a level, across a cut: what is left is the order in which floats are summed up."""
    frames = [*sliding(7, (3, -2)), *sliding(6, (-2, 0), seed=8)]
    settings = Temporal.model_validate({"refiner": refiner, "flow": "dis"})
    wanted = list(played(frame_lane(settings, SIZE), frames, way))
    there()
    one = frame_lane(settings, SIZE)
    found = list(played(one, frames, way))
    assert one.motion is not None
    assert one.motion.lost is not None
    for number, (image, other) in enumerate(zip(found, wanted, strict=True)):
        assert psnr(image, other) > 60, number
        assert np.abs(image.astype(int) - other).max() <= 2, number


@pytest.mark.skipif(not CLIPS, reason="the shared clips are not here (LIVESTYLE_SHARED)")
@pytest.mark.parametrize("name", ["bike_ride", "webcam_two_people"])
def test_and_of_real_clips(name: str, there: Callable[[], None]) -> None:
    """Measured at 512x288: 72 to 97 dB between the two, E_warp the same to four digits."""
    source = open_source(str(next(path for path in CLIPS if path.stem == name)), size=(256, 144))
    frames = [frame.image for frame in islice(source.frames(), 9)]
    source.close()
    size, settings = (frames[0].shape[1], frames[0].shape[0]), Temporal(refiner="analytic", flow="dis")
    wanted = list(played(frame_lane(settings, size), frames, "late"))
    there()
    found = played(frame_lane(settings, size), frames, "late")
    assert min(psnr(image, other) for image, other in zip(found, wanted, strict=True)) > 55


def test_a_full_card_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(image: Image, device: torch.device) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lane, "halved", full)
    with pytest.raises(UserError, match="frame lane: the GPU's memory is full"):
        FrameLane(Guide(Dis())).advance(texture())


def test_a_cut_takes_hold_at_once_and_is_told(there: Callable[[], None]) -> None:
    """Nothing of the scene before is in the picture, of which the host knows nothing yet."""
    there()
    one = FrameLane(Guide(Dis(), Dis(refine=0)), refine)
    for frame in sliding(3):
        one.advance(frame)
        one.answer(one.ask(), 255 - frame)
        one.show()
    other = texture(9)
    one.advance(other)
    shown = one.show().astype(float)
    apart = np.sqrt(np.square(shown - (255.0 - other)).mean())
    assert apart < 12  # the style's colours, on the new source
    assert one.cut
    assert one.moved is not None
    assert float(one.moved.abs().max()) == 0


class Late(transfer.Verdict):
    """Answers one question later, as on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.before = False

    def refused(self, answer: Tensor) -> bool:
        told, self.before = self.before, not bool(answer)
        return told


def test_a_cut_that_is_told_late_does_not_undo_the_new_scenes_key(
    there: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [*sliding(3), *sliding(4, seed=9)]

    def shown() -> tuple[list[Image], list[bool]]:
        """With a key of the first frame of each scene."""
        one, pictures, cuts = FrameLane(Guide(Dis(), Dis(refine=0))), [], []
        for number, frame in enumerate(frames):
            one.advance(frame)
            cuts.append(one.cut)
            if number in (0, 3):
                one.answer(one.ask(), painted(frame))
            pictures.append(one.show())
        return pictures, cuts

    wanted, cuts = shown()
    assert cuts == [False, False, False, True, False, False, False]
    monkeypatch.setattr(lane, "Verdict", Late)
    there()
    found, cuts = shown()
    assert cuts == [False, False, False, False, True, False, False]
    assert min(psnr(image, other) for image, other in zip(found, wanted, strict=True)) > 60


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict is read a frame later (tests/test_device.py has its own test); a look-up's shapes are told quickly."""
    monkeypatch.setattr(transfer.Verdict, "refused", lambda self, answer: False)

    def looked_up(field: Tensor, grid: Tensor, *how: object, **more: object) -> Tensor:
        assert field.device == grid.device == META
        return field.new_empty(*field.shape[:2], *grid.shape[1:3])

    monkeypatch.setattr(torch.nn.functional, "grid_sample", looked_up)  # PyTorch's own takes 0.2 s there


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize("refiner", ["off", "analytic", "learned"])
def test_nothing_is_read_on_the_way(refiner: str, tmp_path, monkeypatch) -> None:
    """Only fetching the finished picture cannot be done there."""
    monkeypatch.setenv("LIVESTYLE_CACHE", str(tmp_path))
    one = frame_lane(Temporal.model_validate({"refiner": refiner, "flow": "dis"}), SIZE, META)
    late = None
    for number, frame in enumerate(sliding(7)):
        one.advance(frame)
        if number in (0, 3):
            one.answer(one.ask(), frame, 2)
        if number == 2:
            late = one.ask()
        if number == 5:
            assert late is not None
            one.adopt(made(late, frame), 2)
        picture = one.drawn()
        assert (picture.shape, picture.device) == ((1, 3, H, W), META)
    assert one.motion is not None
    assert one.moved is not None
    assert {one.motion.flow.device, one.motion.trust.device, one.moved.device} == {META}
    with pytest.raises(TypeError, match="meta"):
        one.show()


@pytest.mark.usefixtures("meta")
def test_raft_is_on_the_device_and_the_picture_goes_up_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LIVESTYLE_MODELS", str(tmp_path))
    (tmp_path / "raft-small").mkdir()
    save_file(RaftNet().state_dict(), tmp_path / "raft-small" / "raft.safetensors")
    brought: list[tuple[int, ...]] = []

    def counted(tensor: Tensor, device: torch.device) -> Tensor:
        if tensor.device.type != device.type:
            brought.append(tuple(tensor.shape))
        return tensor.to(device)

    one = frame_lane(Temporal(flow="auto", refiner="analytic"), SIZE, META)
    for module in (filters, reproject):
        monkeypatch.setattr(module, "brought", counted)
    for number, frame in enumerate(sliding(4)):
        one.advance(frame)
        if number == 0:
            one.answer(one.ask(), frame)
        one.drawn()
    brought.clear()  # tables are made with the first frames
    one.advance(frame)
    one.drawn()
    assert brought == [(H, W, 3)]
    assert one.motion is not None
    assert one.motion.flow.shape == (1, 2, H // GUIDE, W // GUIDE)
