"""Training pictures: square tiles of photographs and clip frames, each rendered once by every painter.

    python -m models.training.tiles --photos DIR --clips DIR --work DIR

Writes memory-mapped arrays to the work folder: `{split}_photo.npy` (N, 384, 384, 3) uint8 and, per painter,
`{split}_NAME.npy` (default strokes) and `{split}_NAME_alt.npy` (bold strokes for even tiles, fine ones for odd).
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from models.training.painters import PAINTERS

TILE = 384  # pixels; a multiple of the 8-pixel grid
BOLD, FINE = 1.7, 0.6  # stroke thickness of the `_alt` renderings
HELD_OUT_CLIPS = ("webcam_two_people.mp4", "dog_fetch.mp4", "city_pan_60fps.mp4")
FRAMES_PER_CLIP = 24


def tiles_of(picture: NDArray[np.uint8], short_side: int, most: int) -> list[NDArray[np.uint8]]:
    """Evenly spread square tiles of an RGB picture scaled to the given short side."""
    h, w = picture.shape[:2]
    scale = short_side / min(h, w)
    shrinks = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    picture = cv2.resize(picture, (max(TILE, round(w * scale)), max(TILE, round(h * scale))), interpolation=shrinks)
    room_y, room_x = picture.shape[0] - TILE, picture.shape[1] - TILE
    steps = np.linspace(0, 1, most) if most > 1 and room_x + room_y > TILE // 3 else [0.5]
    return [
        np.ascontiguousarray(picture[(y := int(s * room_y)) : y + TILE, (x := int(s * room_x)) : x + TILE])
        for s in steps
    ]


def photo_tiles(photos: Path, split: str) -> list[NDArray[np.uint8]]:
    """Tiles of every photograph of a split, at two scales."""
    items = json.loads((photos / "manifest.json").read_text())["items"]
    out: list[NDArray[np.uint8]] = []
    for item in sorted(items, key=lambda i: i["name"]):
        if item["split"] == split:
            picture = cv2.cvtColor(cv2.imread(str(photos / item["name"])), cv2.COLOR_BGR2RGB)
            out += (
                tiles_of(picture, TILE, 1) if split == "val" else tiles_of(picture, TILE, 1) + tiles_of(picture, 560, 2)
            )
    return out


def clip_tiles(clips: Path) -> list[NDArray[np.uint8]]:
    """Tiles of evenly spaced frames of the training clips."""
    out: list[NDArray[np.uint8]] = []
    for path in sorted(p for p in clips.iterdir() if p.suffix in {".mp4", ".mkv"} and p.name not in HELD_OUT_CLIPS):
        video = cv2.VideoCapture(str(path))
        total = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        wanted = set(np.linspace(0, total - 2, FRAMES_PER_CLIP).astype(int).tolist())
        for i in range(total):
            ok, frame = video.read()
            if not ok:
                break
            if i in wanted:
                out += tiles_of(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), TILE, 1)
    return out


def _render(job: tuple[str, str, str]) -> str:
    """Paint every tile of a split with one painter; both stroke widths."""

    work, split, name = job
    cv2.setNumThreads(1)
    tiles = np.load(Path(work) / f"{split}_photo.npy", mmap_mode="r")
    for suffix, widths in (("", (1.0, 1.0)), ("_alt", (BOLD, FINE))):
        path = Path(work) / f"{split}_{name}{suffix}.npy"
        out = np.lib.format.open_memmap(path.with_suffix(".part"), mode="w+", dtype=np.uint8, shape=tiles.shape)
        for i, tile in enumerate(tiles):
            painted = PAINTERS[name](tile.astype(np.float32) / 255, thickness=widths[i % 2])
            out[i] = np.round(painted.clip(0, 1) * 255).astype(np.uint8)
        out.flush()
        path.with_suffix(".part").rename(path)
    return f"{split} {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--photos-only", action="store_true", help="stop before painting")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for split in ("val", "train"):
        tiles = photo_tiles(args.photos, split) + (clip_tiles(args.clips) if split == "train" else [])
        np.save(args.work / f"{split}_photo.npy", np.stack(tiles))
        print(f"{split}: {len(tiles)} tiles", flush=True)
    if not args.photos_only:
        jobs = [(str(args.work), split, name) for split in ("val", "train") for name in PAINTERS if name != "photo"]
        with ProcessPoolExecutor() as pool:
            for done in pool.map(_render, jobs):
                print("painted", done, flush=True)


if __name__ == "__main__":
    main()
