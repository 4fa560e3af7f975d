"""TensorRT's engines: built without a GPU and kept whole, what goes wrong on the way, and run where there is a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from accel import cache, select, tensorrt_backend, tensorrt_compiler, tensorrt_engine, tensorrt_provider
from accel.engine import EngineSpec, TensorSpec
from accel.errors import UserError
from accel.hold import hold, is_held
from accel.tensorrt_build import TensorRTBuilder, alone
from accel.tensorrt_compiler import NETWORK, Recipe
from accel.tensorrt_engine import Scratch, TensorRTEngine
from accel.tensorrt_jit import Kernels
from accel.tensorrt_provider import RTX, TENSORRT, Provider, lack, provider_for, sm_of, tried
from tests.fakes import PATIENCE

ROOT = Path(__file__).parent.parent
X, Y = TensorSpec("x", (1, 4, 8, 8)), TensorSpec("y", (1, 4, 8, 8))
SPEC = EngineSpec("net", (X,), (Y,), "seed 0")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


class Counted:
    """A factory that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> nn.Module:
        self.calls += 1
        return Net()


def entry(root: Path, spec: EngineSpec = SPEC) -> Path:
    return root / cache.digest_of(cache.key_of(TensorRTBuilder("sm_89").fingerprint, spec))


def leftovers(root: Path) -> list[str]:
    """All but locks, which are empty files."""
    return [path.name for path in root.iterdir() if not path.name.startswith(".lock-")]


def assert_users_error(error: UserError) -> None:
    assert error.hint
    assert "\n" not in error.message + error.hint


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the net's engine, for tests that do not change it."""
    root = tmp_path_factory.mktemp("engines")
    TensorRTBuilder("sm_89").load(Net, SPEC, root)
    return root


def copied(stored: Path, to: Path) -> Path:
    subprocess.run(["cp", "-r", stored, to], check=True)
    return to


# --- what is built and kept ---


def test_second_build_finds_the_first_and_asks_for_no_module(stored: Path) -> None:
    factory, said = Counted(), list[str]()
    engine = TensorRTBuilder("8.9", say=said.append).load(factory, SPEC, stored)
    assert factory.calls == 0
    assert said == [f"net: there already, {entry(stored).name}"]
    assert torch.equal(engine(torch.zeros(X.shape))[0], torch.zeros(Y.shape))  # it computes nothing here
    (found,) = cache.verify(stored)
    assert found.problem is None
    assert found.backend.startswith("tensorrt_rtx ")
    assert found.size > 10_000


def test_progress_names_the_network_and_how_long_it_takes(tmp_path: Path) -> None:
    said: list[str] = []
    TensorRTBuilder("sm_75", say=said.append).load(Net, SPEC, tmp_path)
    assert [line.split(",")[0] for line in said[:2]] == ["net: exporting 0 MB of weights", "net: building for sm_75"]
    assert said[0].endswith(" s in all")
    assert said[1].endswith(" s")
    assert said[-1].endswith(next(name for name in leftovers(tmp_path)))
    assert len(leftovers(tmp_path)) == 1


