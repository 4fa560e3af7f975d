"""The frame lane on a GPU: its pictures, that nothing waits inside a frame, and its time beside a busy style lane.

Nothing here runs without one. Reviewed by reading; tests/test_lane_device.py runs the same code without.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from accel.cuda_backend import CudaBackend
from accel.torch_backend import TorchBackend
from accel.transfer import brought, fetched, frame_stream, handed
from models.flow import Dis, Raft
from models.lane import FrameLane, made
from models.raft import flow_engine
from models.reproject import Guide
from models.temporal import refine
from tests.scenes import psnr, sliding, texture
from tests.test_cuda import waiting_is_an_error
from tests.test_raft import net, pictures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a gpu: no CUDA device here"),
]

CUDA = torch.device("cuda")
SIZE = (512, 288)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("raft-small") / "raft.safetensors"
    save_file(net().state_dict(), file)
    return file


@contextmanager
def busy() -> Iterator[None]:
    """The default stream is never empty: products of 0.2 to 2 ms each."""
    heavy, stop = torch.randn(4096, 4096, device=CUDA, dtype=torch.float16), threading.Event()

    def style() -> None:
        while not stop.is_set():
            for _ in range(10):
                torch.mm(heavy, heavy)
            done = torch.cuda.Event()
            done.record()
            done.synchronize()

    worker = threading.Thread(target=style)
    worker.start()
    try:
        yield
    finally:
        stop.set()
        worker.join()


def test_raft_agrees_with_the_cpu(weights: Path) -> None:
    shape = (1, 3, 128, 160)
    (wanted,) = flow_engine(weights, shape, TorchBackend())(*pictures())
    for dtype, most in (("float32", 0.01), ("float16", 0.3)):  # px on average, of flows of 8 px
        (found,) = flow_engine(weights, shape, CudaBackend(mode=None, dtype=dtype))(*pictures())
        assert float((found.cpu() - wanted).abs().mean()) < most


def test_its_pictures_are_those_of_the_cpu() -> None:
    """The same flow; keys late, faded in, refined, and a cut."""
    frames = [*sliding(8, (3, -2), size=SIZE), *sliding(5, (-2, 0), seed=8, size=SIZE)]

    def shown(one: FrameLane) -> list[np.ndarray]:
        found, track = [], None
        for number, frame in enumerate(frames):
            one.advance(frame)
            if number == 0:
                one.answer(one.ask(), 255 - frame)
            if number == 2:
                track = one.ask()
            if number == 5 and track is not None:
                one.adopt(made(track, 255 - frames[2]), 2)
            found.append(one.show())
        return found

    dis = [Guide(Dis(), Dis(refine=0), device) for device in (torch.device("cpu"), CUDA)]
    for image, other in zip(*(shown(FrameLane(guide, refine)) for guide in dis), strict=True):
        assert psnr(image, other) > 50


def test_nothing_waits_inside_a_frame(weights: Path) -> None:
    one, track = FrameLane(Guide(Raft(weights), device=CUDA), refine, CUDA), None
    for number, frame in enumerate(sliding(12, size=SIZE)):
        if number < 6:  # tables are made, memory is taken
            one.advance(frame)
            one.answer(one.ask(), frame)
            one.show()
            continue
        with waiting_is_an_error():
            one.advance(frame)
            if number == 8:
                track = one.ask()
            if number == 10 and track is not None:
                one.adopt(made(track, frame), 2)
            assert one.moved is None or one.moved.device.type == "cuda"
            one.drawn()
        assert one.show().shape == frame.shape


def test_a_cut_is_told_with_the_next_frame() -> None:
    one, told = FrameLane(Guide(Dis(), Dis(refine=0), CUDA)), []
    for frame in [*sliding(3, size=SIZE), *[texture(9, SIZE)] * 3]:
        one.advance(frame)
        one.answer(one.ask(), frame)
        one.show()
        told.append(one.cut)
    assert told == [False, False, False, False, True, False]


def test_it_keeps_its_time_beside_a_busy_style_lane(weights: Path) -> None:
    """p99 ≤ 5 ms from the camera's bytes to those for the encoder, at 60 frames per second."""
    one, frames, times = FrameLane(Guide(Raft(weights), device=CUDA), refine, CUDA), sliding(16, size=SIZE), []
    with busy():
        for number in range(600):
            frame = frames[number % 16 if number // 16 % 2 == 0 else 15 - number % 16]
            begun = time.perf_counter()
            one.advance(frame)
            if number % 100 == 0:
                one.answer(one.ask(), frame)
            one.show()
            times.append((time.perf_counter() - begun) * 1e3)
            time.sleep(max(0.0, 1 / 60 - times[-1] / 1e3))
    later = [ms for number, ms in enumerate(times) if number >= 100]
    assert statistics.quantiles(later, n=100)[98] <= 5.0, f"median {statistics.median(later):.2f} ms"


def test_what_one_stream_makes_the_other_can_use_and_memory_is_not_used_anew() -> None:
    def many(value: float) -> Tensor:
        with frame_stream(CUDA):
            made = torch.full((1 << 20,), value, device=CUDA)
            for _ in range(50):
                made = made + 1
        return handed(made)

    with busy():
        totals = [many(value).sum() for value in range(20)]  # each dropped before the default stream got there
    assert [float(total) / (1 << 20) for total in totals] == [value + 50.0 for value in range(20)]


def test_pictures_go_up_and_down_without_waiting() -> None:
    for value in range(20):
        image = torch.full((288, 512, 3), value, dtype=torch.uint8)
        with waiting_is_an_error(), frame_stream(CUDA):
            there = brought(image, CUDA)
            image.zero_()  # may be written to at once
            pending = fetched(there + 1)
        assert (pending.wait()[0] == value + 1).all()
