"""Whether a frame is so like the last diffused one that diffusing it again would be a waste.

StreamDiffusion (Kodaira et al. 2023, arXiv 2312.12491) takes the cosine of whole pictures and skips by chance.
That cosine hardly leaves 1 on video: at its usual threshold of 0.98 it skips two frames in three of a bicycle ride.
Here it is the one patch that changed most that counts, so a hand that waves in a corner is seen, and noise, which
averages out over a patch, is not.
"""

from __future__ import annotations

import av  # noqa: F401 before OpenCV: see stream/sources/screen.py
import cv2
import numpy as np
from numpy.typing import NDArray

PATCHES = 32  # along the longer side: 16 × 16 pixels each at 512 × 288
MOST = 10  # frames skipped in a row: what moves too slowly to be seen from one to the next shows up by then


def patches(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The mean colour of each square patch of a picture, (H, W, 3) → (18, 32, 3) for one of 16:9."""
    height, width = image.shape[:2]
    side = max(height, width) / PATCHES  # a whole number for most models, which OpenCV is quick at
    grid = max(round(width / side), 1), max(round(height / side), 1)
    return np.asarray(cv2.resize(image, grid, interpolation=cv2.INTER_AREA), np.uint8)


def likeness(before: NDArray[np.uint8], now: NDArray[np.uint8]) -> float:
    """1 minus the largest change of any patch in any colour, of the whole range, for two results of `patches`.

    >>> likeness(patches(image), patches(image))
    1.0
    """
    return 1.0 - float(cv2.absdiff(before, now).max()) / 255


class Similar:
    """One stream's memory of the frame that was diffused last: that frame's patches, and how many were skipped since.

    Everything is compared with a frame that was diffused, never with a skipped one, so a slow change adds up.

    >>> similar = Similar()
    >>> similar.skip(image, 0.98), similar.skip(image, 0.98)
    (False, True)
    """

    def __init__(self) -> None:
        self._before: NDArray[np.uint8] | None = None
        self._shape: tuple[int, ...] = ()
        self._settings: object = None
        self._skipped = 0

    def skip(self, image: NDArray[np.uint8], threshold: float, settings: object = None) -> bool:
        """Whether to show the last result again for this (H, W, 3) picture; where not, it counts as diffused.

        Never with a threshold of 0, with other `settings` or another size than the last diffused frame had, or after
        ten in a row.
        """
        if not threshold:
            self.reset()
            return False
        now = patches(image)
        if (
            self._before is not None
            and self._skipped < MOST
            and image.shape == self._shape
            and (settings is self._settings or settings == self._settings)
            and likeness(self._before, now) >= threshold
        ):
            self._skipped += 1
            return True
        self._before, self._shape, self._settings, self._skipped = now, image.shape, settings, 0
        return False

    def reset(self) -> None:
        """The next frame is diffused whatever it is: another scene begins, or the last one came to nothing."""
        self._before, self._shape, self._settings, self._skipped = None, (), None, 0
