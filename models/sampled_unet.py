"""The UNet with what a stream gives it: by that it is brought to eight bits, and judged by the pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from accel.engine import TensorSpec
from models.denoise import start
from models.folder import Folder
from models.networks import Decode, Encode
from models.pictures import photographs
from models.recipe import recipe_of
from models.schedule import Step, clean, consistency_schedule
from models.text import TextEncoder
from models.text_xl import size_ids
from models.unet import Denoise, Feature

VERSION = "samples 1"  # raise it when those below change: part of the fingerprint of such engines
PROMPTS = ("oil painting", "ink drawing of a city at night", "")
STEPS = 4


class SampledDenoise(Denoise):
    """`Denoise` as an `accel.engine.Sampled`, with pictures to be judged by (`accel.fp8.Judged`)."""

    def __init__(self, folder: Folder, names: Sequence[str], features: Sequence[Feature]) -> None:
        super().__init__(folder.unet(), names, features)
        self._folder = folder

    def samples(self, inputs: tuple[TensorSpec, ...]) -> Iterator[tuple[Tensor, ...]]:
        """Photographs under the noise of each step in turn, with words of prompts; what features take is zeros."""
        given = {spec.name: spec for spec in inputs}
        (count, channels, height, width), rows = given["z"].shape, given["t"].shape[0]
        size, (scaling, shift) = (8 * width, 8 * height), self._scales
        encode, generator, steps = Encode(self._folder.vae()), torch.Generator().manual_seed(0), cycle(self._steps)
        with torch.inference_mode():
            read = self._read(PROMPTS)
            pictures = [scaling * (encode(picture) - shift) for picture in photographs(size)]
        for picture, prompt in zip(pictures, cycle(read)):
            taken = [next(steps) for _ in range(rows)]
            latents = []
            for step in taken:
                noise = torch.randn((count // rows, *picture.shape[1:]), generator=generator)
                latents.append(start(picture, noise, step, pure=False))
            z = torch.cat(latents)
            found = dict(prompt, z=torch.cat([z, picture.expand_as(z)], 1) if channels > z.shape[1] else z)
            found["t"] = torch.tensor([float(step.t) for step in taken])
            found["time_ids"] = size_ids(size)
            yield tuple(
                found[name].expand(spec.shape).contiguous()
                if name in found
                else torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))
                for name, spec in given.items()
            )

    def shown(self, sample: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The pictures that the outputs would be if no step followed, one for each latent."""
        (scaling, shift), steps = self._scales, {step.t: step for step in self._steps}
        given, output = dict(zip(self.names, sample, strict=True)), outputs[0]
        z = given["z"][:, : output.shape[1]]
        taken = [steps[int(t)] for t in given["t"].repeat_interleave(len(z) // len(given["t"]))]
        with torch.inference_mode():
            return tuple(
                self._decode(clean(output[i : i + 1], z[i : i + 1], step, self._prediction) / scaling + shift)
                for i, step in enumerate(taken)
            )

    @cached_property
    def _decode(self) -> Decode:
        return Decode(self._folder.vae(), as_bytes=False)

    @cached_property
    def _steps(self) -> tuple[Step, ...]:
        timesteps = recipe_of(self._folder.path).timesteps
        count = STEPS if timesteps is None else min(STEPS, len(timesteps))
        return consistency_schedule(self._folder.scheduler(), count, 1.0, timesteps).steps

    @property
    def _prediction(self) -> str:
        return str(self._folder.scheduler().config["prediction_type"])

    @property
    def _scales(self) -> tuple[float, float]:
        vae = self._folder.config("vae")
        return float(vae.get("scaling_factor") or 1.0), float(vae.get("shift_factor") or 0.0)

    def _read(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        text: Any = self._folder.text()
        if isinstance(text, TextEncoder):
            return [{"words": text.embed(prompt)} for prompt in prompts]
        return [dict(zip(("words", "pooled"), text.read(prompt), strict=True)) for prompt in prompts]
