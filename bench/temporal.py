"""How steady the picture is, and what steadying it costs: the refiner against known flicker, the modes against time.

Three questions, each on the same source frames and the same stylized pictures:

flicker   the fixed-seed result with the settings' `debug.flicker` added: how much of it goes, and does the clean
          picture come back? Blur of the same E_warp stands beside it: it must lose on detail.
seeds     another noise for every frame (`style.seed_mode=per-frame`), which makes a diffusion model flicker by itself.
modes     a quarter of the frames diffused (cadence 4), and keys that come `KEY_MS` after their frame (reproject): how
          far what is shown is from diffusing every frame, against holding the last key.

E_warp is Lai's and DVP Lei's short-term error, both × 10³, along the source's own motion; tOF is taken of the first
`FLOWS` frames, SSIM of every `SAMPLED`th. See `bench.metrics`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from accel.errors import UserError
from bench import metrics, record
from models.flow import Dis
from models.lane import FrameLane, frame_lane
from models.params import Params, Temporal
from models.stylizer import Stylizer
from models.temporal import flickered
from stream.config import patched
from stream.source import open_source

Picture = NDArray[np.uint8]
Clip = list[Picture]

KEY_MS = 500.0  # a key's age on arrival in the third question, and the time to the next
STRIP = 6  # pictures side by side
REFINERS = ("analytic", "learned")
SAMPLED = 8
FLOWS = 16
COMPARED = {  # of a row: its name, unit, and which is better, for `bench.compare`
    "ratio": ("E_warp left", "of 1", "lower"),
    "psnr": ("PSNR", "dB", "higher"),
}
BLURS = (0.4, 6.0)  # σ searched for the blur of equal E_warp, pixels


@dataclass(frozen=True, slots=True)
class Scene:
    """A clip with its motion, and what it is stylized to."""

    name: str
    source: Clip
    fps: float
    motion: tuple[metrics.Pair, ...]
    flows: list[NDArray[np.float32]]  # tOF's own, of the first FLOWS frames
    stylized: Clip  # every frame, fixed seed

    @property
    def late(self) -> int:
        """Frames that pass until a key arrives."""
        return max(1, round(KEY_MS * self.fps / 1000))


def measure(
    sources: Sequence[str],
    model: str = "mini",
    engine: str = "auto",
    size: tuple[int, int] = (512, 288),
    frames: int = 96,
    prompt: str = "oil painting",
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The report of all three questions on the first `frames` of every source. Raises UserError for a bad source."""
    if frames < 2:
        raise UserError("steadiness needs at least two frames", hint="--frames 96")
    started = record.start()
    flicker: list[dict[str, Any]] = []
    seeds: list[dict[str, Any]] = []
    modes: list[dict[str, Any]] = []
    strips: list[dict[str, Any]] = []
    stylizers: dict[tuple[int, int], Stylizer] = {}
    for url in sources:
        scene = _scene(url, model, engine, size, frames, prompt, stylizers, log)
        log(f"{scene.name}: {len(scene.source)} frames")
        shaken = [flickered(picture, 1.0) for picture in scene.stylized]
        reseeded = _stylize(stylizers, scene.source, patched(_params(prompt), {"style.seed_mode": "per-frame"}))
        rows = _steadied(scene, shaken)
        flicker += [_row(scene, name, clip, shaken, clean=True) for name, clip in rows.items()]
        flicker.append(_row(scene, "identity", scene.source, shaken, clean=True))
        seeds += [_row(scene, name, clip, reseeded) for name, clip in _steadied(scene, reseeded, blur=False).items()]
        shown = _late(scene)
        modes += [_late_row(scene, name, clip) for name, clip in shown.items()]
        strips.append(_strip(scene, {"source": scene.source, "frame-wise": shaken, **rows, **shown}))
    told = [record.source_of(url) for url in sources]
    work: dict[str, Any] = {**record.model_of(model), "sources": told, "size": f"{size[0]}x{size[1]}"}
    work |= {"frames": frames, "prompt": prompt}
    report = _report(model, size, frames, prompt, flicker, seeds, modes, strips)
    return record.record("temporal", started, work, _lanes(report["results"]), report)


def _params(prompt: str) -> Params:
    return patched(Params(), {"style.prompt": prompt, "temporal.mode": "every-frame", "temporal.refiner": "off"})


