"""From a model's name to a `Stylizer` that is ready to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from accel.engine import Backend, Engine
from models.assets import asset
from models.controlnet import control_folder
from models.folder import Folder
from models.inversion import teach
from models.loras import Loras
from models.memory import check_memory, weights
from models.networks import Graph, graphs, latent_shape
from models.parts import Part, parts_of, slots_of, window_of
from models.recipe import recipe_of
from models.safety import SafetyChecker, safety_folder, safety_graph
from models.state import Networks
from models.structure import PLAIN, Structure
from models.stylizer import LatentStylizer
from models.text_xl import size_ids
from models.together import widened
from models.weights import found

EFFORT = {"encode": 0.1, "unet": 0.8, "decode": 0.1}  # share of the time that compiling each network takes


def folder_of(model: str) -> Folder:
    """The folder of a model's name or path, or of a single-file checkpoint; UserError where it is not whole."""
    return Folder(found(model))


def compiled_graphs(model: str, size: tuple[int, int]) -> dict[str, Graph]:
    """The networks of a model at a size, for benchmarks and parity tests."""
    return graphs(folder_of(model), size)


def quiet_libraries() -> None:
    """Keep the loaders' progress bars and notes off the terminal; errors still come as exceptions."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def load(
    model: str,
    size: tuple[int, int],
    engine: str = "auto",
    log: Callable[[str], None] = lambda line: None,
    *,
    structure: Structure = PLAIN,
    as_bytes: bool = True,
    progress: Callable[[str, float], None] = lambda part, done: None,
    backend: Backend | None = None,
) -> LatentStylizer:
    """Compile a model for pictures of (width, height), or take its engines from the cache.

    `structure` is what the settings need besides; UserError where the model cannot have it. `as_bytes=False` is for
    comparisons: `stylize` then takes and gives floats, and `step` cannot be used. `progress` is told which network
    comes next, and the share done.

    >>> stylizer = load("mini", (512, 288), engine="openvino", log=print)
    """
    from accel.cache import default_root
    from accel.select import Choice, choose

    quiet_libraries()
    folder = folder_of(model)
    tables, recipe = folder.scheduler(), recipe_of(model)  # what cannot be is said before anything large is read
    text = folder.text()
    teach(text, [asset(name, "embeddings") for name in structure.embeddings])
    slots = slots_of(folder, structure)
    loras = Loras(slots, text.models, text.with_models)
    parts = parts_of(folder, replace(structure, rows=structure.latents), latent_shape(folder, size), slots, loras)
    choice = Choice(backend, f"engine {backend.name} ({backend.device})") if backend else choose(engine)
    log(choice.reason)
    backend, cache = choice.backend, default_root()
    window = window_of(folder, structure)

    def networks_of(rows: int, parts: Sequence[Part]) -> dict[str, Graph]:
        features, block = [part.feature for part in parts], window.block if window else 1
        return graphs(
            folder,
            size,
            as_bytes=as_bytes,
            rows=rows,
            block=block,
            features=features,
            fp8=structure.fp8,
            refit=structure.refit,
        )

    def wider(width: int) -> Mapping[str, Engine]:
        """The three networks for frames of so many streams; what widens the UNet has rows for all of them."""
        room = replace(structure, rows=width)
        found = networks_of(width, parts_of(folder, room, latent_shape(folder, size), slots_of(folder, room), loras))
        found |= {name: widened(compiled[name], width) for name in ("encode", "decode")}
        stored = is_stored(found.values(), backend, cache)
        check_memory(folder.path, backend.name, size, stored=stored, text=False, rows=width)
        return {name: backend.load(graph.build, graph.spec, cache) for name, graph in found.items()}

    compiled = networks_of(structure.latents, parts)
    safety = safety_graph(safety_folder(folder)) if structure.checked else None
    more = (*(graph for part in parts for graph in part.graphs.values()), *((safety,) if safety else ()))
    others = {name: weights(control_folder(name, folder).path) for name in structure.controls}
    stored = is_stored([*compiled.values(), *more], backend, cache)
    check_memory(folder.path, backend.name, size, stored=stored, text=False, rows=structure.latents, others=others)
    engines, done = {}, 0.0
    for name, graph in compiled.items():
        progress(name, done)
        engines[name] = backend.load(graph.build, graph.spec, cache)
        done += EFFORT[name]
    for part in parts:
        for name, graph in part.graphs.items():
            progress(graph.spec.name, done)
            part.engines[name] = backend.load(graph.build, graph.spec, cache)
    checker = SafetyChecker(backend.load(safety.build, safety.spec, cache)) if safety else None
    vae, device = folder.config("vae"), tensors_on(backend)
    networks = Networks(
        encode=engines["encode"],
        unet=engines["unet"],
        decode=engines["decode"],
        text=text,
        loras=loras,
        tables=tables,
        scaling=float(vae.get("scaling_factor") or 1.0),
        shift=float(vae.get("shift_factor") or 0.0),
        guidance_width=int(folder.config("unet").get("time_cond_proj_dim") or 0),
        style_words=frozenset(folder.style_words()),
        parts=tuple(parts),
        rows=structure.rows,
        checker=checker,
        timesteps=recipe.timesteps,
        sampler=recipe.sampler,
        time_ids=size_ids(size).to(device) if folder.pooled_width() else None,
        device=device,
        wider=wider,
    )
    packages = ("torch", "diffusers", "transformers", "openvino", "av", "numpy")
    info: dict[str, object] = {
        "model": model,
        "engine": backend.name,
        "device": backend.device,
        "versions": {name: number for name in packages if (number := installed(name))},
    }
    return LatentStylizer(networks, info)


def is_stored(graphs: Iterable[Graph], backend: Backend, cache: Path) -> bool:
    """Whether the cache has the engines of all of these."""
    from accel.cache import digest_of, key_of

    keys = (digest_of(key_of(backend.fingerprint, graph.spec)) for graph in graphs)
    return all((cache / key / "engine.bin").is_file() for key in keys)


def installed(package: str) -> str:
    """The version of a package, "" where it is not there: openvino need not be."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def tensors_on(backend: Backend) -> torch.device:
    """Where tensors on their way from one of its engines to the next are to be: on the GPU, if that is its device."""
    return torch.device(backend.device if backend.device.startswith(("cuda", "meta")) else "cpu")
