"""The networks of a model folder as the graphs that engines compile: tensors in, tensors out, static shapes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accel.engine import EngineSpec, TensorSpec
from accel.errors import UserError
from models.motion import MotionUNet, motion_modules, motion_specs

if TYPE_CHECKING:
    from models.rolling import Window
    from models.text import TextEncoder
    from models.text_xl import DoubleTextEncoder

GRAPHS = 2  # raise it when a graph below changes: part of every engine's fingerprint


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


class Denoise(nn.Module):
    """The UNet: (latents, timestep (1,), words (1, L, D)[, guidance embedding (1, E)][, pooled words (1, P), time ids
    (1, 6)]) → output (1, C, H/8, W/8). Which of the optional ones there are is the UNet's configuration.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.has_guidance = unet.config.time_cond_proj_dim is not None

    def forward(self, z: Tensor, t: Tensor, words: Tensor, *rest: Tensor) -> Tensor:
        guidance, rest = (rest[0], rest[1:]) if self.has_guidance else (None, rest)
        added = {"text_embeds": rest[0], "time_ids": rest[1]} if rest else None
        output: Tensor = self.unet(z, t, words, timestep_cond=guidance, added_cond_kwargs=added, return_dict=False)[0]
        return output


@dataclass(frozen=True)
class Folder:
    """A diffusers-format folder; networks are read when they are first needed."""

    path: Path

    @cached_property
    def index(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / "model_index.json").read_text()))
        except (OSError, ValueError) as error:
            raise UserError(
                f"not a model folder: {self.path} ({type(error).__name__})",
                hint="diffusers' format has model_index.json, unet/, vae/, text_encoder/, tokenizer/ and scheduler/",
            ) from error

    def config(self, part: str) -> dict[str, Any]:
        """The JSON configuration of one part; UserError when it is missing or broken."""
        path = self.path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        try:
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise UserError(
                f"model folder {self.path} has no readable {part}/{path.name}", hint="fetch it again"
            ) from error

    def fingerprint(self, part: str) -> str:
        """A digest of a part's configuration and weights."""
        digest = hashlib.sha256(str(GRAPHS).encode())
        for file in sorted((self.path / part).iterdir()):
            if file.suffix in {".json", ".safetensors", ".bin"}:
                digest.update(file.name.encode())
                with file.open("rb") as stream:
                    while block := stream.read(1 << 22):
                        digest.update(block)
        return digest.hexdigest()

    def vae(self) -> nn.Module:
        """The autoencoder that model_index.json names, float32."""
        kind = self.index["vae"][1]
        if kind == "PatchAutoencoder":
            from models.autoencoder import PatchAutoencoder as Autoencoder
        elif kind == "AutoencoderTiny":
            from diffusers import AutoencoderTiny as Autoencoder
        elif kind == "AutoencoderKL":
            from diffusers import AutoencoderKL as Autoencoder
        else:
            raise UserError(
                f"unknown autoencoder class: {kind}", hint="AutoencoderTiny, AutoencoderKL or PatchAutoencoder"
            )
        return self._read(Autoencoder, "vae")

    def unet(self) -> nn.Module:
        """The UNet, with the LoRA that belongs to the folder (lora/lora.json: file, scale) merged into it."""
        from diffusers import UNet2DConditionModel

        unet = self._read(UNet2DConditionModel, "unet")
        if (listed := self.path / "lora" / "lora.json").is_file():
            from models.adapters import merge_lora
            from models.lora import read_lora

            row = json.loads(listed.read_text())
            merge_lora(unet, read_lora(listed.parent / row["file"]), float(row["scale"]))
        return unet

    @property
    def has_adapter(self) -> bool:
        """Whether there is a `motion_adapter/`, in the format of diffusers' `MotionAdapter`."""
        return (self.path / "motion_adapter").is_dir()

    def motion_modules(self) -> tuple[str, ...] | None:
        """The modules of the adapter, or blocks of them, that are used: "only" in its configuration, None = all.

        The key is ours, diffusers passes over it. Weights of other modules may be missing.
        """
        named = self.config("motion_adapter").get("only")
        return None if named is None else tuple(named)

    def adapter(self) -> Any:
        """The motion adapter, float32; its unused modules may be left on the meta device."""
        from diffusers import MotionAdapter

        adapter = self._read(MotionAdapter, "motion_adapter")
        used = tuple(f"{path}." for path, _ in motion_modules(adapter, self.motion_modules()))
        if missing := [name for name, t in adapter.state_dict().items() if t.is_meta and name.startswith(used)]:
            raise UserError(f"model folder {self.path}: motion_adapter has no {missing[0]}", hint="fetch it again")
        return adapter

    def bare_adapter(self) -> Any:
        """The adapter without weights, for its shapes."""
        from diffusers import MotionAdapter

        make: Any = MotionAdapter.from_config
        with torch.device("meta"):
            return make({k: v for k, v in self.config("motion_adapter").items() if k != "only"})

    def text_model(self) -> nn.Module:
        from transformers import CLIPTextModel

        return self._read(CLIPTextModel, "text_encoder")

    def text(self) -> TextEncoder | DoubleTextEncoder:
        """What reads prompts: one text model, or SDXL's two."""
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        from models.text import TextEncoder
        from models.text_xl import DoubleTextEncoder

        first = CLIPTokenizer.from_pretrained(self.path / "tokenizer"), self.text_model()
        if not self.pooled_width():
            return TextEncoder(*first)
        model = self._read(CLIPTextModelWithProjection, "text_encoder_2")
        second = CLIPTokenizer.from_pretrained(self.path / "tokenizer_2"), model
        return DoubleTextEncoder((first, second), zeros=bool(self.index.get("force_zeros_for_empty_prompt", True)))

    def pooled_width(self) -> int:
        """P of the pooled words that the UNet takes beside six time ids, as SDXL's do; 0 = neither.

        Raises UserError where the UNet takes anything else besides, or not what the folder's text models give.
        """
        unet = self.config("unet")
        kind = unet.get("addition_embed_type")
        if kind in (None, "text"):  # "text" is worked out of the words inside the UNet
            return 0
        hint = "SDXL's base and turbo models and their relatives are known; refiners and other kinds are not"
        if kind != "text_time" or not (self.index.get("text_encoder") or [None])[0]:
            raise UserError(f"model folder {self.path}: no image model of a known kind ({kind})", hint=hint)
        first, second = self.config("text_encoder"), self.config("text_encoder_2")
        pooled, words = int(second["projection_dim"]), int(first["hidden_size"]) + int(second["hidden_size"])
        added = pooled + 6 * int(unet.get("addition_time_embed_dim") or 0)
        if added != unet.get("projection_class_embeddings_input_dim") or words != unet["cross_attention_dim"]:
            raise UserError(f"model folder {self.path}: the UNet does not fit the text models", hint=hint)
        return pooled

    def scheduler(self) -> Any:
        """The consistency tables (an `LCMScheduler`), built from whatever scheduler the folder was saved with."""
        from diffusers import LCMScheduler

        keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_scaling",
                "original_inference_steps", "set_alpha_to_one", "trained_betas", "rescale_betas_zero_snr")  # fmt: skip
        config = self.config("scheduler")
        if config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon":
            raise UserError(
                f"model folder {self.path}: a schedule down from noise alone, and a UNet that predicts the noise",
                hint='"prediction_type" in scheduler/scheduler_config.json: such models predict v_prediction or sample',
            )
        make: Any = LCMScheduler
        return make(**{k: config[k] for k in keys if k in config})

    def style_words(self) -> set[str]:
        """The words that a small-vocabulary model knows, from its styles.json; empty where it has none."""
        path = self.path / "styles.json"
        return set(json.loads(path.read_text())["words"]) if path.is_file() else set()

    def _read(self, kind: Any, part: str) -> nn.Module:
        try:
            module: nn.Module = kind.from_pretrained(self.path / part, torch_dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"model folder {self.path}: {part} cannot be read ({reason})", hint="fetch it again"
            ) from error
        return module.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class Graph:
    """A network to be compiled: how to build it, and its shapes."""

    build: Callable[[], nn.Module]
    spec: EngineSpec


