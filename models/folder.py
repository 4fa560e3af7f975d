"""A model folder in diffusers' format: what is in it, read when it is first needed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accel.errors import UserError
from models.files import form_of
from models.motion import motion_modules

if TYPE_CHECKING:
    from models.text import TextEncoder
    from models.text_xl import DoubleTextEncoder

GRAPHS = 2  # raise it when a graph of models/networks.py changes: part of every engine's fingerprint


@dataclass(frozen=True)
class Folder:
    """A diffusers-format folder; networks are read when they are first needed."""

    path: Path

    @cached_property
    def index(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / "model_index.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"not a model folder: {self.path} ({type(error).__name__})",
                hint="diffusers' format has model_index.json, unet/, vae/, text_encoder/, tokenizer/ and scheduler/",
            ) from error

    def config(self, part: str) -> dict[str, Any]:
        """The JSON configuration of one part; UserError when it is missing or broken."""
        path = self.path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        try:
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
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

    def architecture(self, part: str) -> str:
        """A digest of what a part's networks have in common whatever their weights."""
        config = {name: value for name, value in self.config(part).items() if not name.startswith("_")}
        return hashlib.sha256(json.dumps([GRAPHS, config], sort_keys=True).encode()).hexdigest()

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
            from models.lora import read_lora
            from models.loras import merge_lora

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

        def tokenizer(part: str) -> Any:
            try:
                return CLIPTokenizer.from_pretrained(self.path / part)
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"model folder {self.path} has no readable {part}/", hint="fetch it again") from error

        _ = self.index
        first = tokenizer("tokenizer"), self.text_model()
        if not self.pooled_width():
            return TextEncoder(*first)
        model = self._read(CLIPTextModelWithProjection, "text_encoder_2")
        second = tokenizer("tokenizer_2"), model
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
        path = self.path / part
        try:
            module: nn.Module = kind.from_pretrained(path, torch_dtype=torch.float32, **form_of(path))
        except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"model folder {self.path}: {part} cannot be read ({reason})", hint="fetch it again"
            ) from error
        return module.eval().requires_grad_(False)