def test_whatever_changes_an_engine_changes_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(RTX, "sm_89")

    def digest(recipe: Recipe = recipe, **spec: Any) -> str:
        return cache.digest_of(cache.key_of(recipe.fingerprint, replace(SPEC, **spec)))

    found = [
        digest(),
        digest(fingerprint="seed 1"),
        digest(inputs=(TensorSpec("x", (1, 4, 8, 16)),)),
        digest(inputs=(TensorSpec("x", (1, 4, 8, 8), "float16"),)),
        digest(precision="fp32"),
        digest(replace(recipe, target="sm_86")),
        digest(replace(recipe, half="bfloat16")),
        digest(replace(recipe, opset=21)),
    ]
    assert digest() == found[0]
    real = metadata.version
    for package in ("tensorrt_rtx_cu13_bindings", "torch", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setattr("accel.export.version", lambda name, p=package: "9" if name == p else real(name))
            patch.setattr(metadata, "version", lambda name, p=package: "9" if name == p else real(name))
            found.append(digest())
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("damage", ["changed", "cut", "no engine", "no manifest", "emptied"])
def test_a_damaged_engine_is_noticed_and_built_again(damage: str, stored: Path, tmp_path: Path) -> None:
    root = copied(stored, tmp_path / "engines")
    engine = entry(root) / "engine.bin"
    whole = engine.read_bytes()
    match damage:
        case "changed":
            engine.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        case "cut":
            engine.write_bytes(whole[: len(whole) // 2])
        case "no engine":
            engine.unlink()
        case "no manifest":  # as after a copy that was broken off
            (entry(root) / "manifest.json").unlink()
        case "emptied":
            (entry(root) / "manifest.json").write_text("")
    factory = Counted()
    TensorRTBuilder("sm_89").load(factory, SPEC, root)
    assert factory.calls == 1
    assert [e.problem for e in cache.verify(root)] == [None]


BUILDING = """
import sys
from pathlib import Path
from accel.tensorrt_build import TensorRTBuilder
from tests.test_tensorrt import Net, SPEC
print("ready", flush=True); sys.stdin.readline()
TensorRTBuilder("sm_89", say=lambda line: print(line, flush=True)).load(Net, SPEC, Path(sys.argv[1]))
"""


def started(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process, up to where it says that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    return process


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    both = [started(BUILDING, tmp_path) for _ in range(2)]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=PATIENCE * 4)[0] for process in both]
    assert sorted("there already" in text for text in said) == [False, True]
    assert [e.problem for e in cache.verify(tmp_path)] == [None]
    assert leftovers(tmp_path) == [entry(tmp_path).name]


HOLDING = """
import sys, time
from pathlib import Path
from accel.hold import hold
held = hold(Path(sys.argv[1]))
print("ready", flush=True); time.sleep(600)
"""


def test_prune_keeps_what_another_process_uses_until_that_ends(stored: Path, tmp_path: Path) -> None:
    root = copied(stored, tmp_path / "engines")
    process = started(HOLDING, entry(root))
    try:
        assert is_held(entry(root))
        assert cache.prune(root, 0) == []
        assert cache.sound(root, cache.key_of(TensorRTBuilder("sm_89").fingerprint, SPEC))
    finally:
        process.kill()
        process.communicate()
    assert not is_held(entry(root))
    assert [e.digest for e in cache.prune(root, 0)] == [entry(root).name]
    assert hold(entry(root)) is None


# --- what goes wrong ---


SLEEPING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell has put into the background
from accel import export, tensorrt_compiler
ASLEEP = "import pathlib, sys, time; pathlib.Path(sys.argv[1], 'asleep').touch(); time.sleep(600)"
tensorrt_compiler.command = lambda recipe, folder: [sys.executable, "-c", ASLEEP, str(folder)]
export.export = lambda *given, **more: None
"""


def test_ctrl_c_ends_the_compiler_and_leaves_nothing(tmp_path: Path) -> None:
    process = started(SLEEPING + BUILDING, tmp_path)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    while "building" not in process.stdout.readline():
        assert process.poll() is None
    compiler = children(process.pid)
    until = time.monotonic() + PATIENCE
    while not list(tmp_path.rglob("asleep")):  # by then its parent waits for it
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in compiler)
    assert leftovers(tmp_path) == []


def children(pid: int) -> list[psutil.Process]:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if found := psutil.Process(pid).children():
            return found
        time.sleep(0.02)
    raise AssertionError("no compiler was started")


def test_the_compiler_ends_with_the_process_that_wanted_it() -> None:
    code = "import threading, time; from accel.tensorrt_compile import _end_with_the_parent as e\n"
    code += "threading.Thread(target=e, daemon=True).start(); print('ready', flush=True); time.sleep(600)"
    process = started(code)
    process.communicate(timeout=PATIENCE)  # closes its standard input
    assert process.returncode == 1


def answering(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Put this in the compiler's place; what it would read is not written."""
    monkeypatch.setattr(tensorrt_compiler, "command", lambda recipe, folder: [sys.executable, "-c", code])
    monkeypatch.setattr("accel.export.export", lambda *given, **more: None)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import json; print(json.dumps({'disk': 'No space left on device'}))", "No space left on device"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9"),
        ("import os; os.kill(os.getpid(), 11)", "crashes, signal 11"),
        ("import json; print(json.dumps({'refused': 'no such operator'})); raise SystemExit(1)", "no such operator"),
        ("raise ImportError('libnvinfer.so.11')", "libnvinfer.so.11"),
    ],
)
def test_a_build_that_fails_is_the_users_error_and_leaves_nothing(
    code: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answering(monkeypatch, code)
    with pytest.raises(UserError, match=words) as caught:
        TensorRTBuilder("sm_89").load(Net, SPEC, tmp_path)
    assert_users_error(caught.value)
    assert leftovers(tmp_path) == []


def test_what_is_refused_with_attention_is_tried_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[int] = []
    answering(monkeypatch, "import json; print(json.dumps({'refused': 'Attention'}))")
    monkeypatch.setattr("accel.export.export", lambda net, spec, path, opset, half, **more: seen.append(opset))
    with pytest.raises(UserError, match="refuses the network"):
        TensorRTBuilder("sm_89").load(Net, SPEC, tmp_path)
    assert seen == [23, 21]


def test_a_full_disk_is_told_by_the_compiler(tmp_path: Path) -> None:
    from accel.export import export

    if not Path("/dev/full").exists():
        return  # Linux has a disk that is always full
    export(Net(), SPEC, tmp_path / NETWORK)
    command = [sys.executable, "-m", "accel.tensorrt_compile", RTX.name, "sm_89", str(tmp_path / NETWORK), "/dev/full"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    answer = json.loads(process.stdout.read().splitlines()[-1])
    process.communicate()
    assert (process.returncode, answer) == (1, {"disk": "No space left on device"})


def test_too_little_room_is_told_before_anything_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="GB free") as caught:
        TensorRTBuilder("sm_89").load(Net, SPEC, tmp_path)
    assert "prune" in caught.value.hint
    assert leftovers(tmp_path) == []


def test_a_lock_that_cannot_be_made_costs_nothing() -> None:
    with alone(Path("/dev/null/engines"), cache.key_of("x", SPEC)):
        pass


# --- which of the two, and whether it works ---


def installed(monkeypatch: pytest.MonkeyPatch, *providers: Provider) -> None:
    packages = {package for provider in providers for package in provider.packages}
    real = metadata.version

    def version(name: str) -> str:
        if name.startswith("tensorrt"):
            if name not in packages:
                raise metadata.PackageNotFoundError(name)
            return "11.4"
        return real(name)

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize(
    ("sm", "providers", "expected"),
    [
        ("sm_75", (RTX,), RTX),
        ("sm_89", (RTX, TENSORRT), RTX),
        ("sm_120", (TENSORRT,), TENSORRT),
        ("sm_90", (RTX, TENSORRT), TENSORRT),
        ("sm_80", (TENSORRT,), TENSORRT),
        ("sm_89", (), "livestyle[rtx]"),
        ("sm_90", (RTX,), "torch-cuda"),
        ("sm_100", (), "torch-cuda"),
    ],
)
def test_the_card_decides(
    sm: str, providers: tuple[Provider, ...], expected: Provider | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, *providers)
    if isinstance(expected, Provider):
        assert provider_for(sm) is expected
        return
    with pytest.raises(UserError) as caught:
        provider_for(sm)
    assert expected in caught.value.hint
    assert_users_error(caught.value)


def test_an_h200_with_rtx_alone_is_told_why_and_auto_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, RTX)
    monkeypatch.setattr(select, "_has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.raises(UserError, match=r"compute capability 9\.0") as caught:
        select.choose("tensorrt")
    assert "torch-cuda" in caught.value.hint
    monkeypatch.setattr(select, "_make", lambda name, threads: type("Fake", (), {"name": name, "device": "cuda"})())
    choice = select.choose("auto")
    assert choice.backend.name == "torch-cuda"
    assert "9.0" in choice.reason
    assert "\n" not in choice.reason


@pytest.mark.parametrize(("text", "sm"), [("sm_89", "sm_89"), ("8.9", "sm_89"), ("120", "sm_120"), ("SM_75", "sm_75")])
def test_a_target_is_read_however_it_is_spelt(text: str, sm: str) -> None:
    assert sm_of(text) == sm


@pytest.mark.parametrize("target", ["", "ada", "sm_", "sm_8", "sm_1234", "sm_90", "sm_80"])
def test_what_cannot_be_built_ahead_is_refused(target: str) -> None:
    with pytest.raises(UserError) as caught:
        TensorRTBuilder(target)
    assert "sm_89" in caught.value.message + caught.value.hint
    assert_users_error(caught.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import os; os.kill(os.getpid(), 11)", "it crashes, signal 11"),
        ("raise ImportError('libnvinfer.so.11: not found')", "libnvinfer.so.11"),
        ("Logger = type('L', (), {'ERROR': 1, '__init__': lambda *a: None})\nRuntime = None", "TypeError"),
    ],
)
def test_a_library_that_does_not_work_is_tried_out_elsewhere(
    body: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_tensorrt.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tensorrt_provider, "provider_for", lambda sm: replace(RTX, module="broken_tensorrt"))
    tried.cache_clear()
    found = lack("sm_89")
    tried.cache_clear()
    assert found is not None
    assert words in found.message
    assert_users_error(found)


