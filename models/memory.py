"""Whether a model fits into this machine's memory, asked before it is read and compiled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import psutil

from accel.errors import UserError

# Bytes per weight while the largest network is read and compiled, while a stored one is read, and once it is there.
# Measured with UNets of 142, 425 and 860 million weights (OpenVINO 2026.4, bf16; the last one, Stable Diffusion 1.5's
# at 512×512, took 10.1 GB, and 6.7 GB once it was there): read as float32 they are 4, compiled 4 to 5, and an engine on
# its way to the disk or from it as much again. TensorRT: SDXL's UNet, 2.6 billion weights, exported and built in half
# precision at 512×512, took 14.5 GB of the machine with the compiler's process.
COMPILING = {"openvino": 9.0, "torch": 4.5, "torch-cuda": 4.5, "tensorrt": 6.0}
READING = {"openvino": 7.0, "torch": 4.5, "torch-cuda": 4.5, "tensorrt": 5.0}
AT_WORK = {"openvino": 5.0, "torch": 4.0, "torch-cuda": 0.2, "tensorrt": 0.2}
TEXT = 4.0  # text models are read first and stay in torch, float32
PER_PIXEL = {"openvino": 8192.0, "torch": 2048.0}  # of a picture, for what a full-size network works out on the way
FULL = 8.6e8  # weights of the UNet for which that holds, Stable Diffusion 1.5's
SPARE = 0.3e9  # for Python and its libraries
IGNORE = "LIVESTYLE_MEMORY"  # "ignore" = try anyway


def check_memory(
    folder: Path,
    engine: str,
    size: tuple[int, int],
    *,
    stored: bool = False,
    text: bool = True,
    rows: int = 1,
    others: Mapping[str, int] | None = None,
    kept: float = 0.0,
) -> None:
    """UserError where a model of this folder will not fit into the memory that is free now.

    `engine` is the backend's name; with `stored` engines nothing is compiled, and without `text` the text models have
    been read. `rows` latents go through at once, `others` has the weights of what is compiled besides, such as
    ControlNets, and `kept` is what streams remember, bytes. An estimate, from the headers of the weights: milliseconds.

    >>> check_memory(folder.path, backend.name, (512, 512), others={"canny": weights(control.path)})
    """
    if os.environ.get(IGNORE) == "ignore":
        return
    wanted = needed(folder, engine, size, stored=stored, text=text, rows=rows, others=others) + kept
    free = available()
    if wanted > free:
        raise UserError(
            f"too little memory for {folder.name}: about {wanted / 1e9:.1f} GB wanted, {free / 1e9:.1f} GB free",
            hint=f"a smaller --model (mini is the smallest), a smaller --size, or other programs closed; "
            f"{IGNORE}=ignore tries it anyway",
        )


def needed(
    folder: Path,
    engine: str,
    size: tuple[int, int],
    *,
    stored: bool = False,
    text: bool = True,
    rows: int = 1,
    others: Mapping[str, int] | None = None,
) -> float:
    """Bytes that loading and running a model takes at most, the process as it is now not counted."""
    counts = {part: weights(folder / part) for part in ("unet", "vae", "motion_adapter")}
    networks = [counts["unet"] + counts["motion_adapter"], counts["vae"], counts["vae"], *(others or {}).values()]
    words = TEXT * sum(weights(folder / part) for part in ("text_encoder", "text_encoder_2")) if text else 0.0
    work, largest = AT_WORK.get(engine, 0.0), max(networks)
    ready = work * sum(networks)
    peak = ready + ((READING if stored else COMPILING).get(engine, work) - work) * largest
    return max(ready, peak) + words + rows * _work(largest, size, engine) + SPARE


def _work(weights: int, size: tuple[int, int], engine: str) -> float:
    """Bytes of what a network of so many weights keeps while it works; channels go with the weights' square root."""
    return float(PER_PIXEL.get(engine, 0.0) * size[0] * size[1] * min((weights / FULL) ** 0.5, 2.0))


def weights(part: Path) -> int:
    """How many numbers the weights of a part are, each counted once; 0 where there is none to be read."""
    from models.files import weight_files

    counted: dict[str, int] = {}
    for file in weight_files(part):
        counted |= dict(_tensors(file)) if file.suffix == ".safetensors" else {file.name: file.stat().st_size // 4}
    return sum(counted.values())


def _tensors(file: Path) -> Iterator[tuple[str, int]]:
    """Names of a safetensors file's tensors and how many numbers each has, by its header."""
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, row in header.items():
            if name != "__metadata__":
                yield name, prod(row["shape"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return  # said by `weights.sound`


def available() -> float:
    """Bytes that this process may still take: memory and swap that are free, or what its control group leaves it."""
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    return float(min([free, *group_rest()]))


def group_rest(root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each control group around this process (a container's, a service's) leaves of its memory limit, bytes."""
    rest = []
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return []  # not Linux
    for line in lines:
        _, names, path = (*line.split(":", 2), "", "")[:3]
        base, limit, used = root, "memory.max", "memory.current"
        if names:  # version 1 has a tree per kind
            if "memory" not in names.split(","):
                continue
            base, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        place = base / path.strip("/")
        for folder in (place, *place.parents):
            try:
                most, now = (folder / limit).read_text(), (folder / used).read_text()
                cached = _reclaimable(folder / "memory.stat")
                rest.append(max(int(most) - int(now) + cached, 0))  # "max" is no number
            except (OSError, ValueError):
                pass
            if folder == base:
                break
    return rest


def _reclaimable(stat: Path) -> int:
    """Bytes of files that a control group has in memory and gives up when asked."""
    try:
        rows = dict(line.split() for line in stat.read_text().splitlines())
        return int(rows.get("inactive_file", 0)) + int(rows.get("active_file", 0))
    except (OSError, ValueError):
        return 0
