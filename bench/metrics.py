"""What a stylized clip is measured by: steadiness along the source's motion, sharpness, and fidelity.

A clip is a sequence of pictures (H, W, 3) RGB, either uint8 in 0–255 or float in [0, 1]; both give the same figure.
Flows are the project's backward flows, in pixels, x then y: `estimator(now, before)` leads from each pixel of the first
picture to where it is found in the second. The source's motion is worked out once and serves every variant of it:

    motion = tuple(pairs(source, flow_estimator("raft")))
    for output in variants:
        print(e_warp(output, motion), hf_log_ratio(output, source))

Warp and mask are written out here, in full bilinear precision, and not borrowed from `models`: a yardstick must not
change when the thing it measures does. Report the source itself (identity) and a blurred output beside every result: a
blur lowers every error over time, and only the sharpness figures tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from accel.errors import UserError

if TYPE_CHECKING:
    from models.flow import FlowEstimator

Picture = NDArray[np.uint8] | NDArray[np.floating[Any]]  # (H, W, 3) RGB, 0–255 or [0, 1]
Clip = Sequence[Picture]

FARNEBACK = (0.5, 3, 15, 3, 5, 1.2, 0)  # TecoGAN: pyramid scale, levels, window, iterations, poly_n, poly_sigma, flags
STILL = 0.5  # px per frame: slower pixels of the source count as still
QUIET = 2.5 / 255  # and so do those whose channels change by less; between two levels of uint8, so rounding is harmless


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """How the source moved between an earlier and a later frame.

    A mask is on the grid of the flow it goes with and true where both flows agree that the pixel is seen in both.
    18 bytes a pixel: 2.7 MB at 512x288.
    """

    forward: Tensor  # (1, 2, H, W) px: earlier(p) is found at later(p + forward(p))
    backward: Tensor  # (1, 2, H, W) px: later(p) is found at earlier(p + backward(p))
    forward_mask: Tensor  # (1, 1, H, W) bool
    backward_mask: Tensor  # (1, 1, H, W) bool


def pairs(source: Clip, estimator: FlowEstimator) -> Iterator[Pair]:
    """The motion between neighbouring source frames, T - 1 pairs, each worked out when it is asked for."""
    return (_pair(earlier, later, estimator) for earlier, later in pairwise(source))


def long_pairs(source: Clip, estimator: FlowEstimator) -> Iterator[Pair]:
    """The motion between the first source frame and every later one, T - 1 pairs, each worked out when asked for."""
    return (_pair(source[0], later, estimator) for later in source[1:])


def visible(flow: Tensor, back: Tensor) -> Tensor:
    """Where the flow can be believed, (1, 1, H, W) bool, on the grid of `flow`; `back` is the flow the other way.

    With B = flow and Fw = back warped by it, px, a pixel is left out where |Fw + B|² > .01 (|Fw|² + |B|²) + .5
    (occluded), where |∇u|² + |∇v|² > .01 |B|² + .002 (boundary of a motion), as in Lai et al. 2018 (`detect_occlusion`
    of their code, after Ruder et al. 2016), and, which they omit, where it leads out of the picture.
    """
    warped = warp(back, flow)  # (1, 2, H, W)
    speed = _squared(flow)
    occluded = _squared(warped + flow) > 0.01 * (_squared(warped) + speed) + 0.5
    across = F.pad(flow.diff(dim=3), (0, 1))  # forward differences, none in the last column or row
    down = F.pad(flow.diff(dim=2), (0, 0, 0, 1))
    boundary = _squared(across) + _squared(down) > 0.01 * speed + 0.002
    place = _places(flow)  # (1, H, W, 2)
    inside = ((place >= 0) & (place <= _corner(flow))).all(3).unsqueeze(1)
    return inside & ~occluded & ~boundary


def warp(picture: Tensor, flow: Tensor, padding: str = "border") -> Tensor:
    """picture(p + flow(p)), bilinear; (1, C, H, W) and (1, 2, H, W) in px → (1, C, H, W)."""
    grid = 2 * _places(flow) / _corner(flow).clamp(min=1) - 1
    return F.grid_sample(picture, grid, mode="bilinear", padding_mode=padding, align_corners=True)


def e_warp(output: Clip, motion: Iterable[Pair]) -> float:
    """E_warp of Lai et al. 2018 ("Learning Blind Video Temporal Consistency"), usually printed × 10³.

    Frame t + 1 is warped to t; the mean of the squared difference, pictures in [0, 1], over the unmasked pixels and the
    three channels; then the mean over pairs. A pair that is masked wholly is left out (they count it as 0); with no
    pair left, nan.
    """
    errors = []
    for (earlier, later), pair in zip(pairwise(output), motion, strict=True):
        gap = _gap(earlier, later, pair.forward).square().mean(1, keepdim=True)
        errors.append(_mean_where(gap, pair.forward_mask))
    return _mean_known(errors)


def dvp_short(output: Clip, motion: Iterable[Pair]) -> float:
    """Mean over t of E_pair(t, t - 1) of Lei et al. 2020 ("… via Deep Video Prior"), the first half of their E_warp.

    E_pair(t, s) is the mean over the unmasked pixels of ||O_t - W(O_s)||₁: the *sum* of the three channels' absolute
    differences, pictures in [0, 1], on the grid of t. `motion` is that of `pairs`.
    """
    return _mean_known(
        [_e_pair(now, before, pair) for (before, now), pair in zip(pairwise(output), motion, strict=True)]
    )


def dvp_long(output: Clip, motion: Iterable[Pair]) -> float:
    """Mean over t of E_pair(t, 1), as `dvp_short`; their E_warp is the sum of both.

    `motion` is that of `long_pairs`: pass the iterator itself to hold one pair at a time, or a tuple of it to measure
    several variants.
    """
    return _mean_known([_e_pair(now, output[0], pair) for now, pair in zip(output[1:], motion, strict=True)])


def farneback(clip: Clip) -> list[NDArray[np.float32]]:
    """Flows t → t + 1 of a clip as TecoGAN's `tOF` takes them, T - 1 of (H, W, 2) px."""
    import cv2

    greys = [cv2.cvtColor(_bytes(picture), cv2.COLOR_RGB2GRAY) for picture in clip]
    # The stubs do not know that None lets it make its own array.
    return [cv2.calcOpticalFlowFarneback(a, b, None, *FARNEBACK) for a, b in pairwise(greys)]  # type: ignore[call-overload]


