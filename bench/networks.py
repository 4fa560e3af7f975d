"""The networks of one model, with inputs, as `bench.engines` measures them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from accel.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from accel.engine import TensorSpec


def measure_model(
    model: str = "mini",
    size: tuple[int, int] = (512, 288),
    engines: tuple[str, ...] = (),
    n: int = 30,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Report `bench.engines.measure` of every network of a model; `engines` none named: all this machine has."""
    import torch

    from accel.select import ORDER, choose, missing
    from bench.engines import Network, measure
    from bench.record import model_of
    from models.load import compiled_graphs

    chosen = [choose(name) for name in engines or [name for name in ORDER if missing(name) is None]]
    if not chosen:
        raise UserError("no engine can run here", hint="see `livestyle doctor`")
    for choice in chosen:
        log(f"measuring {choice.backend.name} ({choice.backend.device})")
    torch.manual_seed(0)
    networks = {
        name: Network(graph.build, graph.spec, tuple(_example(spec) for spec in graph.spec.inputs))
        for name, graph in compiled_graphs(model, size).items()
    }
    work = {**model_of(model), "size": f"{size[0]}x{size[1]}"}
    return measure(networks, [choice.backend for choice in chosen], n, work=work)


def _example(spec: TensorSpec) -> Tensor:
    """Pictures are in [0, 1], latents and words about unit normal, times within the schedule."""
    import torch

    dtype = getattr(torch, spec.dtype)
    if len(spec.shape) == 1:
        return torch.full(spec.shape, 499, dtype=dtype)
    if dtype == torch.uint8:  # a picture as it comes from the camera
        return torch.randint(256, spec.shape, dtype=dtype)
    if not dtype.is_floating_point:  # sizes, of SDXL's conditioning
        return torch.full(spec.shape, 512, dtype=dtype)
    if len(spec.shape) == 4 and spec.shape[1] == 3:
        return torch.rand(spec.shape, dtype=dtype)
    return torch.randn(spec.shape, dtype=dtype)
