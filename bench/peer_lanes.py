"""What `bench.peers` lets run side by side, bytes to bytes: livestyle, and StreamDiffusion on the same networks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from accel.errors import UserError
from bench.peer_streamdiffusion import PACKAGE, opened

if TYPE_CHECKING:
    from torch import Tensor

# The first three are as the package takes them. Tuned: half precision (bfloat16 on a CPU, float16 on CUDA) and
# channels last. Compiled: that, and torch.compile of its networks.
FORMS = ("float32", "bfloat16", "float16", "tuned", "compiled")

Image = NDArray[np.uint8]  # (H, W, 3) RGB


@dataclass(frozen=True, slots=True)
class Work:
    """What everybody does, frame by frame."""

    folder: Path  # in diffusers' format
    size: tuple[int, int]  # (width, height)
    prompt: str
    steps: int
    strength: float
    seed: int
    threads: int  # of torch on a CPU
    device: str  # cpu or cuda
    batch: bool = False  # ours too has a frame per step in flight, as the peer always has


@dataclass(slots=True)
class Runner:
    """Something that takes a picture and gives one, `late` frames later."""

    step: Callable[[Image], Image | None]
    late: int  # what comes before that many frames is none, or nobody's
    versions: dict[str, str]
    device: str


def livestyle(work: Work, engine: str) -> Runner:
    """Ours on one of its engines, through the code that `livestyle run` uses."""
    import torch

    from models.load import load
    from models.structure import structure_of

    torch.set_num_threads(work.threads)
    params = settings(work)
    stylizer = load(str(work.folder), work.size, engine, structure=structure_of(params))
    state = stylizer.open(params)

    def step(image: Image) -> Image | None:
        picture: Image | None = stylizer.step(state, image, params).image()
        return picture

    versions: Any = stylizer.info["versions"]
    return Runner(step, work.steps - 1 if work.batch else 0, versions, str(stylizer.info["device"]))


def settings(work: Work) -> Any:
    """The work as `Params`."""
    from models.params import Params, Style, Temporal

    style = Style(prompt=work.prompt, steps=work.steps, strength=work.strength, seed=work.seed)
    return Params(style=style, temporal=Temporal(stream_batch=work.batch and work.steps > 1))


def streamdiffusion(work: Work, form: str) -> Runner:
    """The peer in one of its `FORMS`; float32 is the one whose pictures are compared."""
    import torch

    torch.set_num_threads(work.threads)
    helped = form in ("tuned", "compiled")
    half = "bfloat16" if work.device == "cpu" else "float16"
    stream = stream_of(work, getattr(torch, half if helped else form))
    if helped:
        stream.unet.to(memory_format=torch.channels_last)
        stream.vae.to(memory_format=torch.channels_last)
    if form == "compiled":
        if work.device == "cpu" and not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            raise UserError("torch.compile needs a C++ compiler", hint="install g++, or leave --form compiled out")
        stream.unet = torch.compile(stream.unet)
        stream.vae.encoder = torch.compile(stream.vae.encoder)
        stream.vae.decoder = torch.compile(stream.vae.decoder)

    def step(image: Image) -> Image:
        picture = torch.from_numpy(image).to(work.device)[None].permute(0, 3, 1, 2).to(stream.dtype) / 255
        return as_bytes(stream(picture))

    versions = {name: version(name) for name in (PACKAGE, "torch", "diffusers", "transformers")}
    return Runner(step, work.steps - 1, versions, work.device)


def stream_of(work: Work, dtype: Any) -> Any:
    """The peer, set up for the work."""
    from models.load import folder_of
    from models.recipe import recipe_of
    from models.schedule import consistency_schedule

    folder, known = folder_of(str(work.folder)), recipe_of(work.folder).timesteps
    times = [step.t for step in consistency_schedule(folder.scheduler(), work.steps, work.strength, known).steps]
    return opened(folder, work.size, times, work.prompt, work.seed, dtype=dtype, device=work.device)


def as_bytes(output: Tensor) -> Image:
    """StreamDiffusion's (1, 3, H, W) in [-1, 1] → (H, W, 3) uint8."""
    picture = (output[0].float() / 2 + 0.5).clamp(0, 1).mul(255).round().permute(1, 2, 0).byte()
    return picture.cpu().contiguous().numpy()


def difference(work: Work, images: Sequence[Image]) -> dict[str, float]:
    """How far our pictures are from StreamDiffusion's, colours in [0, 1]: max and mean; both float32 on the CPU."""
    import torch

    from models.load import load

    work = replace(work, batch=False, device="cpu")
    stream, params = stream_of(work, torch.float32), settings(work)
    ours = load(str(work.folder), work.size, "torch", as_bytes=False)
    state = ours.open(params)
    wanted: list[Tensor] = []
    gaps: list[Tensor] = []
    for image in [*images, *images[: work.steps - 1]]:  # so many more as it is late
        picture = torch.from_numpy(image)[None].permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            wanted.append(ours.stylize(state, picture, params).clone())
            found = (stream(picture) / 2 + 0.5).clamp(0, 1)
        if len(wanted) >= work.steps:
            gaps.append((found - wanted[-work.steps]).abs())
    return {"max": max(float(gap.max()) for gap in gaps), "mean": sum(float(gap.mean()) for gap in gaps) / len(gaps)}
