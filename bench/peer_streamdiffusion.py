"""StreamDiffusion 0.1.1 over one of our model folders: how it is set up to compute what `models.denoise` does.

Kodaira et al. 2023 (arXiv 2312.12491); the package runs as it comes from PyPI. Its stream batch of n steps gives what
our loop gives, n - 1 frames later, without guidance and with each of its kinds; see tests/test_peers.py. Where the two
are not the same:

- Its timesteps are places in a schedule of 50. With a schedule of as many steps as the model was trained on, every
  timestep has a place. Its steps are always a consistency model's, and all noise between them is new.
- It reads every network as one that predicts noise, and gives no guidance embedding and no pooled words.
- It draws from an `AutoencoderKL` at random, where we take the mean.
- A new prompt holds at once for frames on their way; ours keep what they entered with.
- With one step, cfg_type="self" begins at a residual of zero, and its later ones are of frames before.
- Without its stream batch each frame's noisy latent becomes the noise of the next, and steps draw from torch's own
  generator.
- More than one frame per call (frame_buffer_size) and more than one step: only the last frame comes out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from accel.errors import UserError

if TYPE_CHECKING:
    from models.folder import Folder

PACKAGE, VERSION = "streamdiffusion", "0.1.1"


def missing_peer() -> UserError | None:
    """What to say where StreamDiffusion is not installed."""
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        found = ""
    if found == VERSION:
        return None
    return UserError(
        f"{PACKAGE} {found} is not the {VERSION} that is compared with" if found else f"{PACKAGE} is not installed",
        hint=f"pip install --no-deps {PACKAGE}=={VERSION}   (it asks for a diffusers of 2023, but runs with today's)",
    )


def check(folder: Folder) -> None:
    """Raise UserError for a model that StreamDiffusion 0.1.1 cannot run, or not to the same end."""
    name, unet = folder.path.name, folder.config("unet")
    hint = "a folder of Stable Diffusion 1 or 2 with TAESD; none named: a small one with random weights"
    if "StableDiffusionXL" in str(folder.index.get("_class_name")) or unet.get("addition_embed_type"):
        raise UserError(f"StreamDiffusion {VERSION} runs Stable Diffusion 1 and 2, and {name} is SDXL", hint=hint)
    if (kind := folder.index["vae"][1]) != "AutoencoderTiny":
        raise UserError(f"{name} has an {kind}, which StreamDiffusion does not run as we do", hint=hint)
    if unet["in_channels"] != folder.config("vae")["latent_channels"]:
        raise UserError(f"the UNet of {name} takes more than the latent, and StreamDiffusion gives no more", hint=hint)
    if unet.get("time_cond_proj_dim"):
        raise UserError(f"the UNet of {name} takes guidance as an input, and StreamDiffusion gives none", hint=hint)
    if folder.config("scheduler").get("prediction_type", "epsilon") != "epsilon":
        raise UserError(f"{name} does not predict noise, and StreamDiffusion reads all networks so", hint=hint)


def opened(
    folder: Folder,
    size: tuple[int, int],
    times: Sequence[int],
    prompt: str,
    seed: int,
    *,
    schedule: int = 0,
    cfg_type: str = "none",
    dtype: Any = None,
    device: str = "cpu",
    **prepared: Any,
) -> Any:
    """A `StreamDiffusion` for pictures of (width, height) at these timesteps, noisiest first, with our noise of a seed.

    Its own schedule has so many steps, 0 = all that the model was trained on. The default `dtype` is float32;
    `prepared` goes to its `prepare`. Raises ValueError for a timestep that its schedule has not.
    """
    import torch
    from diffusers import LCMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    from models.load import quiet_libraries

    quiet_libraries()
    from streamdiffusion import StreamDiffusion

    dtype = dtype or torch.float32
    numbers = {key: value for key, value in folder.scheduler().config.items() if not key.startswith("_")}
    trained = int(numbers["num_train_timesteps"])
    numbers |= {"original_inference_steps": schedule or trained, "steps_offset": 1}
    scheduler: Any = LCMScheduler
    pipeline: Any = StableDiffusionPipeline
    pipe = pipeline(
        vae=folder.vae(),
        text_encoder=folder.text_model(),
        tokenizer=CLIPTokenizer.from_pretrained(folder.path / "tokenizer"),
        unet=folder.unet(),
        scheduler=scheduler(**numbers),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device, dtype)
    known = [trained - 1 - place * (trained // (schedule or trained)) for place in range(schedule or trained)]
    places = [known.index(t) for t in times]
    width, height = size
    stream = StreamDiffusion(pipe, places, dtype, width, height, cfg_type=cfg_type)
    arguments = {"guidance_scale": 1.0, "num_inference_steps": len(known), **prepared}
    stream.prepare(prompt, generator=torch.Generator(), seed=seed, **arguments)  # its default one is of all streams
    return stream


class Clock:
    """In the place of `torch.cuda.Event`, with which StreamDiffusion times every frame, where there is no CUDA."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._at = 0.0

    def record(self, *_: Any) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: Clock) -> float:
        """Milliseconds from this one to `end`."""
        return (end._at - self._at) * 1e3


def clocks_without_cuda(replace: Callable[[Any, str, Any], Any] = setattr) -> None:
    """Let StreamDiffusion run in this process without CUDA; for a process of its own, or a test that undoes it."""
    import torch

    if not torch.cuda.is_available():
        replace(torch.cuda, "Event", Clock)
        replace(torch.cuda, "synchronize", lambda *_: None)
