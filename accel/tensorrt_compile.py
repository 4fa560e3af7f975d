"""The compiler's process: `python -m accel.tensorrt_compile PROVIDER TARGET network.onnx engine.bin [timing.bin]`.

Where `accel.refit`'s map lies beside the network, the engine can be given other weights. The last line is JSON: {} when
the engine is written, else {"refused": why} or {"disk": why}. It ends when its standard input does, so nobody is left
behind who builds for nobody. Strong types: the precision is that of the file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accel.machine import give_way
from accel.refit import NAME, WeightMap
from accel.tensorrt_provider import PROVIDERS, Provider

FORMAT = 2  # raise it when the settings below change what is built: part of every key
NOISE = ("cudaError 35", "Begin node", "End node", "Node name:")  # no driver here, and the parser's commentary


def main(arguments: Sequence[str]) -> int:
    provider, target, network, engine, *timing = arguments
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches us too, and Python would hear it after the build
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    give_way()
    answer: dict[str, str] = {}
    try:
        plan = compiled(PROVIDERS[provider], target, Path(network), Path(timing[0]) if timing else None)
        with open(engine, "wb") as file:
            file.write(plan)
    except OSError as error:
        answer = {"disk": error.strerror or str(error)}
    except (RuntimeError, TypeError, ImportError) as error:  # TypeError is how TensorRT says that there is no driver
        answer = {"refused": " ".join(str(error).split())[:500]}
    print(json.dumps(answer), flush=True)
    return 1 if answer else 0


def compiled(provider: Provider, target: str, network: Path, timing: Path | None = None) -> Any:
    """The serialized engine; RuntimeError with TensorRT's own reason where there is none."""
    trt: Any = provider.library()
    log = _listener(trt)
    builder = trt.Builder(log)
    definition = builder.create_network(0)
    parser = trt.OnnxParser(definition, log)
    if not parser.parse_from_file(str(network)):
        raise RuntimeError("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)) or "cannot be read")
    config = builder.create_builder_config()
    if provider.targets:
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(trt.ComputeCapability, target.replace("_", "").upper()), 0):
            raise RuntimeError(f"{target} is not supported")
    if (mapped := network.with_name(NAME)).is_file():
        _keep_open(trt, definition, config, WeightMap.of_json(mapped.read_bytes()))
    cache = _timings(config, timing) if timing else None
    plan = builder.build_serialized_network(definition, config)
    if plan is None:
        raise RuntimeError("; ".join(log.errors) or "no engine and no reason")
    if timing and cache is not None:
        _replace(timing, bytes(cache.serialize()))
    return plan


def _keep_open(trt: Any, definition: Any, config: Any, weights: WeightMap) -> None:
    """Let these weights be replaced: one by one, since to leave all open TensorRT-RTX wants a card at hand."""
    config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    for name in weights.tensors:
        if not definition.mark_weights_refittable(name):
            raise RuntimeError(f"{name} cannot be kept open")


def _listener(trt: Any) -> Any:
    """A logger that remembers errors, which TensorRT tells nowhere else."""

    class Listener(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR and not any(noise in message for noise in NOISE):
                self.errors.append(message)

    return Listener()


def _timings(config: Any, path: Path) -> Any:
    """What kernels took on this card before; a file that is no such is passed over."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not cache or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _replace(path: Path, content: bytes) -> None:
    """Write whole or not at all."""
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _end_with_the_parent() -> None:
    while os.read(0, 1 << 10):  # not sys.stdin, which Python would wait for at its own end
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
