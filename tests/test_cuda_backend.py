"""The CUDA backend's own logic on a CPU: static tensors, recording and its fall-backs, formats, the cache, errors."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from accel import cache
from accel.cuda_backend import CudaBackend
from accel.engine import EngineSpec, TensorSpec
from accel.errors import UserError
from accel.graphs import WARM_UPS, Replay
from accel.transfer import Download, Upload, brought, device_errors, enqueued, fetched, frame_stream, handed

CPU = torch.device("cpu")
SPEC = EngineSpec(
    "mix",
    (TensorSpec("x", (2, 8)), TensorSpec("t", (2,))),
    (TensorSpec("y", (2, 8)),),
    "seed-3",
)


class Mix(nn.Module):
    """A product with weights, and a time that tells 999 from 1000."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(x) * (t == 999)[:, None]


class Product(nn.Module):
    """Compiled without a C++ compiler, in seconds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(x)


class Grows(nn.Module):
    """Too large for float16, not for bfloat16."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (x * 1e4) * 1e4


class Tape:
    """Records on a CPU as a CUDA graph does: outputs stay where they are, each replay fills them anew."""

    def __init__(self, fails_at: int | None = None, error: RuntimeError | None = None) -> None:
        self.replays, self.fails_at = 0, fails_at
        self.error = error or RuntimeError("operation failed due to a previous error during capture\nsecond line")

    def __call__(self, call: Callable[[], tuple[Tensor, ...]], device: torch.device) -> tuple[tuple[Tensor, ...], Tape]:
        if self.fails_at == 0:
            raise self.error
        self._call = call
        blank = ((o, float("nan") if o.is_floating_point() else 0) for o in call())  # nothing before the first replay
        self._outputs = tuple(torch.full_like(o, value) for o, value in blank)
        return self._outputs, self

    def replay(self) -> None:
        self.replays += 1
        if self.replays == self.fails_at:
            raise self.error
        for output, found in zip(self._outputs, self._call(), strict=True):
            output.copy_(found)


def eager(record: Tape | None = None, **other: str) -> CudaBackend:
    return CudaBackend("cpu", mode=None, record=record, **other)


def given(seed: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(seed)), torch.tensor([999.0, 999.0])


def test_recorded_engine_agrees_with_the_module_and_fills_the_same_outputs() -> None:
    tape = Tape()
    engine = eager(tape).load(Mix, SPEC)
    with torch.inference_mode():
        wanted = [Mix()(*given(seed)) for seed in (1, 2)]
    (first,) = engine(*given(1))
    assert torch.equal(first, wanted[0])
    (second,) = engine(*given(2))
    assert torch.equal(second, wanted[1])
    assert second.data_ptr() == first.data_ptr()
    assert tape.replays == 2


def test_inputs_may_be_strided_and_are_not_kept() -> None:
    engine = eager(Tape()).load(Mix, SPEC)
    x, t = given(1)
    strided = x.T.contiguous().T
    kept = engine(strided, t)[0].clone()
    strided.zero_()
    assert torch.equal(kept, engine(x, t)[0])


def test_function_is_warmed_up_before_it_is_recorded() -> None:
    calls: list[str] = []

    def function(x: Tensor) -> tuple[Tensor, ...]:
        calls.append("call")
        return (x + 1,)

    def record(call: Callable[[], tuple[Tensor, ...]], device: torch.device) -> tuple[tuple[Tensor, ...], Tape]:
        calls.append("record")
        return Tape()(call, device)

    assert Replay(function, (torch.zeros(1),), "f", CPU, record).is_recorded
    assert calls == ["call"] * WARM_UPS + ["record", "call"]


@pytest.mark.parametrize(("fails_at", "what"), [(0, "recorded"), (2, "replayed")])
def test_failed_graph_costs_one_line_and_the_kernels_are_launched_one_by_one(caplog, fails_at: int, what: str) -> None:
    with caplog.at_level(logging.WARNING):
        engine = eager(Tape(fails_at)).load(Mix, SPEC)
        found = [engine(*given(seed))[0].clone() for seed in (1, 2, 3)]
    with torch.inference_mode():
        assert all(torch.equal(a, Mix()(*given(seed))) for a, seed in zip(found, (1, 2, 3), strict=True))
    assert len(caplog.messages) == 1
    assert f"mix cannot be {what}" in caplog.text
    assert "second line" not in caplog.text
    assert not engine.replay.is_recorded


