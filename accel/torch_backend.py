"""PyTorch on the CPU as it is: the reference every other backend is compared with."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from accel.engine import EngineSpec, Ready, check

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class TorchBackend:
    """Eager PyTorch on a device that computes while it is called; CUDA has a backend of its own.

    `dtype` is what "fast" specs compute in, float32 unless another is named: this backend is the reference. Nothing is
    compiled, so the cache folder is not used. On the device "meta" engines have shapes, and no numbers: whatever reads
    one on the way is an error there.

    >>> engine = TorchBackend().load(lambda: net, spec)
    >>> (sample,) = engine(latents, timestep)
    """

    name = "torch"

    def __init__(self, device: str = "cpu", dtype: str | None = None) -> None:
        if device not in ("cpu", "meta"):
            raise ValueError(f"cpu or meta, not {device!r}; see accel.cuda_backend")
        self.device = device
        self.dtype = dtype or "float32"
        self.fingerprint = f"torch {version('torch')}; {device}; fast={self.dtype}"

    def load(self, module: Callable[[], nn.Module], spec: EngineSpec, cache: Path | None = None) -> TorchEngine:
        """Move and cast the module, then run it once, so that a wrong spec is found here (ValueError)."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype if spec.precision != "fp32" else "float32")
        engine = TorchEngine(spec, placed(module(), self.device, dtype), torch.device(self.device), dtype)
        zeros = (torch.zeros(s.shape, dtype=getattr(torch, s.dtype), device=self.device) for s in spec.inputs)
        check(engine(*zeros), spec.outputs, f"{spec.name} on {self.name}: output")
        return engine


class TorchEngine:
    """One module in eval mode; every launch computes at once and returns fresh tensors on the engine's device."""

    def __init__(self, spec: EngineSpec, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        import torch

        self.spec = spec
        self._module = module
        self._device = device
        self._dtype = dtype
        self._output_dtypes: list[torch.dtype] = [getattr(torch, s.dtype) for s in spec.outputs]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.launch(*tensors).wait()

    def launch(self, *tensors: Tensor) -> Ready:
        import torch

        check(tensors, self.spec.inputs, self.spec.name)
        with torch.inference_mode():
            moved = (t.to(self._device, self._dtype if t.is_floating_point() else t.dtype) for t in tensors)
            found = self._module(*moved)
            outputs = (found,) if isinstance(found, torch.Tensor) else tuple(found)
            return Ready(
                tuple(
                    # Only the backend's own cast is undone: another dtype than the spec's is an error, found by load().
                    o.to(want) if o.is_floating_point() and want.is_floating_point else o
                    for o, want in zip(outputs, self._output_dtypes, strict=True)
                )
            )


def placed(module: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """The module for inference on a device, its convolutions' weights laid out channels last."""
    import torch

    module = module.eval().requires_grad_(False).to(device, dtype)
    # Parameter by parameter, because Module.to(memory_format=) refuses networks with a 5-D weight in them.
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module
