"""Make the pictures of the page's style cards: one photograph, painted in every style that `mini` knows.

python scripts/style_cards.py [--picture PHOTO] [--folder stream/web/styles]

Without a picture it takes "Chelsea the cat" (CC0, Stéfan van der Walt), which scikit-image ships; the credit of another
one belongs into the README.md of the folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from models.load import load
from models.params import Params, Style
from models.spec import MODELS, style_names

CARD = (216, 144)  # width, height: so small that strokes are large on a card
STAGE = (528, 352)  # what the page shows before a camera is on
BUDGET = 400_000  # bytes, all pictures together


def slug(style: str) -> str:
    """The file name of a style, without its suffix.

    >>> slug("oil painting")
    'oil-painting'
    """
    return "-".join("".join(c if c.isalnum() else " " for c in style.lower()).split())


def filled(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Scale and cut the centre to fill (width, height)."""
    h, w = picture.shape[:2]
    scale = max(size[0] / w, size[1] / h)
    big = (max(size[0], round(w * scale)), max(size[1], round(h * scale)))
    picture = cv2.resize(picture, big, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    y, x = (picture.shape[0] - size[1]) // 2, (picture.shape[1] - size[0]) // 2
    return np.ascontiguousarray(picture[y : y + size[1], x : x + size[0]])


def photograph(path: Path | None) -> NDArray[np.uint8]:
    """The picture to paint, RGB."""
    if path:
        return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    from skimage import data

    return data.chelsea()


def write(path: Path, picture: NDArray[np.uint8], quality: int) -> int:
    """Write a progressive JPEG; returns its bytes."""
    settings = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), settings)
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "stream" / "web" / "styles")
    args = parser.parse_args()
    original = photograph(args.picture)
    total = 0
    for folder, size, quality in ((args.folder, CARD, 80), (args.folder / "large", STAGE, 58)):
        folder.mkdir(parents=True, exist_ok=True)
        source = filled(original, size)
        stylizer = load("mini", size)
        for names in style_names(MODELS["mini"].folder).values():
            params = Params(style=Style(prompt=names[0]))
            painted = np.array(stylizer.step(stylizer.open(params), source, params).image())
            total += write(folder / f"{slug(names[0])}.jpg", painted, quality)
    total += write(args.folder / "large" / "before.jpg", source, 68)
    print(f"{total} bytes in {args.folder}")
    if total > BUDGET:
        raise SystemExit(f"more than {BUDGET} bytes: lower the quality or the size")


if __name__ == "__main__":
    main()
