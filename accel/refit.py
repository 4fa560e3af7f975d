"""Other weights for a compiled engine of the same architecture: which tensor of the network's file is which parameter.

The exporter renames half of the parameters and transposes those of linear layers, so they are found by their contents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel import cache as store

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "weights.json"  # beside the engine
DTYPES = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT"}  # torch's and TensorRT's


class Refused(Exception):
    """This engine cannot be given those weights; the message says why."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a tensor of the file holds."""

    parameter: str
    turned: bool  # transposed
    digest: str  # of the parameter


@dataclass(frozen=True, slots=True)
class WeightMap:
    """The tensors of a file by name, and digests of parameters that are in none, or in more than can be told apart."""

    tensors: Mapping[str, Origin]
    rest: Mapping[str, str]

    def to_json(self) -> bytes:
        origins = {name: [o.parameter, o.turned, o.digest] for name, o in self.tensors.items()}
        return json.dumps({"tensors": origins, "rest": dict(self.rest)}).encode()

    @classmethod
    def of_json(cls, text: bytes) -> WeightMap:
        """Raises ValueError, KeyError or TypeError where it is none."""
        read = json.loads(text)
        return cls({name: Origin(*origin) for name, origin in read["tensors"].items()}, dict(read["rest"]))

    def changed(self, state: Mapping[str, Tensor]) -> WeightMap:
        """The same file with these parameters in it; `Refused` where one changes that cannot be reached."""
        digests = {name: digest(tensor) for name, tensor in state.items() if tensor.is_floating_point()}
        known = {origin.parameter for origin in self.tensors.values()} | self.rest.keys()
        if known != digests.keys():
            raise Refused(f"{min(known ^ digests.keys())} is not in both")
        for name, before in self.rest.items():
            if digests[name] != before:
                raise Refused(f"{name} changes and cannot be reached")
        tensors = {name: Origin(o.parameter, o.turned, digests[o.parameter]) for name, o in self.tensors.items()}
        return WeightMap(tensors, self.rest)


def weight_map(onnx_file: Path, module: nn.Module) -> WeightMap:
    """Where each parameter of a module, in the precision it was exported in, is in the file.

    Equal parameters, such as biases of zeros, cannot be told apart and stay out of reach.
    """
    import onnx_ir

    owners: dict[str, Origin | None] = {}  # by a tensor's digest; None = of several
    state = {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
    digests = {name: digest(tensor) for name, tensor in state.items()}
    for name, tensor in state.items():
        for turned in (False, True)[: 1 + (tensor.dim() == 2)]:
            key = digest(tensor.t()) if turned else digests[name]
            known = owners.get(key)
            alone = key not in owners or (known is not None and known.parameter == name)
            owners[key] = (known or Origin(name, turned, digests[name])) if alone else None
    tensors: dict[str, Origin] = {}
    for name, value in onnx_ir.load(onnx_file).graph.initializers.items():
        if (held := value.const_value) is not None:
            owner = owners.get(_digest([int(n) for n in held.shape.numpy()], held.tobytes()))
            if owner is not None:
                tensors[name] = owner
    reached = {origin.parameter for origin in tensors.values()}
    return WeightMap(tensors, {name: found for name, found in digests.items() if name not in reached})


def laid_out(origin: Origin, state: Mapping[str, Tensor]) -> Tensor:
    """A parameter as the file holds it, contiguous on the CPU."""
    tensor = state[origin.parameter].detach().cpu()
    return (tensor.t() if origin.turned else tensor).contiguous()


def refit(trt: Any, engine: Any, logger: Any, before: WeightMap, module: nn.Module, stream: int) -> WeightMap:
    """Give a deserialized engine the weights of this module, which has the precision of the engine; its map then.

    `Refused` leaves the engine with some weights of each, to be thrown away. That the result computes what the module
    does is to be checked: by NVIDIA's notes refittable engines may drop the bias of a product.
    """
    state = module.state_dict()
    after = before.changed(state)
    refitter = trt.Refitter(engine, logger)
    given: dict[str, Tensor] = {}  # kept until it is done: TensorRT reads where they lie

    def give(name: str) -> None:
        tensor = laid_out(after.tensors[name], state)
        kind = getattr(trt.DataType, DTYPES[str(tensor.dtype).removeprefix("torch.")])
        if not refitter.set_named_weights(name, trt.Weights(kind, tensor.data_ptr(), tensor.numel())):
            raise Refused(f"TensorRT does not take {name}")
        given[name] = tensor

    for name, origin in after.tensors.items():
        if origin != before.tensors[name]:
            give(name)
    for name in refitter.get_missing_weights():  # joined with one of those in the engine
        if name not in after.tensors:
            raise Refused(f"TensorRT asks for {name or 'weights without a name'}")
        give(name)
    if given and not refitter.refit_cuda_engine_async(stream):
        raise Refused("TensorRT does not take the weights")
    return after


def relatives(root: Path, key: store.Key) -> list[tuple[store.Entry, WeightMap]]:
    """Stored engines of the key's architecture that take other weights, the most recently used first."""
    found = []
    for entry in store.entries(root):
        if entry.problem is None and _without_weights(entry.key) == _without_weights(key):
            try:
                found.append((entry, WeightMap.of_json((root / entry.digest / NAME).read_bytes())))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # it was not built for it, or the map is damaged
    return found


def digest(tensor: Tensor) -> str:
    """Of shape and contents."""
    import torch

    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return _digest(list(tensor.shape), flat.numpy().data)


def _digest(shape: list[int], content: bytes | memoryview) -> str:
    return json.dumps(shape) + hashlib.sha256(content).hexdigest()


def _without_weights(key: store.Key) -> store.Key:
    return {**key, "spec": {**key["spec"], "fingerprint": ""}}
