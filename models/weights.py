"""Where a model's files are, how they come from the hub, and whether they came whole.

Looked for in this order: a path, livestyle's own folder of models (`$LIVESTYLE_MODELS`), the hub. The hub is asked by
`fetch` alone, never by a run: a live stream must not wait for gigabytes. What another program has fetched into the hub
library's cache is not fetched again, and a broken download goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accel.errors import UserError
from models.addons import ADDONS
from models.files import missing, weight_files
from models.hub import PICKLED, asked, brought, fault, told
from models.rows import LIST, Row
from models.spec import MODELS, ModelSpec

Report = Callable[[str, int, int], None]  # (file, bytes so far, bytes in all)


def found(model: str) -> Path:
    """The folder of a model's name or path, its files looked over; UserError says how to get it."""
    if model in MODELS:
        spec = MODELS[model]
        if not (spec.folder / "model_index.json").is_file():
            raise UserError(
                f"{model} is not here yet ({spec.megabytes / 1000:.1f} GB)", hint=f"`livestyle fetch {model}`"
            )
        return sound(spec.folder, model)
    if not model:
        raise UserError("no model is named", hint=f"one of: {', '.join(MODELS)}")
    path = Path(model).expanduser()
    if path.is_file():
        from models.checkpoint import converted

        return converted(path)
    if not path.is_dir():
        raise UserError(
            f"no such model: {model}", hint=f"a folder in diffusers' format, or one of: {', '.join(MODELS)}"
        )
    return sound(path)


def sound(folder: Path, name: str = "") -> Path:
    """The folder, when no file in it was cut short; UserError names the one that was. Milliseconds: only headers."""
    hint = f"fetch it again: `livestyle fetch {name}`" if name else "fetch it again, or copy it from where it is whole"
    is_model = (folder / "model_index.json").is_file()
    for file in sorted(folder.glob("*/*.safetensors" if is_model else "**/*.safetensors")):
        if problem := fault(file):
            raise UserError(f"{folder.name}/{file.relative_to(folder)}: {problem}", hint=hint)
    listed = folder / LIST
    for target in json.loads(listed.read_text())["files"] if listed.is_file() else ():
        if not (folder / target).is_file():
            raise UserError(f"{folder.name}/{target} is gone", hint=hint)
    if is_model and (problem := missing(folder)):
        raise UserError(f"{folder.name}: {problem}", hint=hint)
    return folder


def fetch(
    name: str,
    *,
    base: Path | None = None,
    endpoint: str | None = None,
    report: Report = lambda file, done, total: None,
) -> Path:
    """Bring a row's files from the hub, a model's or an add-on's, check them, and make its folder of them.

    `base` is a Stable Diffusion 1.5 checkpoint of the user's own, folder or single file, in place of the published
    one. `endpoint` is the hub's address, where it is not the usual one.
    """
    spec: Row | None = MODELS.get(name) or ADDONS.get(name)
    if spec is None or not spec.sources:
        known = ", ".join(row.name for row in (*MODELS.values(), *ADDONS.values()) if row.sources)
        what = "comes with livestyle" if spec else "is no model that can be fetched"
        raise UserError(f"{name} {what}", hint=f"one of: {known}")
    own = own_parts(spec, base) if base else {}
    wanted = [(source, file) for source in spec.sources if source.part not in own for file in source.files]
    with told(spec):
        remotes = [asked(source, file, endpoint) for source, file in wanted]
    total = sum(remote.size for remote in remotes)
    files: dict[str, Path] = {}
    done = 0
    for remote in remotes:
        with told(spec):
            files[remote.target] = brought(remote, endpoint, added(report, remote.target, done, total))
        done += remote.size
        report(remote.target, done, total)
    for part, folder in own.items():
        files |= {f"{part}/{target}": file for target, file in chosen(folder).items()}
    made = {r.target: {"repo": r.source.repo, "commit": r.commit, "file": r.file, "sha256": r.digest} for r in remotes}
    with told(spec):
        return assembled(spec, files, {"base": str(base) if base else None, "files": {f: made.get(f) for f in files}})


