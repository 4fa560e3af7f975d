"""Building TensorRT's engines: export here, compile in a child process, keep the result in the cache.

The child has its reasons: Ctrl-C ends it at once, while in C++ it would not be heard for minutes; where the compiler
crashes, streams go on; its memory is given back. It imports no torch. All that is not finished lies in a temporary
folder of the cache, on the same disk, and only a whole engine is moved to its place.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accel import cache as store
from accel import export
from accel.engine import EngineSpec
from accel.errors import UserError
from accel.machine import trim_memory
from accel.null_backend import NullEngine
from accel.tensorrt_compile import FORMAT
from accel.tensorrt_provider import Provider, provider_ahead, sm_of

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

Say = Callable[[str], None]
TELL_S = 5.0  # between two lines of progress
LEAST_S = 2.0  # to build anything
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
NETWORK, ENGINE, TOLD = "network.onnx", "engine.bin", "told.txt"  # in the temporary folder


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is built besides module and spec."""

    provider: Provider
    target: str  # "sm_89"
    half: str = "float16"  # what "fast" specs compute in
    opset: int = export.OPSET

    @property
    def fingerprint(self) -> str:
        """All of it, with every version that counts; begins with the provider's name."""
        made = f"{self.provider.name} {self.provider.version()}; {self.target}; build {FORMAT}"
        return f"{made}; {export.recipe(self.opset, self.half)}"


class Refused(Exception):
    """TensorRT cannot compile this file."""


class TensorRTBuilder:
    """A backend that only fills the cache, for this or another card, on a machine that may have none.

    What it loads computes nothing: zeros in the right shapes.

    >>> TensorRTBuilder("sm_89", say=print).load(graph.build, graph.spec, default_root())
    """

    name = "tensorrt"

    def __init__(self, target: str, half: str = "float16", say: Say = lambda line: None) -> None:
        self.device = sm_of(target)
        self.recipe = Recipe(provider_ahead(self.device), self.device, half)
        if lack := export.missing():
            raise lack
        self.fingerprint = self.recipe.fingerprint
        self._say = say

    def load(self, module: Callable[[], nn.Module], spec: EngineSpec, cache: Path | None = None) -> NullEngine:
        """Build and store the engine, unless a sound one is there."""
        root = cache or store.default_root()
        key = store.key_of(self.fingerprint, spec)
        with alone(root, key):
            if store.sound(root, key):
                self._say(f"{spec.name}: there already, {store.digest_of(key)}")
                return NullEngine(spec)
            started = time.monotonic()
            with built(module, spec, self.recipe, root, self._say) as engine:
                size, build_s = engine.stat().st_size, time.monotonic() - started
                store.write(root, key, engine, build_s)
            self._say(f"{spec.name}: {build_s:.0f} s, {size / 1e6:.0f} MB, {store.digest_of(key)}")
        return NullEngine(spec)


@contextmanager
def alone(root: Path, key: store.Key) -> Iterator[None]:
    """Only one process builds this engine; others wait here, and then find it. Locks of the dead do not last."""
    from filelock import FileLock

    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f".lock-{store.digest_of(key)}")
        lock.acquire()
    except (OSError, NotImplementedError):  # a folder that cannot be written to, or knows no locks: build twice then
        yield
        return
    try:
        yield
    finally:
        lock.release()


@contextmanager
def built(module: Callable[[], nn.Module], spec: EngineSpec, recipe: Recipe, root: Path, say: Say) -> Iterator[Path]:
    """A finished engine's file, gone again at the end unless it was moved away. UserError where there can be none."""
    with _workshop(root) as folder:
        for opset in dict.fromkeys((recipe.opset, export.OLDER)):
            expected_s = _exported(module, spec, recipe, opset, folder, root, say)
            try:
                engine = compile_network(recipe, spec.name, folder, expected_s, say)
            except Refused as error:
                reason = str(error)
                log.info("%s at opset %d: %s", spec.name, opset, reason)
                continue
            yield engine
            return
    raise UserError(f"{spec.name}: {recipe.provider.title} refuses the network ({reason})", hint="--engine torch-cuda")


