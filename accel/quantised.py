"""8-bit integers: NNCF's post-training quantisation of an OpenVINO model, by example inputs.

It runs in a process of its own, `python -m accel.quantised model.xml samples.npz int8.xml`: NNCF draws progress bars on
standard output, changes Python's logging for good and holds on to scikit-learn, none of which a stream needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino
    from torch import Tensor

PACKAGE = "nncf"
EXTRA = "quantise"  # of ours, which brings it
PATIENCE_S = 1800.0
LARGEST_ERROR = (
    0.025  # relative L2 to float32 of an engine that is kept: a PSNR of 38 dB where pictures are half bright
)

Samples = Sequence[tuple["Tensor", ...]]


class Refused(Exception):
    """The model cannot be quantised here; the message says why."""


def library_version() -> str | None:
    """NNCF's version, without importing it; None where it is not installed."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None


def quantised(model: openvino.Model, samples: Samples) -> openvino.Model:
    """The model with 8-bit convolutions and products: weights per channel, activations by what the samples reach.

    Raises `Refused`. The process inherits this thread's priority.
    """
    import numpy as np

    from accel.openvino_backend import library

    if library_version() is None:
        raise Refused(f"{PACKAGE} is not installed: pip install 'livestyle[{EXTRA}]'")
    ov = library()
    with tempfile.TemporaryDirectory(prefix="livestyle-int8-") as scratch:
        given, examples, found = (Path(scratch) / name for name in ("model.xml", "samples.npz", "int8.xml"))
        ov.save_model(model, given, compress_to_fp16=False)
        arrays = {f"{i} {j}": t.numpy() for i, sample in enumerate(samples) for j, t in enumerate(sample)}
        np.savez(examples, allow_pickle=False, **arrays)
        path = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "accel.quantised", str(given), str(examples), str(found)]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=PATIENCE_S,
                env={**os.environ, "PYTHONPATH": path},
            )
        except subprocess.TimeoutExpired as error:
            raise Refused(f"{PACKAGE} does not come to an end") from error
        if done.returncode:
            raise Refused((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
        # Not by its path, which maps a file that is gone soon.
        read: openvino.Model = ov.Core().read_model(found.read_bytes(), found.with_suffix(".bin").read_bytes())
        return read


def difference(found: Samples, wanted: Samples) -> float:
    """The largest relative L2 difference of an output, each taken over all samples."""
    import torch

    def one(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
        a, b = (torch.stack([t.double() for t in side]) for side in (ours, exact))
        return float((a - b).norm() / b.norm().clamp_min(1e-12))

    return max(one(a, b) for a, b in zip(zip(*found, strict=True), zip(*wanted, strict=True), strict=True))


def main(given: str, examples: str, quantised: str) -> None:
    """Quantise one file into another; mixed: activations that are never negative use all 256 levels."""
    import numpy as np

    from accel.openvino_backend import library

    openvino = library()  # before NNCF, which would import it with its usage reporting on
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    with np.load(examples) as arrays:
        samples: list[list[np.ndarray[tuple[int, ...], np.dtype[np.generic]]]] = []
        for name in arrays.files:  # in the order in which they were written
            if int(name.split()[0]) == len(samples):
                samples.append([])
            samples[-1].append(arrays[name])
    model = nncf.quantize(
        openvino.Core().read_model(given),
        nncf.Dataset(samples),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(samples),
        # To the furthest value seen: by default the samples' extremes are averaged, and bright places cut off.
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
        ),
    )
    openvino.save_model(model, quantised, compress_to_fp16=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