# --- at work: with a stand-in for the library, then with a GPU ---


class Raw:
    """What TensorRT gives: an engine that remembers what is bound to it and counts its runs."""

    device_memory_size_v2 = 1000

    def __init__(self, shape: tuple[int, ...] = Y.shape) -> None:
        self.shape, self.bound, self.runs, self.scratch = shape, dict[str, int](), 0, 0
        self.kernels = b""

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def get_tensor_dtype(self, name: str) -> Any:
        return type("Type", (), {"name": "FLOAT"})

    def create_runtime_config(self) -> Any:
        return self

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        assert strategy == "user managed"

    def create_runtime_cache(self) -> Any:
        return self

    def set_runtime_cache(self, given: Any) -> None:
        assert given is self

    def serialize(self) -> bytes:
        return b"compiled" if self.runs else b""

    def deserialize(self, kernels: bytes) -> bool:
        self.kernels = kernels
        return True

    def create_execution_context(self, config: Any) -> Any:
        return self

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.device_memory_size_v2
        self.scratch = address

    def get_tensor_address(self, name: str) -> int:
        return self.bound.get(name, 0)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.bound[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.runs += 1
        return set(self.bound) == {"x", "y"}


Trt = type("Trt", (), {"ExecutionContextAllocationStrategy": type("S", (), {"USER_MANAGED": "user managed"})})


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Scratch:
    monkeypatch.setattr(tensorrt_engine, "ALIGNED", 1)  # on a CPU tensors are aligned to 64 bytes
    return Scratch(torch.device("cpu"))


def test_engines_are_bound_once_and_share_their_scratch(scratch: Scratch, tmp_path: Path) -> None:
    first, second = Raw(), Raw()
    one, _ = (TensorRTEngine(Trt, raw, SPEC, scratch, Kernels(raw, tmp_path), None) for raw in (first, second))
    bound, runs = dict(first.bound), first.runs
    outputs = [one(torch.full(X.shape, float(n))) for n in range(3)]
    assert first.bound == bound
    assert first.runs == runs + 3
    assert first.scratch == second.scratch
    assert outputs[0][0].data_ptr() == outputs[2][0].data_ptr() == bound["y"]  # valid until the next launch
    assert one.launch(torch.zeros(X.shape)).wait()[0].shape == Y.shape
    with pytest.raises(ValueError, match="net"):
        one(torch.zeros(1, 4, 8, 9))


def test_compiled_kernels_are_kept_beside_the_engine_and_found_again(scratch: Scratch, tmp_path: Path) -> None:
    first, second = Raw(), Raw()
    engine = TensorRTEngine(Trt, first, SPEC, scratch, Kernels(first, None), None)
    (tmp_path / "manifest.json").write_text("{}")
    engine.keep(tmp_path)
    assert is_held(tmp_path)
    TensorRTEngine(Trt, second, SPEC, scratch, Kernels(second, tmp_path), None)
    assert second.kernels == b"compiled"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jit.bin", "manifest.json"]
    del engine
    assert not is_held(tmp_path)


def test_an_engine_of_other_shapes_is_never_run(scratch: Scratch) -> None:
    raw = Raw((1, 4, 8, 9))
    with pytest.raises(ValueError, match="engine's x is float32"):
        TensorRTEngine(Trt, raw, SPEC, scratch, Kernels(raw, None), None)
    assert raw.runs == 0


def why_no_gpu() -> str:
    if not torch.cuda.is_available():
        return "needs a gpu"
    major, minor = torch.cuda.get_device_capability()
    problem = lack(f"sm_{major}{minor}")
    return f"needs a gpu that TensorRT serves: {problem.message}" if problem else ""


@pytest.fixture
def backend() -> Callable[[], tensorrt_backend.TensorRTBackend]:
    if reason := why_no_gpu():
        pytest.skip(reason)
    return tensorrt_backend.TensorRTBackend


@pytest.mark.gpu
def test_engines_agree_with_torch_plain_and_as_a_graph(backend: Callable[[], Any], tmp_path: Path) -> None:
    factory = Counted()
    for _ in range(2):  # built, then out of the cache
        engine = backend().load(factory, SPEC, tmp_path)
        for seed in range(3):
            x = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed))
            wanted = Net()(x).detach()
            assert (engine(x)[0].cpu() - wanted).norm() < 1e-2 * wanted.norm()
        assert engine.replay.is_recorded
    assert factory.calls == 1
    (found,) = cache.verify(tmp_path)
    assert found.problem is None
    manifest = json.loads((tmp_path / found.digest / "manifest.json").read_text())
    assert manifest["error"] < 1e-2


@pytest.mark.gpu
def test_another_versions_engine_is_dropped_and_built_again(backend: Callable[[], Any], tmp_path: Path) -> None:
    made = backend()
    cache.write(tmp_path, cache.key_of(made.fingerprint, SPEC), b"not an engine", 0.0)
    factory = Counted()
    made.load(factory, SPEC, tmp_path)
    assert factory.calls == 1
    assert [e.problem for e in cache.verify(tmp_path)] == [None]