def _exported(
    module: Callable[[], nn.Module], spec: EngineSpec, recipe: Recipe, opset: int, folder: Path, root: Path, say: Say
) -> float:
    """Write the network; how long the rest takes, in seconds. Weights are gone before the compiler needs the memory."""
    started, net = time.monotonic(), module()
    weights = sum(p.numel() for p in net.parameters()) * (4 if spec.precision == "fp32" else 2)
    if (free := shutil.disk_usage(folder).free) < 2 * weights + (64 << 20):
        raise _full(spec.name, f"{free / 1e9:.1f} GB free, {2 * weights / 1e9:.1f} needed")
    expected_s = _expected_s(root, recipe.provider, weights)
    say(f"{spec.name}: exporting {weights / 1e6:.0f} MB of weights, about {expected_s:.0f} s in all")
    try:
        export.export(net, spec, folder / NETWORK, opset, recipe.half, wide=recipe.target == "sm_75")
    except OSError as error:
        raise _full(spec.name, error.strerror or str(error)) from error
    for parameter in net.parameters():  # the exporter's rules remember the last graph that they matched, with all of it
        parameter.data = parameter.data.new_empty(0)
    trim_memory()
    return max(expected_s - (time.monotonic() - started), LEAST_S)


def command(recipe: Recipe, folder: Path) -> list[str]:
    """The compiler's command line, to be run in the folder."""
    provider = recipe.provider
    found = [sys.executable, "-m", "accel.tensorrt_compile", provider.name, recipe.target, NETWORK, ENGINE]
    if not provider.targets:  # it times kernels, and what it has timed once it need not again
        found.append(str(folder.parent / f"timing-{provider.version()}-{recipe.target}.bin"))
    return found


def compile_network(recipe: Recipe, name: str, folder: Path, expected_s: float = LEAST_S, say: Say = log.info) -> Path:
    """The engine of the network in this folder: run the compiler in a child, and tell how far it is by the clock.

    TensorRT's own progress is of no use: nearly all of its time passes in one step.
    """
    say(f"{name}: building for {recipe.target}, about {expected_s:.0f} s")
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    started = time.monotonic()
    with (folder / TOLD).open("wb") as told:
        # The child reads its standard input to the end, so that it ends with this process however this one does.
        child = subprocess.Popen(
            command(recipe, folder), cwd=folder, stdin=subprocess.PIPE, stdout=told, stderr=told, env=environment
        )
        try:
            while child.poll() is None:
                try:
                    child.wait(TELL_S)
                except subprocess.TimeoutExpired:
                    spent = time.monotonic() - started
                    left = f"about {expected_s - spent:.0f} s left" if spent < expected_s else "longer than expected"
                    say(f"{name}: building, {spent:.0f} s, {left}")
        finally:  # also of Ctrl-C
            child.kill()
            child.communicate()
    _judge(child.returncode, (folder / TOLD).read_text(errors="replace").strip().splitlines(), name, recipe)
    return folder / ENGINE


def _judge(status: int, told: list[str], name: str, recipe: Recipe) -> None:
    """Say what a child that has ended tells."""
    title = recipe.provider.title
    if -status in CRASHES:  # in 1.7.1 by some networks with two Attentions in a layer, which it builds spelt out
        raise Refused(f"the compiler crashes, signal {-status}")
    if status < 0:
        raise UserError(
            f"{name}: {title}'s compiler was ended by signal {-status}",
            hint="too little memory ends it so: close other programs, or use --engine torch-cuda",
        )
    last = told[-1] if told else "it says nothing"
    answer = json.loads(last) if last.startswith("{") else {"refused": last}
    if "disk" in answer:
        raise _full(name, answer["disk"])
    if status or "refused" in answer:
        raise Refused(answer.get("refused", f"exit status {status}"))


def _expected_s(root: Path, provider: Provider, weights: int) -> float:
    """How long builds of that size have taken here, or elsewhere."""
    ours = [e for e in store.entries(root) if e.backend.startswith(f"{provider.name} ") and e.size > 1e7]
    spent, size = sum(e.build_s for e in ours), sum(e.size for e in ours)
    return LEAST_S + (spent / size if size else provider.s_per_gb / 1e9) * weights


@contextmanager
def _workshop(root: Path) -> Iterator[Path]:
    """A temporary folder on the disk where the engine is to be, so that it need not be copied."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=store.TEMPORARY, dir=root)
    except OSError:  # a cache that cannot be written to is told later, and costs a build each time
        folder = tempfile.mkdtemp()
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _full(name: str, reason: str) -> UserError:
    return UserError(
        f"{name}: the engine cannot be written ({reason})",
        hint="livestyle engines prune --max-mb 0, or LIVESTYLE_CACHE=/another/disk",
    )
