"""Which backend: the one that was asked for, or the best this machine has."""

from __future__ import annotations

from dataclasses import dataclass

from accel.engine import Backend
from accel.errors import UserError

ORDER = ("tensorrt", "torch-cuda", "openvino", "torch")  # how "auto" walks
NAMES = ("auto", *ORDER, "null")


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend, and one line that says which and why."""

    backend: Backend
    reason: str


def choose(name: str = "auto", threads: int | None = None) -> Choice:
    """Make the named backend, or for "auto" the first of `ORDER` that this machine has.

    `threads` bounds OpenVINO's threads. Raises UserError for an unknown name, and for a named engine that is
    missing here: only "auto" falls back.

    >>> choice = choose("auto")
    >>> log.info(choice.reason)
    """
    if name not in NAMES:
        raise UserError(f"unknown engine: {name}", hint=f"choose one of {', '.join(NAMES)}")
    if name != "auto":
        lack = missing(name)
        if lack:
            raise lack
        backend = _make(name, threads)
        return Choice(backend, f"engine {name} ({backend.device}): as asked")
    passed: list[str] = []
    for candidate in ORDER:
        lack = missing(candidate)
        if lack is None:
            backend = _make(candidate, threads)
            because = f"; {'; '.join(passed)}" if passed else ""
            return Choice(backend, f"engine {candidate} ({backend.device}): the first of {' → '.join(ORDER)}{because}")
        passed.append(lack.message)
    raise UserError("no engine can run here", hint="install PyTorch: pip install torch")


def missing(name: str) -> UserError | None:
    """Return what the named engine lacks on this machine, as the error to show, or None when it can run."""
    if name in ("tensorrt", "torch-cuda"):
        if not _has_cuda():
            return UserError(f"{name}: no CUDA device", hint="use --engine openvino or --engine torch, or auto")
        if name == "tensorrt":
            return _tensorrt_lack()
    if name == "openvino":
        try:
            from accel.openvino_backend import library

            library()
        except ImportError as error:
            return UserError(f"openvino: cannot be imported ({error})", hint="pip install openvino, or use auto")
    if not _has_torch():
        return UserError(f"{name}: PyTorch is not installed", hint="pip install torch")
    return None


def _make(name: str, threads: int | None) -> Backend:
    if name == "openvino":
        from accel.openvino_backend import OpenVINOBackend

        return OpenVINOBackend(threads=threads)
    if name == "null":
        from accel.null_backend import NullBackend

        return NullBackend()
    if name == "tensorrt":
        from accel.tensorrt_backend import TensorRTBackend

        return TensorRTBackend()
    if name == "torch-cuda":
        from accel.cuda_backend import CudaBackend

        return CudaBackend()
    from accel.torch_backend import TorchBackend

    return TorchBackend()


def _tensorrt_lack() -> UserError | None:
    """Which of the two TensorRTs serves the card that is here, and works, is `accel.tensorrt_provider`'s to know."""
    import torch

    from accel.tensorrt_provider import lack

    try:
        major, minor = torch.cuda.get_device_capability()
    except (RuntimeError, AssertionError) as error:  # how a PyTorch without CUDA says so
        return UserError(f"tensorrt: no CUDA device ({error})", hint="use --engine torch, or auto")
    return lack(f"sm_{major}{minor}")


def _has_torch() -> bool:
    from importlib.util import find_spec

    return find_spec("torch") is not None


def _has_cuda() -> bool:
    if not _has_torch():
        return False
    import torch

    return torch.cuda.is_available()
