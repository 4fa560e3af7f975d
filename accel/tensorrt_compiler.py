"""The compiler, run in a process of its own and listened to from here: `accel.tensorrt_compile` is what it runs.

That has its reasons: Ctrl-C ends it at once, while in C++ it would not be heard for minutes; where the compiler
crashes, streams go on; its memory is given back. It imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accel import export
from accel.errors import UserError
from accel.tensorrt_compile import FORMAT
from accel.tensorrt_provider import Provider

log = logging.getLogger(__name__)

Say = Callable[[str], None]
TELL_S = 5.0  # between two lines of progress
LEAST_S = 2.0  # to build anything
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
NETWORK, ENGINE, TOLD = "network.onnx", "engine.bin", "told.txt"  # in the temporary folder


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is built besides module and spec."""

    provider: Provider
    target: str  # "sm_89"
    half: str = "float16"  # what "fast" specs compute in
    opset: int = export.OPSET

    @property
    def fingerprint(self) -> str:
        """All of it, with every version that counts; begins with the provider's name."""
        made = f"{self.provider.name} {self.provider.version()}; {self.target}; build {FORMAT}"
        return f"{made}; {export.recipe(self.opset, self.half)}"


class Refused(Exception):
    """TensorRT cannot compile this file."""


def command(recipe: Recipe, folder: Path) -> list[str]:
    """The compiler's command line, to be run in the folder."""
    provider = recipe.provider
    found = [sys.executable, "-m", "accel.tensorrt_compile", provider.name, recipe.target, NETWORK, ENGINE]
    if not provider.targets:  # it times kernels, and what it has timed once it need not again
        found.append(str(folder.parent / f"timing-{provider.version()}-{recipe.target}.bin"))
    return found


def compile_network(recipe: Recipe, name: str, folder: Path, expected_s: float = LEAST_S, say: Say = log.info) -> Path:
    """The engine of the network in this folder: run the compiler in a child, and tell how far it is by the clock.

    TensorRT's own progress is of no use: nearly all of its time passes in one step.
    """
    say(f"{name}: building for {recipe.target}, about {expected_s:.0f} s")
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    started = time.monotonic()
    with (folder / TOLD).open("wb") as told:
        # The child reads its standard input to the end, so that it ends with this process however this one does.
        child = subprocess.Popen(
            command(recipe, folder), cwd=folder, stdin=subprocess.PIPE, stdout=told, stderr=told, env=environment
        )
        try:
            while child.poll() is None:
                try:
                    child.wait(TELL_S)
                except subprocess.TimeoutExpired:
                    spent = time.monotonic() - started
                    left = f"about {expected_s - spent:.0f} s left" if spent < expected_s else "longer than expected"
                    say(f"{name}: building, {spent:.0f} s, {left}")
        finally:  # also of Ctrl-C
            child.kill()
            child.communicate()
    _judge(child.returncode, (folder / TOLD).read_text(errors="replace").strip().splitlines(), name, recipe)
    return folder / ENGINE


def _judge(status: int, told: list[str], name: str, recipe: Recipe) -> None:
    """Say what a child that has ended tells."""
    title = recipe.provider.title
    if -status in CRASHES:  # in 1.7.1 by some networks with two Attentions in a layer, which it builds spelt out
        raise Refused(f"the compiler crashes, signal {-status}")
    if status < 0:
        raise UserError(
            f"{name}: {title}'s compiler was ended by signal {-status}",
            hint="too little memory ends it so: close other programs, or use --engine torch-cuda",
        )
    last = told[-1] if told else "it says nothing"
    answer = json.loads(last) if last.startswith("{") else {"refused": last}
    if "disk" in answer:
        raise full_disk(name, answer["disk"])
    if status or "refused" in answer:
        raise Refused(answer.get("refused", f"exit status {status}"))


def full_disk(name: str, reason: str) -> UserError:
    return UserError(
        f"{name}: the engine cannot be written ({reason})",
        hint="livestyle engines prune --max-mb 0, or LIVESTYLE_CACHE=/another/disk",
    )