def graphs(
    folder: Folder, size: tuple[int, int], *, as_bytes: bool = True, window: Window | None = None
) -> dict[str, Graph]:
    """The three networks of a frame for pictures of (width, height), both multiples of 8.

    Pictures go in and out as bytes, or, to be compared with something else, as floats. With a window the UNet is a
    `MotionUNet` of the folder's motion adapter, and takes and gives what `motion_specs` names besides.
    """
    width, height = size
    vae, unet, text = folder.config("vae"), folder.config("unet"), folder.config("text_encoder")
    latent = (1, int(vae["latent_channels"]), height // 8, width // 8)
    picture = TensorSpec("picture", (1, 3, height, width))
    if as_bytes:
        picture = TensorSpec("picture", (1, height, width, 3), "uint8")
    if vae.get("latents_mean"):
        raise UserError("an autoencoder with a mean per channel is not known", hint="Playground v2.5 has one; SDXL not")
    # SDXL's own autoencoder overflows in half precision, which its configuration says; TAESDXL does not.
    precision = "fp32" if vae.get("force_upcast") else "fast"
    vae_print, unet_print = folder.fingerprint("vae"), folder.fingerprint("unet")
    if (folder.path / "lora").is_dir():
        unet_print += folder.fingerprint("lora")
    inputs = [
        TensorSpec("z", (window.block if window else 1, int(unet["in_channels"]), *latent[2:])),
        TensorSpec("t", (1,)),
        TensorSpec("words", (1, int(text["max_position_embeddings"]), int(unet["cross_attention_dim"]))),
    ]
    if unet.get("time_cond_proj_dim"):
        inputs.append(TensorSpec("guidance", (1, int(unet["time_cond_proj_dim"]))))
    if pooled := folder.pooled_width():
        inputs += [TensorSpec("pooled", (1, pooled)), TensorSpec("time_ids", (1, 6), "int64")]
    outputs = [TensorSpec("output", (inputs[0].shape[0], *latent[1:]))]
    only = folder.motion_modules() if window else None
    if window:
        if pooled:
            raise UserError("no window of frames for SDXL's kind of model", hint="temporal.window=0")
        motion_in, motion_out = motion_specs(folder.bare_adapter(), latent[2:], window, only=only)
        inputs += motion_in
        outputs += motion_out
        unet_print += folder.fingerprint("motion_adapter")
    return {
        "encode": Graph(
            lambda: Encode(folder.vae()),
            EngineSpec("encode", (picture,), (TensorSpec("latents", latent),), vae_print, precision),
        ),
        "unet": Graph(
            lambda: MotionUNet(folder.unet(), folder.adapter(), only) if window else Denoise(folder.unet()),
            EngineSpec("unet", tuple(inputs), tuple(outputs), unet_print),
        ),
        "decode": Graph(
            lambda: Decode(folder.vae(), as_bytes=as_bytes),
            EngineSpec("decode", (TensorSpec("latents", latent),), (picture,), vae_print, precision),
        ),
    }
