"""TensorRT twice: for data-centre cards, and TensorRT-RTX for the cards that streamers own. One API, two libraries.

Neither is imported here: TensorRT's objects crash the process that makes them where driver or library are not as they
should be, so whether one works is tried out in a child process.
"""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

from accel.errors import UserError

PATIENCE_S = 120.0  # for loading 240 MB of library from a slow disk


@dataclass(frozen=True, slots=True)
class Provider:
    """One of the two libraries."""

    name: str  # begins the fingerprint of its engines
    title: str
    module: str  # to import
    packages: tuple[str, ...]  # any of which brings the module, and its version
    extra: str  # of ours
    targets: tuple[str, ...]  # cards that it builds for without having one; () = only for the card at hand
    s_per_gb: float  # of an engine, to export and build one; until there are builds to go by

    def version(self) -> str | None:
        """The installed version, without importing it; None where it is not installed."""
        for package in self.packages:
            try:
                return metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return None

    def library(self) -> ModuleType:
        """Import it: with a device only, except in a child process that builds."""
        return importlib.import_module(self.module)


TENSORRT = Provider(
    name="tensorrt",
    title="TensorRT",
    module="tensorrt",
    packages=("tensorrt_cu13_libs", "tensorrt_cu12_libs"),  # the bindings alone do nothing
    extra="tensorrt",
    targets=(),
    s_per_gb=100.0,  # it times kernels on the card; not measured yet
)
RTX = Provider(
    name="tensorrt_rtx",
    title="TensorRT-RTX",
    module="tensorrt_rtx_bindings",
    packages=("tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu12_bindings"),
    extra="rtx",
    targets=("sm_75", "sm_86", "sm_89", "sm_120", "sm_121"),
    s_per_gb=20.0,  # 1.7 GB in 35 s on two cores
)
PROVIDERS = {provider.name: provider for provider in (TENSORRT, RTX)}


def sm_of(text: str) -> str:
    """A card's architecture, of "sm_89", "89" or "8.9"; UserError for what is none.

    >>> sm_of("8.9")
    'sm_89'
    """
    digits = text.lower().removeprefix("sm_").replace(".", "")
    if not digits.isascii() or not digits.isdigit() or len(digits) not in (2, 3):
        raise UserError(f"not a GPU architecture: {text}", hint=f"--target takes {', '.join(RTX.targets)}")
    return f"sm_{digits}"


def has_fp8(sm: str) -> bool:
    """Whether a card multiplies 8-bit floats: from Ada on.

    >>> has_fp8("sm_86"), has_fp8("sm_120")
    (False, True)
    """
    return int(sm.removeprefix("sm_")) >= 89


def provider_for(sm: str) -> Provider:
    """The library for a card that is here; UserError where it is not installed, or none serves the card."""
    if sm in RTX.targets and RTX.version():
        return RTX
    if TENSORRT.version():
        return TENSORRT
    if sm in RTX.targets:
        raise UserError(f"tensorrt: {RTX.title} is not installed", hint="pip install 'livestyle[rtx]'")
    spoken = f"{sm[3:-1]}.{sm[-1]}"
    raise UserError(
        f"tensorrt: {RTX.title} does not serve compute capability {spoken}, and TensorRT is not installed",
        hint="use --engine torch-cuda, or pip install 'livestyle[tensorrt]' where NVIDIA's own index can be reached",
    )


def provider_ahead(sm: str) -> Provider:
    """The library that builds for such a card without having it; UserError where there is none."""
    if sm not in RTX.targets:
        raise UserError(
            f"engines for {sm} cannot be built ahead: {RTX.title} serves {', '.join(RTX.targets)}",
            hint="TensorRT builds on the card itself, when it first runs; torch-cuda needs no engines",
        )
    if not RTX.version():
        raise UserError(f"tensorrt: {RTX.title} is not installed", hint="pip install 'livestyle[rtx]'")
    return RTX


def lack(sm: str) -> UserError | None:
    """What keeps TensorRT from running on this machine's card, or None."""
    from accel import export

    try:
        provider = provider_for(sm)
    except UserError as error:
        return error
    if problem := tried(provider):
        return UserError(f"tensorrt: {provider.title} does not work here ({problem})", hint="use --engine torch-cuda")
    return export.missing()


@functools.cache
def tried(provider: Provider) -> str:
    """Why the library does not work with this machine's driver, or ""; asked of a child process."""
    command = [sys.executable, "-c", f"import {provider.module} as t; t.Runtime(t.Logger(t.Logger.ERROR)).max_threads"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return "it does not answer"
    if done.returncode < 0:
        return f"it crashes, signal {-done.returncode}"
    return (done.stderr.strip().splitlines() or ["it fails"])[-1] if done.returncode else ""