def added(report: Report, file: str, before: int, total: int) -> Callable[[int], None]:
    """A report on one file as one on all of them."""
    return lambda bytes_: report(file, before + bytes_, total)


def fetch_shown(name: str, base: Path | None = None) -> Path:
    """`fetch` with a progress bar on the terminal's error stream: what `livestyle fetch` does."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        task = bars.add_task(name, total=None, visible=False)
        return fetch(
            name,
            base=base,
            report=lambda file, done, total: bars.update(
                task, description=file, completed=done, total=total, visible=True
            ),
        )


def own_parts(spec: Row, base: Path) -> dict[str, Path]:
    """The parts of a row that a checkpoint of the user's gives; UserError where it cannot."""
    parts = [source.part for source in spec.sources if source.own]
    if not parts:
        raise UserError(f"{spec.name} takes no other base", hint="`livestyle fetch sd15-lcm --base …` does")
    folder = found(str(base))
    try:
        width = json.loads((folder / "unet" / "config.json").read_text())["cross_attention_dim"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{base} has no readable unet/config.json", hint="a folder in diffusers' format") from error
    if width != 768:
        raise UserError(
            f"{base} is not of the Stable Diffusion 1.5 family ({width})", hint="choose an SD 1.5 checkpoint"
        )
    return {part: folder / part for part in parts}


def chosen(folder: Path) -> dict[str, Path]:
    """What of a part is needed, by the name it is to have; half-width weights go under the plain name."""
    found = [file for file in folder.iterdir() if file.suffix in (".json", ".txt")] + weight_files(folder)
    shards = any("-of-" in file.name for file in found)  # which are named in a list
    return {file.name if shards else file.name.replace(".fp16.", "."): file for file in found}


def assembled(spec: Row, files: dict[str, Path], made: dict[str, Any]) -> Path:
    """Make a row's folder of files elsewhere: beside its place, then renamed into it whole.

    Weights are hard links where the disk allows it (nothing twice, and clearing the hub's cache does no harm), else
    symbolic links, else copies; small files are copies, since some are changed.
    """
    folder = spec.folder
    beside = folder.with_name(f".{spec.name}-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        for target, file in files.items():
            place(file.resolve(), beside / target)
        if isinstance(spec, ModelSpec):
            describe(spec, beside)
        (beside / LIST).write_text(json.dumps({"model": spec.name, **made}, indent=1))
        sound(beside, spec.name)
        shutil.rmtree(folder, ignore_errors=True)
        return beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def describe(spec: ModelSpec, folder: Path) -> None:
    """Write what makes a folder one of diffusers' format: its scheduler, its index and the scale of its LoRA."""
    config = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(config.read_text()) | dict(spec.recipe.scheduler)
    config.write_text(json.dumps(settings, indent=1))
    index: dict[str, Any] = {"_class_name": spec.pipeline, "_diffusers_version": version("diffusers")}
    index |= {source.part: list(source.kind) for source in spec.sources if source.kind}
    index["scheduler"] = ["diffusers", settings["_class_name"]]
    if spec.pipeline == "StableDiffusionPipeline":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    if loras := sorted((folder / "lora").glob("*.safetensors")):
        text = json.dumps({"file": loras[0].name, "scale": spec.recipe.lora_scale})
        (folder / "lora" / "lora.json").write_text(text)
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


def place(file: Path, target: Path) -> None:
    """Put a file there: by a link, if it is large."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix in PICKLED and target.suffix == ".safetensors":
        return unpickled(file, target)
    if file.suffix in (".safetensors", ".onnx"):
        for link in (os.link, os.symlink):
            try:
                return link(file, target)
            except OSError:
                continue  # another disk, or a system without links
    shutil.copyfile(file, target)


def unpickled(file: Path, target: Path) -> None:
    """Write pickled weights anew as safetensors. Nothing but tensors is read, so nothing in them can run."""
    from pickle import UnpicklingError

    import torch
    from safetensors.torch import save_file

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, target, metadata={"format": "pt"})
    except (UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file.name} holds no plain tensors, or not all of them", hint="fetch it again, or tell its makers"
        ) from error