def _scene(
    url: str,
    model: str,
    engine: str,
    size: tuple[int, int],
    frames: int,
    prompt: str,
    stylizers: dict[tuple[int, int], Stylizer],
    log: Callable[[str], None],
) -> Scene:
    from models.load import load

    opened = open_source(url, size=size)
    try:
        source = [frame.image for frame in islice(opened.frames(), frames)]
        fps = opened.spec.fps
    finally:
        opened.close()
    if len(source) < 2:
        raise UserError(f"{url}: fewer than two frames", hint="choose a longer clip")
    shape = (source[0].shape[1], source[0].shape[0])
    if shape not in stylizers:
        stylizers[shape] = load(model, shape, engine, log)
    name = url.rpartition("/")[2].rpartition(".")[0] or url
    motion = tuple(metrics.pairs(source, Dis(finest=0)))
    flows = metrics.farneback(source[:FLOWS])
    return Scene(name, source, fps, motion, flows, _stylize(stylizers, source, _params(prompt)))


def _stylize(stylizers: dict[tuple[int, int], Stylizer], source: Clip, params: Params) -> Clip:
    stylizer = stylizers[source[0].shape[1], source[0].shape[0]]
    state = stylizer.open(params)
    stylized = (stylizer.step(state, picture, params).image() for picture in source)
    return [picture for picture in stylized if picture is not None]


def _lane(refiner: str, scene: Scene) -> FrameLane:
    height, width = scene.source[0].shape[:2]
    return frame_lane(Temporal.model_validate({"refiner": refiner}), (width, height))


def _steadied(scene: Scene, pictures: Clip, *, blur: bool = True) -> dict[str, Clip]:
    """The clip as it is, and by every means of steadying it."""
    out = {"frame-wise": pictures}
    for refiner in REFINERS:
        lane = _lane(refiner, scene)
        out[refiner] = list(_every_frame(lane, scene.source, pictures))
    if blur:
        out["blur of equal E_warp"] = _equal_blur(scene, pictures, metrics.e_warp(out["analytic"], scene.motion))
    return out


def _every_frame(lane: FrameLane, source: Clip, pictures: Clip) -> Iterator[Picture]:
    for now, stylized in zip(source, pictures, strict=True):
        lane.advance(now)
        lane.answer(lane.ask(), stylized)
        yield lane.show()


def _equal_blur(scene: Scene, pictures: Clip, wanted: float) -> Clip:
    """Gaussian blur that comes to the same E_warp, or the strongest tried."""
    low, high = BLURS
    for _ in range(6):
        sigma = (low + high) / 2
        low, high = (sigma, high) if metrics.e_warp(_blurred(pictures, sigma), scene.motion) > wanted else (low, sigma)
    return _blurred(pictures, high)


def _blurred(pictures: Clip, sigma: float) -> Clip:
    return [np.asarray(cv2.GaussianBlur(picture, (0, 0), sigma), np.uint8) for picture in pictures]