def t_of(output: Clip, flows: Sequence[NDArray[np.float32]]) -> float:
    """tOF of TecoGAN (Chu et al. 2020), px: mean length of the difference between two clips' Farneback flows.

    `flows` are those of the reference, `farneback(source)`. Every frame and pixel counts; their tool leaves out the
    first and last two frames and a border, so take no figure from there for comparison.
    """
    gaps = [np.linalg.norm(ours - theirs, axis=2).mean() for ours, theirs in zip(farneback(output), flows, strict=True)]
    return _mean([float(gap) for gap in gaps])


def static_flicker(output: Clip, source: Clip, motion: Iterable[Pair]) -> float:
    """Mean absolute change from frame to frame, in [0, 1], where the source stands still; nan where nothing does.

    Still is a pixel whose forward flow is shorter than `STILL` px and none of whose source channels changes by `QUIET`.
    All still pixels of the clip weigh the same. After VBench's temporal flickering (Huang et al. 2024, which reports
    1 minus this over whole pictures, for clips of static scenes).
    """
    total, count = 0.0, 0
    clips = zip(pairwise(output), pairwise(source), motion, strict=True)
    for (before, now), (source_before, source_now), pair in clips:
        flow = pair.forward
        change = (_tensor(source_now, flow) - _tensor(source_before, flow)).abs().amax(1, keepdim=True)
        mask = (_squared(flow) < STILL**2) & (change < QUIET)
        flicker = (_tensor(now, flow) - _tensor(before, flow)).abs().mean(1, keepdim=True)
        total += float(flicker[mask].sum(dtype=torch.float64))
        count += int(mask.sum())
    return total / count if count else math.nan


