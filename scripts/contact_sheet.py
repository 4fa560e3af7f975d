"""Make a contact sheet: a row of pictures, then a row per style.

python scripts/contact_sheet.py sheet.jpg [--model mini] [--styles "oil painting" ...] [PICTURE_OR_CLIP@SECONDS ...]

Without pictures it takes public-domain ones that scikit-image ships.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from models.load import load
from models.params import Params, Style
from models.spec import MODELS

TILE = (240, 160)  # width, height in the sheet
SCALE = 1.6  # pictures are stylized this much larger than they are shown


def shipped() -> list[NDArray[np.uint8]]:
    """Astronaut (NASA, public domain), coffee, cat and rocket (CC0)."""
    from skimage import data

    return [data.astronaut()[:400, 40:500], data.coffee(), data.chelsea(), data.rocket()]


def read(name: str) -> NDArray[np.uint8]:
    """A picture file, or the frame of a clip at NAME@SECONDS, RGB."""
    path, _, seconds = name.partition("@")
    if not seconds:
        picture = cv2.imread(path)
    else:
        video = cv2.VideoCapture(path)
        video.set(cv2.CAP_PROP_POS_MSEC, float(seconds) * 1000)
        picture = video.read()[1]
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def filled(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Scale and cut the centre to fill (width, height)."""
    h, w = picture.shape[:2]
    scale = max(size[0] / w, size[1] / h)
    picture = cv2.resize(
        picture, (max(size[0], round(w * scale)), max(size[1], round(h * scale))), interpolation=cv2.INTER_AREA
    )
    y, x = (picture.shape[0] - size[1]) // 2, (picture.shape[1] - size[0]) // 2
    return np.ascontiguousarray(picture[y : y + size[1], x : x + size[0]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("pictures", nargs="*")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--styles", nargs="+")
    parser.add_argument(
        "--set", dest="settings", nargs="*", default=[], metavar="KEY=VALUE", help="of the style section"
    )
    args = parser.parse_args()
    size = (round(TILE[0] * SCALE / 8) * 8, round(TILE[1] * SCALE / 8) * 8)
    pictures = [filled(p, size) for p in ([read(n) for n in args.pictures] or shipped())]
    stylizer = load(args.model, size)
    listed = json.loads((MODELS["mini"].folder / "styles.json").read_text())["styles"]
    rows = [pictures]
    for prompt in args.styles or [names[0] for names in listed.values()]:
        settings = dict(pair.split("=", 1) for pair in args.settings)
        params = Params(style=Style.model_validate({"prompt": prompt, **settings}))
        state = stylizer.open(params)
        rows.append([stylizer.step(state, p, params).image() for p in pictures])
    small = [[cv2.resize(p, TILE, interpolation=cv2.INTER_AREA) for p in row] for row in rows]
    for row, label in zip(small[1:], args.styles or [n[0] for n in listed.values()], strict=True):
        cv2.putText(row[0], label, (8, TILE[1] - 10), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.putText(row[0], label, (8, TILE[1] - 10), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
    sheet = np.vstack([np.hstack(row) for row in small])
    cv2.imwrite(str(args.output), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])


if __name__ == "__main__":
    main()
