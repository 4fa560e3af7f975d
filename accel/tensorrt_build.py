"""Building TensorRT's engines: export here, compile in a child process, keep the result in the cache.

All that is not finished lies in a temporary folder of the cache, on the same disk, and only a whole engine is moved to
its place.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accel import cache as store
from accel import export, fp8, quantised, refit
from accel.engine import EngineSpec
from accel.errors import UserError
from accel.machine import trim_memory
from accel.null_backend import NullEngine
from accel.tensorrt_compiler import LEAST_S, NETWORK, Recipe, Refused, Say, compile_network, full_disk
from accel.tensorrt_provider import Provider, has_fp8, provider_ahead, sm_of

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

Look = Callable[["nn.Module"], None]


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
            with built(module, spec, self.recipe, root, self._say) as made:
                size, build_s = made.file.stat().st_size, time.monotonic() - started
                store.write(root, key, made.file, build_s, error=made.error, beside=made.beside)
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


@dataclass(frozen=True, slots=True)
class Built:
    """A finished engine."""

    file: Path
    error: float | None  # of 8-bit floats, by the pictures; None = there are none
    beside: Mapping[str, bytes]  # files that belong to it


@contextmanager
def built(
    module: Callable[[], nn.Module],
    spec: EngineSpec,
    recipe: Recipe,
    root: Path,
    say: Say,
    look: Look = lambda net: None,
) -> Iterator[Built]:
    """An engine whose file is gone at the end, unless it was moved away. UserError where there can be none.

    `look` is shown the module before it is cast and its weights are dropped.
    """
    if spec.precision == "fp8" and not has_fp8(recipe.target):
        raise UserError(
            f"{spec.name}: {recipe.target} has no 8-bit floats", hint="engine.fp8=false: cards have them from sm_89 on"
        )
    with _workshop(root) as folder:
        for opset in dict.fromkeys((recipe.opset, export.OLDER)):
            expected_s, error = _exported(module, spec, recipe, opset, folder, root, say, look)
            try:
                engine = _compiled(recipe, spec.name, folder, expected_s, say)
            except Refused as refusal:
                reason = str(refusal)
                log.info("%s at opset %d: %s", spec.name, opset, reason)
                continue
            weights = folder / refit.NAME
            yield Built(engine, error, {weights.name: weights.read_bytes()} if weights.exists() else {})
            return
    raise UserError(f"{spec.name}: {recipe.provider.title} refuses the network ({reason})", hint="--engine torch-cuda")


def _exported(
    module: Callable[[], nn.Module],
    spec: EngineSpec,
    recipe: Recipe,
    opset: int,
    folder: Path,
    root: Path,
    say: Say,
    look: Look,
) -> tuple[float, float | None]:
    """Write the network; how long the rest takes, in seconds, and the error of 8-bit floats, where it has them.

    Weights are gone before the compiler needs the memory.
    """
    started, net = time.monotonic(), module()
    weights = sum(p.numel() for p in net.parameters()) * (4 if spec.precision == "fp32" else 2)
    if (free := shutil.disk_usage(folder).free) < 2 * weights + (64 << 20):
        raise full_disk(spec.name, f"{free / 1e9:.1f} GB free, {2 * weights / 1e9:.1f} needed")
    expected_s = _expected_s(root, recipe.provider, weights)
    eighths, error = _eighths(net, spec, recipe.half, say) if spec.precision == "fp8" else ({}, None)
    look(net)
    say(f"{spec.name}: exporting {weights / 1e6:.0f} MB of weights, about {expected_s:.0f} s in all")
    try:
        wide = recipe.target == "sm_75"
        export.export(net, spec, folder / NETWORK, opset, recipe.half, wide=wide, eighths=eighths)
        if spec.architecture:
            (folder / refit.NAME).write_bytes(refit.weight_map(folder / NETWORK, net).to_json())
    except OSError as problem:
        raise full_disk(spec.name, problem.strerror or str(problem)) from problem
    for parameter in net.parameters():  # the exporter's rules remember the last graph that they matched, with all of it
        parameter.data = parameter.data.new_empty(0)
    trim_memory()
    return max(expected_s - (time.monotonic() - started), LEAST_S), error


def _compiled(recipe: Recipe, name: str, folder: Path, expected_s: float, say: Say) -> Path:
    """The engine, whose weights may be replaced where that was asked for and the compiler can do it."""
    try:
        return compile_network(recipe, name, folder, expected_s, say)
    except Refused as refusal:
        if not (folder / refit.NAME).exists():
            raise
        (folder / refit.NAME).unlink()
        # TensorRT-RTX 1.7.1 can without a card as long as no weight at all is marked.
        say(f"{name}: {recipe.provider.title} makes no engine for other weights here, one for these alone then")
        log.info("%s with open weights: %s", name, refusal)
        return compile_network(recipe, name, folder, expected_s, say)


def _eighths(net: nn.Module, spec: EngineSpec, half: str, say: Say) -> tuple[fp8.Reaches, float | None]:
    """Which layers are to be in 8-bit floats, and the error of it; none and None where that is too far."""
    say(f"{spec.name}: what 8-bit floats make of the pictures")
    try:
        eighths, error = fp8.calibrated(net, spec)
    except quantised.Refused as reason:
        say(f"{spec.name}: no fp8 ({reason}), {half} instead")
        return {}, None
    say(f"{spec.name}: fp8 in {len(eighths)} layers, {error:.2g} from float32 in the picture")
    return eighths, error


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
