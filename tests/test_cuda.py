"""What only a GPU can show: the CUDA backend against eager PyTorch, graphs, no waiting, two lanes, full memory.

Nothing here runs without one. Reviewed by reading; each test is small for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from accel import select
from accel.cuda_backend import CudaBackend
from accel.engine import EngineSpec, TensorSpec
from accel.errors import UserError
from accel.export import example
from accel.graphs import Replay, recorded
from accel.select import choose
from accel.transfer import Download, Upload, enqueued
from models import load as loading
from models.frame_graph import SETTLED
from models.params import Params
from models.structure import Structure
from models.stylizer import LatentStylizer
from tests.folders import random_folder, random_xl_folder
from tests.test_accel_parity import CASES, Case, relative_l2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a gpu: no CUDA device here"),
]

CUDA = torch.device("cuda")
SIZE = (64, 64)
TOLERANCE = {"fp32": 1e-4, "fast": 2e-2}  # relative L2


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Inside, whatever makes the CPU wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def image(seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def settings(**style: object) -> Params:
    return Params.model_validate({"style": {"prompt": "oil", "steps": 2, **style}})


@cache
def folder(kind: str) -> Path:
    """Kept for the whole run: the same weights in every test."""
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="livestyle-gpu-")) / kind
    return random_xl_folder(path) if kind == "xl" else random_folder(path, kind)


def loaded(monkeypatch: pytest.MonkeyPatch, kind: str, backend: CudaBackend, rows: int = 1) -> LatentStylizer:
    monkeypatch.setattr(select, "choose", lambda name: select.Choice(backend, backend.name))
    return loading.load(str(folder(kind)), SIZE, structure=Structure(rows=rows))


FORMS = {
    "eager": lambda: CudaBackend(mode=None, record=None),
    "graph": lambda: CudaBackend(mode=None),
    "compiled": lambda: CudaBackend(mode="default"),  # max-autotune takes minutes, and `make gpu` times that
}


@pytest.mark.parametrize(
    ("form", "precision"),
    [("eager", "fp32"), ("eager", "fast"), ("graph", "fp32"), ("graph", "fast"), ("compiled", "fast")],
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.build.__name__)
def test_backend_agrees_with_the_reference(case: Case, form: str, precision: str) -> None:
    with torch.inference_mode():
        wanted = case.module().eval()(*case.example())
    wanted = (wanted,) if isinstance(wanted, Tensor) else wanted
    engine = FORMS[form]().load(case.module, case.spec(precision))
    found = engine.launch(*case.example()).wait()
    for a, b, spec in zip(found, wanted, case.outputs, strict=True):
        assert (tuple(a.shape), a.dtype, a.device.type) == (spec.shape, getattr(torch, spec.dtype), "cuda")
        if spec.dtype == "uint8":
            assert (a.cpu().int() - b.int()).abs().max() <= (1 if precision == "fp32" else 3)
        else:
            assert relative_l2(a, b) < TOLERANCE[precision]


@pytest.mark.parametrize(("kind", "mode"), [("sd", None), ("ip2p", "default"), ("lcm", None), ("xl", None)])
@pytest.mark.parametrize("network", ["encode", "unet", "decode"])
def test_every_network_agrees_with_eager(kind: str, mode: str | None, network: str) -> None:
    graph = loading.compiled_graphs(str(folder(kind)), SIZE)[network]
    inputs = example(graph.spec)
    plain = CudaBackend(mode=None, record=None, dtype="float32").load(graph.build, graph.spec)(*inputs)
    for dtype, tolerance in (("float16", 2e-2), ("bfloat16", 1e-1)):
        engine = CudaBackend(mode=mode, dtype=dtype).load(graph.build, graph.spec)
        assert engine.replay.is_recorded
        for a, b in zip(engine(*inputs), plain, strict=True):
            assert relative_l2(a.float(), b.float().cpu()) < tolerance


def test_a_replay_is_bit_for_bit_the_plain_call() -> None:
    case = CASES[0]
    graph = CudaBackend(mode=None).load(case.module, case.spec())
    plain = CudaBackend(mode=None, record=None).load(case.module, case.spec())
    assert graph.replay.is_recorded
    assert not plain.replay.is_recorded
    for seed in range(3):
        assert torch.equal(graph(*case.example(seed))[0], plain(*case.example(seed))[0])


def test_engines_become_part_of_a_larger_graph() -> None:
    """As encoder, UNet and decoder do in the graph of a whole frame."""
    spec = EngineSpec("double", (TensorSpec("x", (4,)),), (TensorSpec("y", (4,)),), "double", "fp32")

    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    inner = CudaBackend(mode=None).load(Double, spec)
    outer = Replay(lambda x: inner(*inner(x)), (torch.zeros(4, device=CUDA),), "frame", CUDA, recorded)
    assert outer.is_recorded
    assert outer(torch.full((4,), 3.0))[0].tolist() == [12.0] * 4


def test_what_cannot_be_recorded_is_called_plainly(caplog: pytest.LogCaptureFixture) -> None:
    def reads(x: Tensor) -> tuple[Tensor, ...]:
        return (x + float(x.sum().item()),)  # waits for the device: not possible while recording

    replay = Replay(reads, (torch.ones(2, device=CUDA),), "reads", CUDA, recorded)
    assert not replay.is_recorded
    assert "reads cannot be recorded" in caplog.text
    assert replay(torch.ones(2))[0].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(("kind", "rows"), [("sd", 1), ("ip2p", 1), ("ip2p", 2), ("lcm", 1), ("xl", 1)])
@pytest.mark.parametrize("before", [4, 2 * SETTLED], ids=["networks", "whole"])
@pytest.mark.parametrize("style", [{}, {"guidance": 3.0, "seed_mode": "per-frame"}, {"seed_mode": "flow"}], ids=str)
def test_nothing_waits_inside_a_frame(kind: str, rows: int, style: dict[str, object], before: int, monkeypatch) -> None:
    """Neither while its networks are launched one by one nor when all of it is one recording."""
    stylizer = loaded(monkeypatch, kind, CudaBackend(mode=None), rows)
    params = settings(**style)
    state = stylizer.open(params)
    for seed in range(before):
        stylizer.step(state, image(seed), params).wait()
    stylizer.moved(state, torch.zeros(1, 2, 32, 32))
    with waiting_is_an_error():
        launched = stylizer.step(state, image(9), params)
    picture = launched.image()
    assert picture is not None
    assert picture.shape == (SIZE[1], SIZE[0], 3)


@pytest.mark.parametrize("kind", ["sd", "ip2p", "lcm"])
def test_a_whole_frame_in_one_recording_is_its_networks_one_by_one(kind: str, monkeypatch) -> None:
    params, found = settings(), []
    stylizer = loaded(monkeypatch, kind, CudaBackend(mode=None))
    for _ in range(2):
        state = stylizer.open(params)
        found.append([stylizer.step(state, image(seed % 2), params).image() for seed in range(SETTLED + 2)])
    # The second stream's frames are recorded from its first on.
    for one_by_one, whole in zip(found[0][:2], found[1][:2], strict=True):
        assert one_by_one is not None
        assert whole is not None
        assert np.abs(one_by_one.astype(int) - whole).max() <= 1


def test_pictures_are_those_of_the_cpu(monkeypatch) -> None:
    """The same noise, whatever the device: drawn on the CPU and moved."""
    params = settings(seed=5)
    pictures = []
    for backend in (choose("torch").backend, CudaBackend(mode=None, dtype="float32")):
        stylizer = loaded(monkeypatch, "sd", backend)  # type: ignore[arg-type]
        state = stylizer.open(params)
        pictures.append(stylizer.step(state, image(), params).image())
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 2  # type: ignore[union-attr]


def test_uploads_and_downloads_do_not_wait_and_lose_nothing() -> None:
    upload, download = Upload((1024,), torch.uint8, CUDA), Download()
    target = torch.empty(1024, dtype=torch.uint8, device=CUDA)
    for value in range(20):
        with waiting_is_an_error():
            upload(torch.full((1024,), value, dtype=torch.uint8), target)
            pending = download(enqueued((target + 1,), CUDA))
        assert (pending.wait()[0] == value + 1).all()


def test_full_memory_ends_what_asked_for_it_and_nothing_else(monkeypatch) -> None:
    stylizer = loaded(monkeypatch, "sd", CudaBackend(mode=None))
    params = settings()
    state = stylizer.open(params)
    before = stylizer.step(state, image(), params).image()

    class Huge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_zeros(1 << 50)[:1] + x

    spec = EngineSpec("huge", (TensorSpec("x", (1,)),), (TensorSpec("y", (1,)),), "huge")
    with pytest.raises(UserError, match="huge: the GPU's memory is full") as caught:
        CudaBackend(mode=None).load(Huge, spec)
    assert caught.value.hint
    assert np.array_equal(before, stylizer.step(state, image(), params).image())  # type: ignore[arg-type]


def test_lost_card_is_the_users_error_and_not_a_hang() -> None:
    """In a process of its own: after a failed kernel the device is gone for all of it."""
    import subprocess
    import sys

    code = """
import torch
from torch import nn
from accel.cuda_backend import CudaBackend
from accel.engine import EngineSpec, TensorSpec
from accel.errors import UserError

class Lookup(nn.Module):
    def forward(self, x, at):
        return x[at]

spec = EngineSpec("lookup", (TensorSpec("x", (4,)), TensorSpec("at", (1,), "int64")), (TensorSpec("y", (1,)),), "l")
engine = CudaBackend(mode=None, record=None).load(Lookup, spec)
for turn in range(2):  # while the kernel fails, and after it
    try:
        engine.launch(torch.zeros(4), torch.tensor([99])).wait()
    except UserError as error:
        print("said:", error.message, error.hint)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.count("said:") == 2, done.stderr
    assert "Xid" in done.stdout