def hf_ratio(output: Clip, reference: Clip) -> float:
    """Fine detail of a clip relative to a reference, by mean |Laplacian| of luma; below 1 is softer.

    The reference is the source, or the raw stylized clip where a refiner is judged. The Laplacian, not Sobel: it rises
    up to the finest detail, which repeated resampling takes first, where Sobel's own smoothing is blind to it, and it
    ignores shading. Noise counts as detail too, so a steadied clip may fall below 1 without being blurred.
    """
    details = [(_detail(a), _detail(b)) for a, b in zip(output, reference, strict=True)]
    ours, theirs = (math.fsum(column) for column in zip(*details, strict=True))
    if theirs == 0:
        return 1.0 if ours == 0 else math.inf
    return ours / theirs


def hf_log_ratio(output: Clip, reference: Clip) -> float:
    """Natural logarithm of `hf_ratio`: 0 for the same sharpness, negative for a blur, -inf for flat pictures.

    The guard against gaming E_warp by smoothing; the idea is dreamlite-stream's, the measure of detail ours.
    """
    ratio = hf_ratio(output, reference)
    return math.log(ratio) if ratio > 0 else -math.inf


def psnr(output: Clip, reference: Clip) -> float:
    """Peak signal-to-noise ratio, dB, from the squared error of the whole clip; inf where both are the same.

    Not the mean of the frames' PSNR, which a single untouched frame would make infinite; so averages FFmpeg's `psnr`
    filter too.
    """
    error = _mean([float(np.square(_floats(a) - _floats(b)).mean()) for a, b in zip(output, reference, strict=True)])
    return -10 * math.log10(error) if error else math.inf


def ssim(output: Clip, reference: Clip) -> float:
    """Structural similarity, at most 1, mean over channels and frames, with the Gaussian window of Wang et al. 2004."""
    from skimage.metrics import structural_similarity

    settings: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return _mean(
        [
            float(structural_similarity(_floats(a), _floats(b), channel_axis=2, data_range=1.0, **settings))  # type: ignore[no-untyped-call]
            for a, b in zip(output, reference, strict=True)
        ]
    )


@dataclass(frozen=True, slots=True, eq=False)
class Embedder:
    """A CLIP model (Radford et al. 2021) and what prepares its inputs; every embedding has unit length."""

    model: Any
    prepare: Any
    tokenizer: Any

    @torch.no_grad()
    def pictures(self, clip: Clip) -> Tensor:
        """(T, D); each picture scaled and cropped to the middle square as CLIP has it, from its uint8 form."""
        ready = (self.prepare(_bytes(picture), return_tensors="pt").pixel_values for picture in clip)
        return F.normalize(torch.cat([self.model.get_image_features(image).pooler_output for image in ready]))

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """(1, D); words beyond CLIP's 77 tokens are dropped."""
        tokens = self.tokenizer([prompt], truncation=True, return_tensors="pt")
        return F.normalize(self.model.get_text_features(**tokens).pooler_output)


def load_clip(folder: Path) -> Embedder:
    """CLIP from a local folder in transformers' layout, such as a copy of openai/clip-vit-base-patch32.

    Nothing is fetched. Raises UserError where the folder holds no whole CLIP model.
    """
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    hint = "give a folder with config.json, weights, tokenizer and preprocessor_config.json of a CLIPModel"
    if not (folder / "config.json").is_file():
        raise UserError(f"no CLIP model in {folder}", hint=hint)
    try:
        loaded: Any = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        prepare = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise UserError(f"no whole CLIP model in {folder}: {error}", hint=hint) from error
    model, found = loaded
    missing = found["missing_keys"]
    if missing:  # transformers makes them up, and a figure from random weights looks like any other
        raise UserError(f"{len(missing)} weights are missing from the CLIP model in {folder}", hint=hint)
    return Embedder(model.eval(), prepare, tokenizer)


def clip_frame(frames: Tensor) -> float:
    """CLIP frame consistency, at most 100: 100 × the mean cosine of neighbouring frames' embeddings (T, D)."""
    return _mean((100 * (frames[:-1] * frames[1:]).sum(1)).tolist())


def clip_text(frames: Tensor, text: Tensor) -> float:
    """CLIP text score, at most 100: 100 × the mean cosine of the frames' embeddings (T, D) with the prompt's (1, D)."""
    return _mean((100 * (frames * text).sum(1)).tolist())


