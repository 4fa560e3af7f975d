"""Control pictures: what a ControlNet is shown, drawn from the source picture, (H, W, 3) uint8 RGB → the same.

OpenCV alone, but for openpose, which takes a network (`models.pose`). So does depth, which also remembers what was
before, and is drawn by `models.depth`. "lineart" and "softedge" are drawn by classical filters, not by the annotator
networks that those ControlNets were trained with: alike in kind, white on black, but with more texture and less sense
of what matters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from accel.errors import UserError

if TYPE_CHECKING:
    from models.pose import Poses

Picture = NDArray[np.uint8]


def canny(picture: Picture, low: float = 100, high: float = 200, blur: float = 0.0) -> Picture:
    """Edges one pixel wide, 255 on 0; thresholds on Sobel's gradient, the usual ones. Canny 1986.

    Between the thresholds an edge counts where it joins a strong one: lines stay whole, but under noise they also come
    and go whole, 2.6 to 4.1 % of them under a sigma of 2 grey levels. A `blur` (pixels, sigma) of 1 makes that
    1.0 to 2.8 %, and draws less; the other controls do not switch.
    """
    if not 0 <= low <= high:
        raise UserError(f"canny thresholds {low:g} and {high:g}", hint="0 or more, the lower one first")
    return grey(cv2.Canny(np.ascontiguousarray(tile(picture, blur)), low, high))


def lineart(picture: Picture, width: float = 1.0, gain: float = 36.0) -> Picture:
    """Dark lines as light ones of about `width` pixels: a difference of Gaussians under a soft threshold.

    After Winnemöller et al. 2012 (XDoG), without its shading.
    """
    light = luminance(picture)
    narrow, wide = (cv2.GaussianBlur(light, (0, 0), width * s) for s in (1.0, 1.6))
    return soft(gain * (wide - narrow) - 0.2)


def softedge(picture: Picture, width: float = 2.0, gain: float = 5.0) -> Picture:
    """Gradients of the picture blurred by `width` pixels (sigma), strongest of the three colours.

    Worked out at half size, which such edges do not show; a constant gain, since one per picture would flicker.
    """
    height, across, _ = picture.shape
    half = cv2.resize(picture, (max(across // 2, 1), max(height // 2, 1)), interpolation=cv2.INTER_AREA)
    blurred = cv2.GaussianBlur(half, (0, 0), max(width / 2, 0.1))
    x, y = (cv2.Scharr(blurred, cv2.CV_32F, *order) for order in ((1, 0), (0, 1)))
    strength = cv2.magnitude(x, y).max(axis=2) / (16 * 255)  # 1 = from black to white
    return grey(cv2.resize(soft(gain * strength)[..., 0], (across, height)))


def tile(picture: Picture, blur: float = 0.0) -> Picture:
    """The picture itself; `blur` (pixels, a Gaussian's sigma) leaves the detail to the model."""
    return picture if blur <= 0 else np.asarray(cv2.GaussianBlur(picture, (0, 0), blur), np.uint8)


def openpose(picture: Picture) -> Picture:
    """People's limbs and joints, black where there is nobody; UserError where no pose estimator has been fetched."""
    return _poses()(picture)


@cache
def _poses() -> Poses:
    from models.pose import Poses

    return Poses()


def ready(name: str) -> None:
    """Load what a control picture needs, ahead and in any thread; UserError where it is not here."""
    if name == "openpose":
        _poses().ready()


CONTROLS: dict[str, Callable[..., Picture]] = {f.__name__: f for f in (canny, lineart, softedge, tile, openpose)}


def control_picture(name: str, picture: Picture, **settings: Any) -> Picture:
    """The control picture of a name in `CONTROLS`; UserError for an unknown one.

    >>> control_picture("canny", picture, low=50, high=150)
    """
    if name not in CONTROLS:
        raise UserError(f"no such control: {name}", hint=f"one of: {', '.join(CONTROLS)}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"picture of shape {picture.shape}, {picture.dtype}; control takes (H, W, 3) uint8")
    try:
        return CONTROLS[name](picture, **settings)
    except TypeError as error:
        raise UserError(f"{name} control has no such setting ({error})", hint="see models/control.py") from error


def luminance(picture: Picture) -> NDArray[np.float32]:
    """(H, W) in [0, 1]."""
    return np.multiply(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), 1 / 255, dtype=np.float32)


def soft(strength: Any) -> Picture:
    """Strengths (H, W) above 0, pressed smoothly under 1 → (H, W, 3)."""
    return grey(np.asarray(np.rint(255 * np.tanh(np.maximum(strength, 0))), np.uint8))


def grey(lines: Any) -> Picture:
    """(H, W) → (H, W, 3)."""
    return np.asarray(cv2.merge([lines] * 3), np.uint8)
