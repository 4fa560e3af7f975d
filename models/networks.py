"""The networks of a model folder as the graphs that engines compile: tensors in, tensors out, static shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accel.engine import EngineSpec, TensorSpec
from accel.errors import UserError
from models.folder import Folder
from models.pictures import photographs
from models.unet import Denoise, Feature

# Autoencoders that gain by 8-bit integers where an engine has them; docs/models.md has the figures.
IN_INT8 = ("AutoencoderTiny",)
SAMPLES = "samples 1"  # raise it when those below or their photographs change: part of the fingerprint of such engines


class Encode(nn.Module):
    """Pictures → latents (1, C, H/8, W/8), not yet scaled.

    Pictures are (1, H, W, 3) uint8, or (1, 3, H, W) floats in [0, 1]: converting in the graph costs an engine next to
    nothing, in torch a millisecond and threads that then spin against the engine's.
    """

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, picture: Tensor) -> Tensor:
        if picture.dtype == torch.uint8:
            picture = picture.permute(0, 3, 1, 2).to(next(self.vae.parameters()).dtype) / 255
        encoded: Any = self.vae.encode(picture * 2 - 1)  # type: ignore[operator]
        latents: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return latents

    def samples(self, inputs: tuple[TensorSpec, ...]) -> Iterator[tuple[Tensor]]:
        """Photographs, as bytes or floats."""
        (given,) = inputs
        as_bytes = given.dtype == "uint8"
        height, width = given.shape[1:3] if as_bytes else given.shape[2:4]
        for picture in photographs((width, height)):
            yield (picture if as_bytes else picture.permute(0, 3, 1, 2) / 255,)


class Decode(nn.Module):
    """Latents (1, C, H/8, W/8), already unscaled → pictures, as bytes or floats like those of `Encode`."""

    def __init__(self, vae: nn.Module, *, as_bytes: bool) -> None:
        super().__init__()
        self.vae = vae
        self.as_bytes = as_bytes

    def forward(self, latents: Tensor) -> Tensor:
        decoded: Any = self.vae.decode(latents, return_dict=False)  # type: ignore[operator]
        picture: Tensor = decoded[0]
        picture = (picture / 2 + 0.5).clamp(0, 1)
        if self.as_bytes:  # rounding, not adding a half: in bf16 that would be lost or doubled
            return (picture * 255).round().permute(0, 2, 3, 1).to(torch.uint8)
        return picture

    def samples(self, inputs: tuple[TensorSpec, ...]) -> Iterator[tuple[Tensor]]:
        """What the encoder makes of photographs, and noise twice as wide as latents are meant to be.

        A UNet's latents go beyond those of photographs, and an 8-bit engine cuts off what its samples never reached:
        without the noise TAESD with random weights was 18 dB from itself on latents of unit variance, with it over 40.
        """
        encode, (shape,) = Encode(self.vae), (given.shape for given in inputs)
        photos = photographs((8 * shape[3], 8 * shape[2]))
        with torch.inference_mode():
            latents = [encode(picture) for picture in photos]
        generator = torch.Generator().manual_seed(0)
        config: Any = self.vae.config
        scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
        noise = [torch.randn(shape, generator=generator) * 2 / scale + shift for _ in range(2)]
        for each in [*latents[:1], noise[0], *latents[2:], noise[1]]:
            yield (each,)


@dataclass(frozen=True, slots=True)
class Graph:
    """A network to be compiled: how to build it, and its shapes."""

    build: Callable[[], nn.Module]
    spec: EngineSpec


def latent_shape(folder: Folder, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(1, C, H/8, W/8) of a picture of (width, height)."""
    return (1, int(folder.config("vae")["latent_channels"]), size[1] // 8, size[0] // 8)


def graphs(
    folder: Folder,
    size: tuple[int, int],
    *,
    as_bytes: bool = True,
    rows: int = 1,
    block: int = 1,
    features: Sequence[Feature] = (),
    fp8: bool = False,
    refit: bool = False,
) -> dict[str, Graph]:
    """The three networks of a frame for pictures of (width, height), both multiples of 8.

    Pictures go in and out as bytes, or, to be compared with something else, as floats. The UNet takes `rows` latents
    at once, each `block` frames of a window, and what its features add; their order is that of `Denoise`. If asked,
    it may be in 8-bit floats, or be made of an engine for other weights.
    """
    vae, latent = folder.config("vae"), latent_shape(folder, size)
    picture = TensorSpec("picture", (1, 3, size[1], size[0]))
    if as_bytes:
        picture = TensorSpec("picture", (1, size[1], size[0], 3), "uint8")
    if vae.get("latents_mean"):
        raise UserError("an autoencoder with a mean per channel is not known", hint="Playground v2.5 has one; SDXL not")
    # SDXL's own autoencoder overflows in half precision, which its configuration says; TAESDXL does not.
    precision = "fp32" if vae.get("force_upcast") else "fast"
    vae_print = folder.fingerprint("vae")
    if folder.index["vae"][1] in IN_INT8 and precision != "fp32":
        precision, vae_print = "int8", f"{vae_print} {SAMPLES}"
    return {
        "encode": Graph(
            lambda: Encode(folder.vae()),
            EngineSpec("encode", (picture,), (TensorSpec("latents", latent),), vae_print, precision),
        ),
        "unet": unet_graph(folder, latent, rows=rows, block=block, features=features, fp8=fp8, refit=refit),
        "decode": Graph(
            lambda: Decode(folder.vae(), as_bytes=as_bytes),
            EngineSpec("decode", (TensorSpec("latents", latent),), (picture,), vae_print, precision),
        ),
    }


def unet_inputs(folder: Folder, latent: tuple[int, int, int, int], rows: int = 1) -> list[TensorSpec]:
    """What the UNet takes without features, for `rows` latents; ControlNets take the same."""
    unet, text = folder.config("unet"), folder.config("text_encoder")
    inputs = [
        TensorSpec("z", (rows, int(unet["in_channels"]), *latent[2:])),
        TensorSpec("t", (rows,)),
        TensorSpec("words", (rows, int(text["max_position_embeddings"]), int(unet["cross_attention_dim"]))),
    ]
    if unet.get("time_cond_proj_dim"):
        inputs.append(TensorSpec("guidance", (rows, int(unet["time_cond_proj_dim"]))))
    if pooled := folder.pooled_width():
        inputs += [TensorSpec("pooled", (rows, pooled)), TensorSpec("time_ids", (rows, 6), "int64")]
    return inputs


def unet_graph(
    folder: Folder,
    latent: tuple[int, int, int, int],
    *,
    rows: int,
    block: int,
    features: Sequence[Feature],
    fp8: bool = False,
    refit: bool = False,
) -> Graph:
    """The UNet, widened by its features."""
    fingerprint = folder.fingerprint("unet")
    if (folder.path / "lora").is_dir():
        fingerprint += folder.fingerprint("lora")
    z, *rest = unet_inputs(folder, latent, rows)
    inputs = [TensorSpec("z", (rows * block, *z.shape[1:])), *rest]
    outputs = [TensorSpec("output", (rows * block, *latent[1:]))]
    for feature in features:
        inputs += feature.inputs
        outputs += feature.outputs
        fingerprint += feature.fingerprint
    names, architecture = [spec.name for spec in inputs], ""
    if refit:
        architecture = folder.architecture("unet") + "".join(feature.fingerprint for feature in features)
    if not fp8:
        spec = EngineSpec("unet", tuple(inputs), tuple(outputs), fingerprint, architecture=architecture)
        return Graph(lambda: Denoise(folder.unet(), names, features), spec)
    from models.sampled_unet import VERSION, SampledDenoise

    fingerprint += "".join(folder.fingerprint(part) for part in ("vae", "text_encoder")) + VERSION
    spec = EngineSpec("unet", tuple(inputs), tuple(outputs), fingerprint, "fp8", architecture)
    return Graph(lambda: SampledDenoise(folder, names, features), spec)