@pytest.mark.parametrize("fails_at", [0, 1])
def test_full_memory_is_the_users_to_mend_and_no_fall_back(fails_at: int, caplog) -> None:
    tape = Tape(fails_at, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"))
    with pytest.raises(UserError, match="mix: the GPU's memory is full") as caught:
        eager(tape).load(Mix, SPEC)(*given(1))
    assert "--size" in caught.value.hint
    assert not caplog.messages


def test_lost_card_is_said_with_a_hint() -> None:
    with pytest.raises(UserError, match="stopped working") as caught, device_errors("unet"):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA")
    assert "Xid" in caught.value.hint
    assert "DSA" not in caught.value.message


def test_timesteps_are_not_cast() -> None:
    (found,) = eager(dtype="bfloat16").load(Mix, SPEC)(*given(1))  # where 999 would be 1000
    assert found.dtype == torch.float32
    assert found.abs().sum() > 0


def test_what_overflows_in_one_format_runs_in_the_next(caplog) -> None:
    backend = eager()
    backend.dtypes = ("float16", "bfloat16")
    with caplog.at_level(logging.INFO):
        (found,) = backend.load(Grows, SPEC)(*given(1))
    assert found.isfinite().all()
    assert "mix overflows in float16" in caplog.text


def test_spec_that_is_not_the_modules_is_refused() -> None:
    wrong = EngineSpec("mix", SPEC.inputs, (TensorSpec("y", (2, 9)),), "seed-3")
    with pytest.raises(ValueError, match="mix"):
        eager().load(Mix, wrong)
    with pytest.raises(ValueError, match="mix"):
        eager().load(Mix, SPEC)(torch.zeros(2, 8, dtype=torch.float16), torch.zeros(2))


def test_compiled_engine_agrees_and_its_code_is_kept(tmp_path, monkeypatch) -> None:
    """Compiled code is in an entry of the store; a second backend finds it where inductor's own folder is gone."""
    wanted = None
    for folder in ("one", "two"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / folder))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        engine = CudaBackend("cpu", mode="default", record=Tape()).load(Product, SPEC, tmp_path / "engines")
        found = engine(*given(1))[0].clone()
        wanted = Product()(*given(1)) if wanted is None else wanted
        assert torch.allclose(found, wanted, atol=1e-5)
    assert torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"] == 1
    (entry,) = cache.entries(tmp_path / "engines")
    assert entry.backend.startswith("torch-cuda")
    assert entry.problem is None


def test_damaged_code_in_the_cache_is_compiled_again(tmp_path, caplog) -> None:
    backend = CudaBackend("cpu", mode="default", record=None)
    key = cache.key_of(backend.fingerprint, SPEC)
    cache.write(tmp_path, key, b"not what torch saved", 0.0)
    with caplog.at_level(logging.WARNING):
        engine = backend.load(Product, SPEC, tmp_path)
    assert engine(*given(1))[0].shape == (2, 8)
    assert cache.read(tmp_path, key) not in (None, b"not what torch saved")


class Breaks(nn.Module):
    """Reads a number on the way, which nothing can be traced past."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + 1 if float(t[0]) > 0 else x


def test_what_cannot_be_compiled_runs_as_it_is(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        engine = CudaBackend("cpu", mode="default", record=Tape()).load(Breaks, SPEC)
    assert len([message for message in caplog.messages if "mix is not compiled" in message]) == 1
    assert torch.equal(engine(*given(1))[0], given(1)[0] + 1)


def test_fingerprint_tells_versions_device_formats_and_mode_apart() -> None:
    prints = {
        CudaBackend("cpu", mode=mode, dtype=dtype).fingerprint
        for mode in ("default", None)
        for dtype in ("float32", "bfloat16")
    }
    assert len(prints) == 4
    assert all(torch.__version__.split("+")[0] in text and "driver" in text and "CUDA" in text for text in prints)


def test_ring_of_uploads_leaves_the_callers_picture_alone() -> None:
    upload, target = Upload((2, 3), torch.uint8, CPU), torch.empty(2, 3, dtype=torch.uint8)
    for value in range(5):
        picture = torch.full((2, 3), value, dtype=torch.uint8)
        upload(picture, target)
        picture.zero_()
        assert (target == value).all()


def test_download_hands_through_what_a_cpu_computed() -> None:
    pending = enqueued((torch.ones(1),), CPU)
    assert Download()(pending) is pending
    assert pending.done()


def test_on_a_cpu_there_is_one_stream_and_nothing_is_copied() -> None:
    picture = torch.ones(2, 3)
    with frame_stream(CPU):
        assert brought(picture, CPU) is picture
        assert fetched(picture).wait()[0] is picture
        assert handed(picture) is picture
