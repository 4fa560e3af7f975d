"""Pose pictures: people's limbs and joints in OpenPose's colours on black, from one picture by a network.

RTMO (Lu et al. 2024, arXiv 2312.07526) finds everybody in one pass. It is published as ONNX, with decoding and the
suppression of doubles inside, so it runs as it is: by OpenVINO on the processor, whatever the model's engine.
"""

from __future__ import annotations

import colorsys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from accel.errors import UserError
from accel.machine import giving_way, physical_cores
from models.addons import addon

if TYPE_CHECKING:
    import openvino

Picture = NDArray[np.uint8]
Points = NDArray[np.float32]  # (…, 3): x, y in pixels, and how sure the network is, 0 to 1

FILE = "model.onnx"
FETCH = "fetch it again: `livestyle fetch rtmo-small`"
SIDE = 640  # pixels that RTMO was trained on, where the file does not say
GREY = 114  # of what is beside the picture, as in training
SURE = 0.5  # of a body: below, chairs and coats come and go
SEEN = 0.3  # of a joint: below, it is behind something or outside the picture
NECK = 17  # COCO has none: half-way between the shoulders
OPENPOSE = (0, NECK, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)  # its 18 joints, by COCO's numbers
LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
         (0, 14), (14, 16), (0, 15), (15, 17))  # fmt: skip
COLOURS = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / 18, 1, 1)) for i in range(18)]  # of limbs and joints
DIM = 0.6  # of limbs; joints are bright
THICK = 4 / 512  # half a limb's width and a joint's radius, of the shorter side
SHIFT = 4  # bits of sub-pixel places: whole pixels would tremble


class Poses:
    """The fetched pose estimator at work; loaded when first needed, for any thread.

    >>> shown = Poses()(picture)  # (H, W, 3) uint8 RGB → the same
    """

    def __init__(self) -> None:
        self._model: openvino.CompiledModel | None = None
        self._lock = threading.Lock()

    def __call__(self, picture: Picture) -> Picture:
        height, width, _ = picture.shape
        return drawn(self.people(picture), (height, width))

    def people(self, picture: Picture) -> Points:
        """(N, 17, 3) of everybody whom the network is sure of: COCO's joints, in pixels of the picture."""
        with self._lock:
            model = self._loaded()
            shown, scale = letterboxed(picture, sides(model))
            found = model(shown)
            bodies, joints = np.reshape(found["dets"], (-1, 5)), np.reshape(found["keypoints"], (-1, 17, 3))
            people = joints[bodies[:, 4] >= SURE]  # a copy: what was found is the network's own
        return np.asarray(people / (*scale, 1), np.float32)

    def ready(self) -> None:
        """Load it ahead; UserError where there is none, or none that works."""
        with self._lock:
            self._loaded()

    def _loaded(self) -> openvino.CompiledModel:
        if self._model is None:
            self._model = estimator(addon("bodies"))
        return self._model


def estimator(folder: Path) -> openvino.CompiledModel:
    """The network of a folder; UserError where it cannot be read, or gives something else."""
    try:
        from accel.openvino_backend import library

        core = library().Core()
    except ImportError as error:
        raise UserError("openpose control needs OpenVINO", hint="pip install openvino") from error
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # bf16 knows every fourth pixel only
        "INFERENCE_NUM_THREADS": physical_cores(),
    }
    try:
        model: Any = giving_way(lambda: core.compile_model(folder / FILE, "CPU", options))
    except RuntimeError as error:  # all that OpenVINO raises; its last line says why
        reason = str(error).strip().splitlines()[-1][:200]
        raise UserError(f"openpose control: {folder.name}/{FILE} cannot be read ({reason})", hint=FETCH) from error
    given = {name for output in model.outputs for name in output.get_names()}
    if len(model.inputs) != 1 or not {"dets", "keypoints"} <= given:
        raise UserError(f"openpose control: {folder.name}/{FILE} is no pose estimator of RTMO's kind", hint=FETCH)
    return model


def sides(model: openvino.CompiledModel) -> tuple[int, int]:
    """(height, width) of the pictures that a network takes."""
    shape = model.inputs[0].get_partial_shape()
    height, width = (SIDE if side.is_dynamic else side.get_length() for side in (shape[2], shape[3]))
    return height, width


def letterboxed(picture: Picture, size: tuple[int, int]) -> tuple[Points, tuple[float, float]]:
    """A picture as the network takes it, (1, 3, h, w) BGR from 0 to 255, at the top left; and its scales, x and y."""
    height, width, _ = picture.shape
    scale = min(size[0] / height, size[1] / width)
    inner = max(round(width * scale), 1), max(round(height * scale), 1)
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    shown = np.full((*size, 3), GREY, np.float32)
    shown[: inner[1], : inner[0]] = cv2.resize(picture, inner, interpolation=how)[..., ::-1]
    return np.ascontiguousarray(shown.transpose(2, 0, 1)[None]), (inner[0] / width, inner[1] / height)


def drawn(people: Points, size: tuple[int, int]) -> Picture:
    """The limbs and joints (N, 17, 3) that are seen, as a picture of (height, width): dimmed limbs, then bright joints.

    Colours, order and proportions are those of the annotator that the published ControlNets learned from.
    """
    canvas = np.zeros((*size, 3), np.uint8)
    thick = THICK * min(size)
    bodies = [openpose(body) for body in people]
    for limb, colour in zip(LIMBS, COLOURS, strict=False):
        for (ax, ay, seen_a), (bx, by, seen_b) in (body[list(limb)] for body in bodies):
            if min(seen_a, seen_b) >= SEEN:
                outline = ellipse(np.array([ax, ay]), np.array([bx, by]), thick)
                cv2.fillConvexPoly(canvas, fixed(outline), [DIM * c for c in colour], cv2.LINE_AA, SHIFT)
    for joint, colour in enumerate(COLOURS):
        for x, y, seen in (body[joint] for body in bodies):
            if seen >= SEEN:
                cv2.circle(canvas, fixed([x, y]).tolist(), int(fixed(thick)), colour, -1, cv2.LINE_AA, SHIFT)
    return canvas


def openpose(body: Points) -> Points:
    """OpenPose's 18 joints out of COCO's 17, what is far outside or no number not seen."""
    neck = (body[5] + body[6]) / 2
    neck[2] = min(body[5, 2], body[6, 2])
    joints: Points = np.concatenate([body, neck[None]])[list(OPENPOSE)]
    joints[~(np.abs(joints) < 1e5).all(1)] = 0
    return joints


def ellipse(a: Points, b: Points, thick: float) -> Points:
    """The outline (40, 2) of an ellipse from one point to another, at most `thick` from the line between them."""
    along = (b - a) / 2
    across = np.array([-along[1], along[0]]) * thick / max(float(np.hypot(*along)), 1e-6)
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)[:, None]
    return np.asarray((a + b) / 2 + np.cos(turn) * along + np.sin(turn) * across, np.float32)


def fixed(pixels: Any) -> NDArray[np.int32]:
    """Places in OpenCV's fixed-point numbers."""
    return np.asarray(np.rint(np.multiply(pixels, 1 << SHIFT)), np.int32)