def compat_streamv2v_wraparound_error(output: Clip, motion: Iterable[Pair]) -> float:
    """The figure StreamV2V's `warp_error.py` prints, mistakes and all: only to be set beside their published ones.

    Not an error in any unit. They subtract uint8 arrays, so every small negative difference counts as about 255, and
    unbiased noise of any strength tends to 128. Moreover frame t is warped onto frame t + 1 but masked on t's own grid,
    by another test (lengths, not squares; no boundaries), and what leaves the picture is compared with black. Use
    `e_warp`.
    """
    import cv2

    errors = []
    for (before, now), pair in zip(pairwise(output), motion, strict=True):
        places = _places(pair.backward)[0].float().cpu().numpy()
        warped = cv2.remap(_bytes(before), places, None, cv2.INTER_LINEAR)  # type: ignore[call-overload]
        wrapped = torch.from_numpy(warped - _bytes(now)).permute(2, 0, 1)[None]  # (1, 3, H, W) uint8, modulo 256
        undone = pair.forward + warp(pair.backward, pair.forward, padding="zeros")
        length = _squared(pair.forward).sqrt() + _squared(pair.backward).sqrt()
        kept = _squared(undone).sqrt() <= 0.01 * length + 0.5
        errors.append(_mean_where(wrapped.float().mean(1, keepdim=True), kept.cpu()))
    return _mean_known(errors)


@torch.no_grad()
def _pair(earlier: Picture, later: Picture, estimator: FlowEstimator) -> Pair:
    a, b = _tensor(earlier), _tensor(later)
    forward, backward = estimator(a, b), estimator(b, a)
    return Pair(forward, backward, visible(forward, backward), visible(backward, forward))


def _e_pair(now: Picture, before: Picture, pair: Pair) -> float:
    gap = _gap(now, before, pair.backward).abs().sum(1, keepdim=True)
    return _mean_where(gap, pair.backward_mask)


def _gap(here: Picture, there: Picture, flow: Tensor) -> Tensor:
    return warp(_tensor(there, flow), flow) - _tensor(here, flow)


def _detail(picture: Picture) -> float:
    grey = _floats(picture) @ np.array([0.299, 0.587, 0.114])  # BT.601
    across = grey[1:-1, 2:] + grey[1:-1, :-2]
    down = grey[2:, 1:-1] + grey[:-2, 1:-1]
    return float(np.abs(across + down - 4 * grey[1:-1, 1:-1]).mean())


def _places(flow: Tensor) -> Tensor:
    """p + flow(p), (1, H, W, 2) px, x then y."""
    height, width = flow.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return flow.permute(0, 2, 3, 1) + torch.stack([x, y], 2).to(flow)


def _corner(flow: Tensor) -> Tensor:
    return flow.new_tensor([flow.shape[3] - 1, flow.shape[2] - 1])


def _squared(flow: Tensor) -> Tensor:
    return flow.square().sum(1, keepdim=True)


def _mean_where(values: Tensor, mask: Tensor) -> float:
    return float(values[mask].mean(dtype=torch.float64))  # of nothing: nan


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _mean_known(values: Sequence[float]) -> float:
    return _mean([value for value in values if not math.isnan(value)])


def _floats(picture: Picture) -> NDArray[np.float64]:
    """The picture in [0, 1]. Raises ValueError for another shape, or floats that are not in [0, 1]."""
    if picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a picture is (H, W, 3), not {picture.shape}")
    if picture.dtype == np.uint8:
        return picture / np.float64(255)
    if not (picture.min() >= 0 and picture.max() <= 1):
        raise ValueError(f"a float picture is in [0, 1], not in [{picture.min():g}, {picture.max():g}]")
    return picture.astype(np.float64)


def _bytes(picture: Picture) -> NDArray[np.uint8]:
    if picture.dtype != np.uint8:
        picture = (_floats(picture) * 255).round()
    return np.ascontiguousarray(picture, np.uint8)


def _tensor(picture: Picture, flow: Tensor | None = None) -> Tensor:
    """(1, 3, H, W) float32 in [0, 1]; where `flow` is, and of its size."""
    if flow is not None and picture.shape[:2] != flow.shape[2:]:
        raise ValueError(f"a picture of {picture.shape[:2]} and a flow of {tuple(flow.shape[2:])}")
    pixels = np.ascontiguousarray(_floats(picture).transpose(2, 0, 1), np.float32)
    tensor = torch.from_numpy(pixels)[None]
    return tensor if flow is None else tensor.to(flow.device)
