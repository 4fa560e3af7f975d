"""8-bit floats (E4M3) in linear layers and convolutions, behind a gate of error; what is between them stays in halves.

Precision lives in the ONNX file: inputs and weights of such a layer go through QuantizeLinear and DequantizeLinear,
which the compiler joins with the product into one kernel. Weights have a scale per output channel. Inputs have one, by
the largest value that samples showed, and twice that is within reach: the format is a floating one, so unlike with
integers neither headroom nor scales that are powers of two cost precision.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from accel.engine import EngineSpec, Sampled
from accel.quantised import Refused, Samples, difference

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT = 1  # raise it when the layers or their scales change: part of the key of such engines
LARGEST_ERROR = 0.05  # relative L2 of pictures to those of float32: a PSNR of 32 dB where they are half bright
LARGEST = 448.0  # of the format
LEAST = 2.0**-24  # scale; half precision has none that is smaller
HEADROOM = 2.0
E4M3 = 17  # FLOAT8E4M3FN, among ONNX's data types
WHOLE = 16  # channels that one load of a kernel takes: others are left out
# By diffusers' names, what NVIDIA's recipes leave out: the ends, what the timestep goes through, and what goes by.
KEPT = re.compile(r"(^|\.)(conv_in|conv_out|time_\w+|add_embedding|conv_shortcut|proj_out)(\.|$)")

Reaches = Mapping[str, float]  # the largest |input| of each layer that is to be quantised, by its path


@runtime_checkable
class Judged(Protocol):
    """A module that knows what becomes of its outputs, and is judged by that."""

    def shown(self, sample: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Pictures, say, by the inputs and what the module made of them."""
        ...


def calibrated(net: nn.Module, spec: EngineSpec) -> tuple[Reaches, float]:
    """What each layer's input reaches, and the error of eight bits by samples that were not used for that.

    The module is as before afterwards. Raises `accel.quantised.Refused` where there are no samples, or it is too far
    from float32.
    """
    samples = list(net.samples(spec.inputs)) if isinstance(net, Sampled) else []
    judges = len(samples) // 3
    if not judges:
        raise Refused("nothing to judge it by")
    reaches = reached(net, samples[judges:])
    exact = shown(net, samples[:judges])
    with quantised(net, reaches):
        error = difference(shown(net, samples[:judges]), exact)
    if not error < LARGEST_ERROR:  # a NaN too
        raise Refused(f"{error:.1%} from float32, which is too far")
    return reaches, error


def reached(net: nn.Module, samples: Samples) -> Reaches:
    """The largest |input| of each layer that is to be quantised.

    Layers that are never called are not, nor those that are shown nothing: the sizes of a style picture's tokens are
    not known where there is none.
    """
    found: dict[str, float] = {}

    def look(layer: nn.Module, given: tuple[Tensor, ...], path: str) -> None:
        found[path] = max(found.get(path, 0.0), float(given[0].abs().max()))

    hooks = [layer.register_forward_pre_hook(partial(look, path=path)) for path, layer in fit(net)]
    try:
        outputs(net, samples)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: reach for path, reach in found.items() if reach}


def fit(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers that gain by it and bear it, by their paths."""
    from torch import nn

    for path, layer in net.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not KEPT.search(path) and getattr(layer, "groups", 1) == 1:
            out, into = layer.weight.shape[:2]
            if out % WHOLE == into % WHOLE == 0:
                yield path, layer


def outputs(net: nn.Module, samples: Samples) -> Samples:
    """What the module makes of each sample on its own device, brought to the CPU."""
    import torch

    device = next(net.parameters()).device
    found: list[tuple[Tensor, ...]] = []
    with torch.inference_mode(False), torch.no_grad():
        for sample in samples:
            output = net(*(t.clone().to(device) for t in sample))
            found.append(tuple(o.cpu() for o in ((output,) if isinstance(output, torch.Tensor) else output)))
    return found


def shown(net: nn.Module, samples: Samples) -> Samples:
    """What becomes of the outputs for each sample."""
    found = outputs(net, samples)
    return [net.shown(*each) for each in zip(samples, found, strict=True)] if isinstance(net, Judged) else found


@contextmanager
def quantised(net: nn.Module, reaches: Reaches) -> Iterator[None]:
    """The module with these layers in eight bits: exported with their operators, called with their rounding.

    Layers stay the objects they are, since others have hooks on them.
    """
    import torch

    names = ("scale", "scales", "eighths")
    layers: list[Any] = [net.get_submodule(path) for path in reaches]
    try:
        for layer, reach in zip(layers, reaches.values(), strict=True):
            weight = layer.weight.detach()
            scales = _scale(weight.flatten(1).abs().amax(1)).to(weight.dtype)  # (out,)
            scale = _scale(torch.tensor(HEADROOM * reach)).to(weight)
            held = scale, scales, _eighths(weight, _along(scales, weight))
            for name, tensor in zip(names, held, strict=True):
                layer.register_buffer(name, tensor, persistent=False)
            layer.forward = partial(_forward, layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
            for name in names:
                layer._buffers.pop(name, None)


def _forward(layer: Any, x: Tensor) -> Tensor:
    """A layer's output by its input and weight in eight bits."""
    import torch
    from torch import nn
    from torch.nn import functional

    if torch.compiler.is_exporting():
        write = torch.onnx.ops.symbolic
        bits = write(
            "QuantizeLinear", (x, layer.scale), {"output_dtype": E4M3}, dtype=torch.float8_e4m3fn, shape=x.shape
        )
        near = write("DequantizeLinear", (bits, layer.scale), dtype=x.dtype, shape=x.shape)
        weight = write(
            "DequantizeLinear", (layer.eighths, layer.scales), {"axis": 0}, dtype=x.dtype, shape=layer.eighths.shape
        )
    else:
        near = _eighths(x, layer.scale).to(x.dtype) * layer.scale
        weight = layer.eighths.to(x.dtype) * _along(layer.scales, layer.eighths)
    if isinstance(layer, nn.Conv2d):
        found: Tensor = layer._conv_forward(near, weight, layer.bias)
        return found
    return functional.linear(near, weight, layer.bias)


def _scale(reach: Tensor) -> Tensor:
    """What one stands for where `reach` is to be in reach: a power of two, the same number in every precision."""
    return (reach.float().clamp_min(LEAST * LARGEST) / LARGEST).log2().ceil().exp2()


def _along(scales: Tensor, weight: Tensor) -> Tensor:
    return scales.view(-1, *[1] * (weight.dim() - 1))


def _eighths(x: Tensor, scale: Tensor) -> Tensor:
    """Rounded to the nearest, what is too large to the largest."""
    import torch

    return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