def _late(scene: Scene) -> dict[str, Clip]:
    """What is shown when few frames are diffused, from the first late key's arrival on."""
    lane, quarter = _lane("analytic", scene), []
    for index, (picture, stylized) in enumerate(zip(scene.source, scene.stylized, strict=True)):
        lane.advance(picture)
        if index % 4 == 0:
            lane.answer(lane.ask(), stylized, 4)
        quarter.append(lane.show())
    out: dict[str, Clip] = {"hold the last key": [], "cadence 4": quarter[scene.late :]}
    for index in range(scene.late, len(scene.source)):
        out["hold the last key"].append(scene.stylized[(index // scene.late - 1) * scene.late])
    out["reproject"] = list(_reprojected(scene, "off"))
    out["reproject, refined"] = list(_reprojected(scene, "analytic"))
    return out


def _reprojected(scene: Scene, refiner: str) -> Iterator[Picture]:
    from stream.clocks import FADE

    lane, track = _lane(refiner, scene), None
    for index, picture in enumerate(scene.source):
        lane.advance(picture)
        if index % scene.late == 0:
            if track:
                lane.answer(track, scene.stylized[index - scene.late], FADE)
            track = lane.ask()
        if lane.ready:
            yield lane.show()


def _row(scene: Scene, name: str, clip: Clip, unsteady: Clip, *, clean: bool = False) -> dict[str, Any]:
    """One clip's figures; `clean`: the fixed-seed result is what the clip should be."""
    e_warp, before = metrics.e_warp(clip, scene.motion), metrics.e_warp(unsteady, scene.motion)
    target = scene.stylized if clean else unsteady
    return {
        "clip": scene.name,
        "what": name,
        "e_warp": 1e3 * e_warp,
        "ratio": e_warp / before if before else None,
        "psnr": metrics.psnr(clip, scene.stylized) if clean else None,
        "hf_ratio": metrics.hf_ratio(clip, target),
        "dvp": 1e3 * metrics.dvp_short(clip, scene.motion),
        "t_of": metrics.t_of(clip[:FLOWS], scene.flows),
        "static": 255 * metrics.static_flicker(clip, scene.source, scene.motion),
        "ssim": metrics.ssim(clip[::SAMPLED], target[::SAMPLED]),
    }


def _late_row(scene: Scene, name: str, clip: Clip) -> dict[str, Any]:
    truth = scene.stylized[-len(clip) :]
    return {
        "clip": scene.name,
        "what": name,
        "psnr": metrics.psnr(clip, truth),
        "e_warp": 1e3 * metrics.e_warp(clip, scene.motion[-len(clip) + 1 :]),
        "hf_ratio": metrics.hf_ratio(clip, truth),
        "ssim": metrics.ssim(clip[::SAMPLED], truth[::SAMPLED]),
    }


def _strip(scene: Scene, clips: dict[str, Clip]) -> dict[str, Any]:
    """Consecutive pictures from the last third, a row per variant."""
    rows = []
    for name, clip in clips.items():
        start = len(clip) - max(STRIP, len(scene.source) // 3)
        pictures = [cv2.resize(p, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for p in clip[start:][:STRIP]]
        ok, jpeg = cv2.imencode(".jpg", np.concatenate(pictures, 1)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
        assert ok
        rows.append({"label": name, "image": base64.b64encode(jpeg.tobytes()).decode()})
    return {"kind": "pictures", "title": f"{scene.name}: {STRIP} frames in a row", "rows": rows}


def _lanes(results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """A lane for every question and variant, a block for every clip."""
    lanes: dict[str, dict[str, Any]] = {}
    for part, rows in results.items():
        for what in dict.fromkeys(row["what"] for row in rows):
            mine = [row for row in rows if row["what"] == what]
            found = {
                name: [[row[key]] for row in mine if row.get(key) is not None] for key, (name, *_) in COMPARED.items()
            }
            lanes[f"{part}: {what}"] = {
                name: record.metric(unit, better, found[name])
                for name, unit, better in COMPARED.values()
                if found[name]
            }
    return lanes


def _report(
    model: str,
    size: tuple[int, int],
    frames: int,
    prompt: str,
    flicker: list[dict[str, Any]],
    seeds: list[dict[str, Any]],
    modes: list[dict[str, Any]],
    strips: list[dict[str, Any]],
) -> dict[str, Any]:
    summary = f"{model}, “{prompt}”, up to {frames} frames of each clip in {size[0]}x{size[1]}"
    return {
        "title": "Steadiness",
        "summary": summary,
        "results": {"flicker": flicker, "seeds": seeds, "modes": modes},
        "sections": [
            _table("Known flicker", "PSNR to the clean result; detail against it", flicker),
            _bars("Known flicker: what is left of E_warp", flicker, "ratio"),
            _table("A fresh seed per frame", "detail against the same frames unrefined", seeds),
            _table(
                "Modes", f"against diffusing every frame; keys of hold and reproject come {KEY_MS:.0f} ms late", modes
            ),
            _bars("Modes: PSNR to every frame diffused, dB", modes, "psnr"),
            *strips,
        ],
    }


def _table(title: str, note: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = list(rows[0])
    cells = [[_short(row[column]) for column in columns] for row in rows + _means(rows)]
    return {"kind": "table", "title": title, "note": note, "columns": columns, "rows": cells}


def _bars(title: str, rows: list[dict[str, Any]], column: str) -> dict[str, Any]:
    groups = [
        {"label": clip, "bars": [{"label": r["what"], "value": r[column]} for r in rows if r["clip"] == clip]}
        for clip in dict.fromkeys(row["clip"] for row in rows)
    ]
    return {"kind": "bars", "title": title, "unit": "", "groups": groups}


def _means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean over clips of each variant."""
    out = []
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        mean = {k: _mean([row[k] for row in mine]) for k in mine[0] if k not in ("clip", "what")}
        out.append({"clip": "mean", "what": what, **mean})
    return out


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _short(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value
