"""ControlNets (Zhang et al. 2023, arXiv 2302.05543): networks that look at a control picture and add to the UNet's own.

Each is an engine of its own; what it adds (the residuals, one for each skip connection and the middle block) is an
input of the UNet's engine. So its weight, its steps and its picture change between two frames, and with a weight of
nought its engine rests. All equal to diffusers' pipelines; see tests/test_controlnet.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accel.engine import EngineSpec, TensorSpec
from accel.errors import UserError
from models.addons import SPOKEN, addon, family_of
from models.folder import Folder
from models.hub import fault
from models.networks import Graph, unet_inputs
from models.residuals import hint_specs, residual_specs
from models.spec import HALF, WEIGHTS
from models.t2i_adapter import Adapter, adapter_inputs, check_adapter

GRAPH = "control 1"  # raise it when `Control` changes: part of the fingerprint
FETCH = "fetch it again"
LIKE = {"in_channels": 4, "layers_per_block": 2, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim":
        1280, "addition_embed_type": None, "projection_class_embeddings_input_dim": None}  # fmt: skip
PLAIN = {"conditioning_channels": 3, "global_pool_conditions": False, "class_embed_type": None,
         "num_class_embeds": None, "encoder_hid_dim": None}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ControlFolder:
    """A ControlNet or T2I-Adapter in diffusers' format that fits its model; weights are read when first needed."""

    kind: str  # of `models.units.KINDS`
    path: Path
    file: str  # of its weights
    config: Mapping[str, Any]
    hints: int = 0  # of a T2I-Adapter, for `Residuals`; 0 = a ControlNet

    def fingerprint(self) -> str:
        """A digest of its configuration and weights."""
        return GRAPH + Folder(self.path.parent).fingerprint(self.path.name)

    def network(self) -> nn.Module:
        """The network, float32."""
        read: Any = made_by(self.config).from_pretrained
        variant = "fp16" if self.file == HALF else None
        try:
            network: nn.Module = read(self.path, variant=variant, use_safetensors=True, torch_dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{self.kind} control: {self.path} cannot be read ({reason})", hint=FETCH) from error
        return network.eval().requires_grad_(False)


def control_folder(name: str, model: Folder) -> ControlFolder:
    """The ControlNet of a name that `controls_of` gives, for a model; only configurations and headers are read.

    UserError where it is not here, not whole, or made for another family of models.

    >>> control_folder("canny", model), control_folder("depth=my/controlnet", model)
    """
    kind, _, source = name.partition("=")
    unet = model.config("unet")
    path = Path(source).expanduser().resolve() if source else addon(kind, family_of(unet))
    try:
        config = dict(json.loads((path / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{kind} control: {path} is no ControlNet ({type(error).__name__} at config.json)",
            hint="a folder in diffusers' format, of config.json and diffusion_pytorch_model.safetensors",
        ) from error
    if not is_adapter(config):
        check_fit(kind, path, config, unet)
    network = bare(kind, path, config)
    hints = check_adapter(kind, path, network, unet) if is_adapter(config) else 0
    file = next((file for file in (WEIGHTS, HALF) if (path / file).is_file()), None)
    if file is None:
        raise UserError(f"{kind} control: {path} has no {WEIGHTS}", hint=f"{FETCH}; other formats can run code")
    if problem := fault(path / file) or lacking(network, path / file):
        raise UserError(f"{kind} control: {path.name}/{file}: {problem}", hint=FETCH)
    return ControlFolder(kind, path, file, config, hints)


def is_adapter(config: Mapping[str, Any]) -> bool:
    return config.get("_class_name") == "T2IAdapter"


def made_by(config: Mapping[str, Any]) -> Any:
    """The class in diffusers that a configuration is of."""
    import diffusers

    return diffusers.T2IAdapter if is_adapter(config) else diffusers.ControlNetModel


def check_fit(kind: str, path: Path, config: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    """UserError where a ControlNet's configuration is none, of an unknown kind, or not like the UNet's."""
    family = SPOKEN.get(family_of(dict(unet)), "")
    hint = f"take one made for {family}" if family else "take one made for this model"
    what = str(config.get("_class_name", "ControlNetModel"))
    if what != "ControlNetModel":
        raise UserError(f"{kind} control: {path} is a {what}, not a ControlNetModel", hint=hint)
    theirs = SPOKEN.get(family_of(dict(config)), "another family")
    if config.get("cross_attention_dim") != unet.get("cross_attention_dim") and family:
        raise UserError(f"{kind} control: {path.name} is a ControlNet for {theirs}, the model is {family}", hint=hint)
    for key, usual in LIKE.items():
        one, other = config.get(key, usual), unet.get(key, usual)
        if one != other:
            raise UserError(f"{kind} control: {path.name} does not fit: its {key} is {one}, here {other}", hint=hint)
    for key, usual in PLAIN.items():
        if config.get(key, usual) != usual:
            raise UserError(f"{kind} control: {path.name} has {key} = {config[key]}, which is not known", hint=hint)


def bare(kind: str, path: Path, config: Mapping[str, Any]) -> nn.Module:
    """The network without weights, on the meta device; UserError where there can be none of this configuration."""
    make: Any = made_by(config).from_config
    try:
        with torch.device("meta"):
            network: nn.Module = make(dict(config))
    except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{kind} control: {path}/config.json makes no network ({reason[:200]})", hint=FETCH) from error
    return network


def lacking(network: nn.Module, file: Path) -> str:
    """What a safetensors file does not have of a network's weights, or ""."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as found:
        names = set(found.keys())
        for name, tensor in network.state_dict().items():
            if name not in names:
                return f"incomplete, there is no {name}"
            if (shape := tuple(found.get_slice(name).get_shape())) != tuple(tensor.shape):
                return f"not of its configuration, {name} is {shape} instead of {tuple(tensor.shape)}"
    return ""


class Control(nn.Module):
    """A ControlNet: tensors in the order of `names` → its residuals, each times its row's scale.

    z (n, C, h, w), t (n,), words (n, L, D), pooled words (n, P) and time ids (n, 6) where the UNet takes them, the
    pictures (n, H, W, 3) uint8, and scales (n, residuals).
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.names = tuple(names)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        z, scales = given["z"], given["scales"]
        picture = given["picture"].permute(0, 3, 1, 2).to(z.dtype) / 255  # (n, 3, H, W) in [0, 1]
        added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]} if "pooled" in given else None
        down, middle = self.network(
            z, given["t"], given["words"], picture, added_cond_kwargs=added, return_dict=False
        )  # (n, C, h, w) each
        return tuple(r * scales[:, i, None, None, None] for i, r in enumerate((*down, middle)))


def control_graph(control: ControlFolder, model: Folder, latent: tuple[int, int, int, int], rows: int = 1) -> Graph:
    """A ControlNet or adapter to be compiled, for latents (1, C, h, w) of the model and so many rows at once."""
    size, unet = (latent[2], latent[3]), model.config("unet")
    height, width = 8 * size[0], 8 * size[1]
    name, fingerprint = f"control-{control.kind}", control.fingerprint()
    if control.hints:
        factor = int(control.config.get("downscale_factor", 8))
        given = adapter_inputs(factor, control.hints, (height, width), rows)
        found = hint_specs(unet, size, rows, control.hints)
        return Graph(lambda: Adapter(control.network()), EngineSpec(name, given, found, fingerprint))
    outputs = residual_specs(unet, size, rows)
    inputs = [spec for spec in unet_inputs(model, latent, rows) if spec.name != "guidance"]  # the UNet's alone
    inputs.append(TensorSpec("picture", (rows, height, width, 3), "uint8"))
    inputs.append(TensorSpec("scales", (rows, len(outputs))))
    names = [spec.name for spec in inputs]
    return Graph(lambda: Control(control.network(), names), EngineSpec(name, tuple(inputs), outputs, fingerprint))
