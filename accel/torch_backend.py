"""PyTorch as it is: the reference every other backend is compared with, and the engine of CUDA devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from accel.engine import EngineSpec, Pending, Ready, check

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class TorchBackend:
    """Eager PyTorch on one device.

    `dtype` is what "fast" specs compute in: by default float32 on a CPU, where this backend is the reference,
    and float16 on CUDA. Nothing is compiled, so the cache folder is not used.

    >>> engine = TorchBackend().load(lambda: net, spec)
    >>> (sample,) = engine(latents, timestep)
    """

    def __init__(self, device: str = "cpu", dtype: str | None = None) -> None:
        import torch

        kind = torch.device(device).type
        self.name = "torch" if kind == "cpu" else f"torch-{kind}"
        self.device = device
        self.dtype = dtype or ("float32" if kind == "cpu" else "float16")
        hardware = torch.cuda.get_device_name(device) if kind == "cuda" else kind
        self.fingerprint = f"torch {version('torch')}; {hardware}; fast={self.dtype}"

    def load(self, module: Callable[[], nn.Module], spec: EngineSpec, cache: Path | None = None) -> TorchEngine:
        """Move and cast the module, then run it once, so that a wrong spec is found here (ValueError)."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype if spec.precision == "fast" else "float32")
        net = module().eval().requires_grad_(False).to(self.device, dtype)
        # Parameter by parameter, because Module.to(memory_format=) refuses networks with a 5-D weight in them.
        for parameter in net.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        engine = TorchEngine(spec, net, torch.device(self.device), dtype)
        zeros = (torch.zeros(s.shape, dtype=getattr(torch, s.dtype), device=self.device) for s in spec.inputs)
        check(engine(*zeros), spec.outputs, f"{spec.name} on {self.name}: output")
        return engine


class TorchEngine:
    """One module in eval mode; every launch returns fresh tensors on the engine's device."""

    def __init__(self, spec: EngineSpec, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        import torch

        self.spec = spec
        self._module = module
        self._device = device
        self._dtype = dtype
        self._output_dtypes: list[torch.dtype] = [getattr(torch, s.dtype) for s in spec.outputs]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.launch(*tensors).wait()

    def launch(self, *tensors: Tensor) -> Pending:
        """Compute at once on a CPU; on CUDA, enqueue on the current stream."""
        import torch

        check(tensors, self.spec.inputs, self.spec.name)
        with torch.inference_mode():
            moved = (
                t.to(self._device, self._dtype if t.is_floating_point() else t.dtype, non_blocking=True)
                for t in tensors
            )
            found = self._module(*moved)
            outputs = (found,) if isinstance(found, torch.Tensor) else tuple(found)
            outputs = tuple(
                # Only the backend's own cast is undone: another dtype than the spec's is an error, found by load().
                o.to(want) if o.is_floating_point() and want.is_floating_point else o
                for o, want in zip(outputs, self._output_dtypes, strict=True)
            )
        if self._device.type != "cuda":
            return Ready(outputs)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return CudaPending(outputs, event)


@dataclass(frozen=True, slots=True)
class CudaPending:
    """Outputs being computed on a CUDA stream, and the event behind them."""

    outputs: tuple[Tensor, ...]
    event: torch.cuda.Event

    def done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> tuple[Tensor, ...]:
        self.event.synchronize()
        return self.outputs
