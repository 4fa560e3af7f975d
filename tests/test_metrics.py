"""Each measure of a clip against an answer that can be worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from accel.errors import UserError
from bench import metrics
from bench.metrics import Clip, Pair

H, W = 48, 64
STEP = (3, -2)  # px per frame, x then y, of the sliding clip


def noise(sigma: float, frames: int = 4, size: tuple[int, int] = (H, W), level: float = 0.5) -> list[Any]:
    """Grey under independent Gaussian noise."""
    random = np.random.default_rng(0)
    return [level + sigma * random.standard_normal((*size, 3)) for _ in range(frames)]


def texture(size: tuple[int, int] = (H, W), blur: float = 1.0) -> Any:
    """A picture with detail everywhere, in [0, 1]."""
    grain = cv2.GaussianBlur(np.random.default_rng(1).random((*size, 3)), (0, 0), blur)
    return (grain - grain.min()) / (grain.max() - grain.min())


def sliding(frames: int = 4, step: tuple[int, int] = STEP, blur: float = 1.0) -> list[Any]:
    """A window that moves over a texture by `step` px per frame."""
    margin = 16
    wide = texture((H + 2 * margin, W + 2 * margin), blur)
    corners = [(margin + t * step[1], margin + t * step[0]) for t in range(frames)]
    return [wide[y : y + H, x : x + W].copy() for y, x in corners]


def tensor(picture: Any) -> Tensor:
    return torch.tensor(picture, dtype=torch.float32).permute(2, 0, 1)[None]


def constant(dx: float, dy: float, size: tuple[int, int] = (H, W)) -> Tensor:
    return torch.tensor([float(dx), float(dy)]).view(1, 2, 1, 1).expand(1, 2, *size).contiguous()


def standing(now: Tensor, before: Tensor) -> Tensor:
    """The flow of a clip in which nothing moves."""
    return constant(0, 0, (now.shape[2], now.shape[3]))


class Slide:
    """The exact flow of a sliding clip: it knows each frame's number."""

    def __init__(self, source: Clip, step: tuple[int, int] = STEP) -> None:
        self.frames = [tensor(picture) for picture in source]
        self.step = step
        self.calls = 0

    def __call__(self, now: Tensor, before: Tensor) -> Tensor:
        self.calls += 1
        apart = self._number(now) - self._number(before)
        return constant(self.step[0] * apart, self.step[1] * apart)

    def _number(self, picture: Tensor) -> int:
        return next(n for n, frame in enumerate(self.frames) if torch.allclose(frame, picture, atol=1e-3))


def still_pairs(source: Clip) -> tuple[Pair, ...]:
    return tuple(metrics.pairs(source, standing))


def brightness(*levels: float) -> list[Any]:
    return [np.full((H, W, 3), level) for level in levels]


def rounded(clip: Clip) -> list[Any]:
    return [np.clip(np.round(picture * 255.0), 0, 255).astype(np.uint8) for picture in clip]


def test_clip_that_never_changes_scores_zero() -> None:
    clip = [texture()] * 3
    motion = still_pairs(clip)
    assert metrics.e_warp(clip, motion) == pytest.approx(0, abs=1e-12)
    assert metrics.dvp_short(clip, motion) == pytest.approx(0, abs=1e-6)
    assert metrics.dvp_long(clip, metrics.long_pairs(clip, standing)) == pytest.approx(0, abs=1e-6)
    assert metrics.static_flicker(clip, clip, motion) == 0
    assert metrics.t_of(clip, metrics.farneback(clip)) == 0
    assert metrics.compat_streamv2v_wraparound_error(clip, motion) == 0


def test_sliding_clip_under_its_exact_flow_scores_zero() -> None:
    clip = sliding()
    flow = Slide(clip)
    motion = tuple(metrics.pairs(clip, flow))
    assert metrics.e_warp(clip, motion) == pytest.approx(0, abs=1e-9)
    assert metrics.dvp_short(clip, motion) == pytest.approx(0, abs=1e-4)
    assert metrics.dvp_long(clip, metrics.long_pairs(clip, flow)) == pytest.approx(0, abs=1e-4)
    assert metrics.e_warp(clip, still_pairs(clip)) > 1e-3  # and not without the flow


def test_only_what_leaves_the_picture_is_masked_in_a_sliding_clip() -> None:
    clip = sliding(2)
    (pair,) = metrics.pairs(clip, Slide(clip))
    assert pair.forward[0, :, 0, 0].tolist() == [
        -3,
        2,
    ]  # the window goes right and up, so what it sees goes left and down
    assert pair.backward[0, :, 0, 0].tolist() == [3, -2]
    expected = np.zeros((H, W), bool)
    expected[: H - 2, 3:] = True
    np.testing.assert_array_equal(pair.forward_mask[0, 0].numpy(), expected)
    np.testing.assert_array_equal(pair.backward_mask[0, 0].numpy(), expected[::-1, ::-1])


@pytest.mark.parametrize("sigma", [0.02, 0.1])
def test_independent_noise_has_e_warp_of_twice_its_variance(sigma: float) -> None:
    clip = noise(sigma, size=(96, 128))
    motion = still_pairs(clip)
    assert metrics.e_warp(clip, motion) == pytest.approx(2 * sigma**2, rel=0.03)
    mean_change = 2 * sigma / math.sqrt(math.pi)
    assert metrics.static_flicker(clip, [clip[0]] * 4, motion) == pytest.approx(mean_change, rel=0.03)
    assert metrics.dvp_short(clip, motion) == pytest.approx(3 * mean_change, rel=0.03)


def test_brightness_that_pumps_gives_its_square_and_drift_shows_in_the_long_run_only() -> None:
    pumping, drifting = brightness(0.5, 0.6, 0.5, 0.6, 0.5), brightness(0.1, 0.2, 0.3, 0.4, 0.5)
    motion = still_pairs(pumping)
    assert metrics.e_warp(pumping, motion) == pytest.approx(0.1**2, rel=1e-5)
    assert metrics.e_warp(drifting, motion) == pytest.approx(0.1**2, rel=1e-5)
    assert metrics.dvp_short(pumping, motion) == pytest.approx(3 * 0.1, rel=1e-5)
    assert metrics.dvp_short(drifting, motion) == pytest.approx(3 * 0.1, rel=1e-5)
    long = tuple(metrics.long_pairs(pumping, standing))
    assert metrics.dvp_long(pumping, long) == pytest.approx(3 * 0.05, rel=1e-5)
    assert metrics.dvp_long(drifting, long) == pytest.approx(3 * 0.25, rel=1e-5)


MEASURES: dict[str, Callable[[Clip, Clip, tuple[Pair, ...]], float]] = {
    "e_warp": lambda output, source, motion: metrics.e_warp(output, motion),
    "dvp_short": lambda output, source, motion: metrics.dvp_short(output, motion),
    "dvp_long": lambda output, source, motion: metrics.dvp_long(output, motion),
    "t_of": lambda output, source, motion: metrics.t_of(output, metrics.farneback(source)),
    "static_flicker": metrics.static_flicker,
    "hf_ratio": lambda output, source, motion: metrics.hf_ratio(output, source),
    "hf_log_ratio": lambda output, source, motion: metrics.hf_log_ratio(output, source),
    "psnr": lambda output, source, motion: metrics.psnr(output, source),
    "ssim": lambda output, source, motion: metrics.ssim(output, source),
    "compat": lambda output, source, motion: metrics.compat_streamv2v_wraparound_error(output, motion),
}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bytes_and_floats_give_the_same_figure(name: str, dtype: Any) -> None:
    output, source = rounded(noise(0.1, 3)), rounded(sliding(3, (0, 0)))
    half = [constant(0.25, -0.25), constant(-0.25, 0.25)]  # below the limit of what counts as still
    pair = Pair(*half, metrics.visible(*half), metrics.visible(*half[::-1]))
    as_floats = [[picture.astype(dtype) / dtype(255) for picture in clip] for clip in (output, source)]
    figure = MEASURES[name](output, source, (pair, pair))
    assert figure not in (0, math.inf)
    assert MEASURES[name](*as_floats, (pair, pair)) == pytest.approx(figure, rel=1e-5)


def test_pictures_may_be_read_only_views() -> None:
    views = [picture[:, ::-1] for picture in rounded(noise(0.1, 2))]
    for picture in views:
        picture.flags.writeable = False
    copies = [picture.copy() for picture in views]
    source = [copies[0]] * 2
    for measure in MEASURES.values():
        assert measure(views, source, still_pairs(views)) == measure(copies, source, still_pairs(copies))


def test_floats_are_rounded_where_a_measure_wants_bytes() -> None:
    clip = brightness(99.6 / 255, 100 / 255, 100.4 / 255)
    assert metrics.compat_streamv2v_wraparound_error(clip, still_pairs(clip)) == 0


def test_warp_looks_up_between_pixels_and_repeats_the_edge() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    across = metrics.warp(ramp, constant(0.25, 0, (8, 8)))
    assert across[0, 0, 3].tolist() == pytest.approx([*(x + 0.25 for x in range(7)), 7], abs=1e-5)
    down = metrics.warp(ramp.mT, constant(0, -2, (8, 8)))
    assert down[0, 0, :, 3].tolist() == pytest.approx([0, 0, 0, 1, 2, 3, 4, 5], abs=1e-5)


def test_pixel_whose_flows_do_not_undo_each_other_is_masked() -> None:
    forth, back = constant(2, 0), constant(-2, 0)
    back[0, 0, 20, 30] = -2.8  # within .01·(4 + 7.84) + .5 = .62 of squared px: .64 is too far
    back[0, 0, 20, 40] = -2.7  # .49 is not
    assert not metrics.visible(back, forth)[0, 0, 20, 30]  # also a boundary there
    seen = metrics.visible(forth, back)[0, 0]  # the flow itself is smooth here
    assert not seen[20, 28]
    assert seen[20, 38]
    assert int((~seen).sum()) == 2 * H + 1  # and two columns leave the picture


def test_boundary_of_a_motion_is_masked() -> None:
    flow = constant(0, 0)
    flow[:, 0, :, 30:] = 0.1  # |∇u|² = .01 > .002, at the pixel before the step
    seen = metrics.visible(flow, -flow)[0, 0]
    assert not seen[:, 29].any()
    assert seen[:, :29].all()
    assert seen[:, 30 : W - 1].all()
    turned = flow.mT.flip(1)
    assert torch.equal(metrics.visible(turned, -turned)[0, 0], seen.mT)
    flow[:, 0, :, 30:] = 0.04  # .0016: smooth enough
    assert metrics.visible(flow, -flow)[0, 0, :, 29].all()


def test_masked_pixels_do_not_count() -> None:
    clip = brightness(0.5, 0.5)
    flow = constant(0, 0)
    mask = torch.ones(1, 1, H, W, dtype=torch.bool)
    mask[..., :10, :] = False
    pair = Pair(flow, flow, mask, mask)
    clip[1][:10] = 1.0
    assert metrics.e_warp(clip, [pair]) == 0
    assert metrics.dvp_short(clip, [pair]) == 0
    clip[1][10:20] = 0.7  # 10 of the 38 rows that count
    assert metrics.e_warp(clip, [pair]) == pytest.approx(0.04 * 10 / 38, rel=1e-5)


def test_pair_without_a_visible_pixel_is_left_out() -> None:
    clip = brightness(0.5, 0.6, 0.9)
    flow, seen = constant(0, 0), torch.ones(1, 1, H, W, dtype=torch.bool)
    cut = Pair(flow, flow, ~seen, ~seen)
    assert metrics.e_warp(clip, [Pair(flow, flow, seen, seen), cut]) == pytest.approx(0.01, rel=1e-5)
    assert math.isnan(metrics.e_warp(clip, [cut, cut]))
    assert math.isnan(metrics.dvp_short(clip, [cut, cut]))


def test_flow_is_worked_out_only_for_pairs_that_are_asked_for() -> None:
    clip = sliding(4, (1, 1))
    flow = Slide(clip, (1, 1))
    long = metrics.long_pairs(clip, flow)
    assert flow.calls == 0
    next(long)
    assert flow.calls == 2  # there and back
    assert next(long).backward[0, :, 0, 0].tolist() == [2, 2]


def test_one_clip_of_motion_serves_many_variants_but_a_spent_iterator_none() -> None:
    clip = noise(0.1)
    motion = still_pairs(clip)
    assert metrics.e_warp(clip, motion) == metrics.e_warp(clip, motion)
    spent = metrics.pairs(clip, standing)
    metrics.e_warp(clip, spent)
    with pytest.raises(ValueError, match="zip"):
        metrics.e_warp(clip, spent)


def test_flicker_is_measured_only_where_the_source_stands_still() -> None:
    source = brightness(0.5, 0.5)
    source[1][:, :20] += 0.02  # changes, though nothing moves
    flow = constant(0, 0)
    flow[:, 1, :, 50:] = 0.6  # moves, though nothing changes
    seen = torch.ones(1, 1, H, W, dtype=torch.bool)
    output = brightness(0.3, 0.8)
    output[1][:, 20:50] = 0.4
    assert metrics.static_flicker(output, source, [Pair(flow, -flow, seen, seen)]) == pytest.approx(0.1, rel=1e-5)
    moving = constant(1, 0)
    assert math.isnan(metrics.static_flicker(output, source, [Pair(moving, -moving, seen, seen)]))


def test_camera_noise_of_two_levels_still_counts_as_still() -> None:
    source = [np.full((H, W, 3), level, np.uint8) for level in (100, 102)]
    output = brightness(0.3, 0.4)
    assert metrics.static_flicker(output, source, still_pairs(source)) == pytest.approx(0.1, rel=1e-5)
    source[1] += 1
    assert math.isnan(metrics.static_flicker(output, source, still_pairs(source)))


def test_t_of_is_the_length_of_the_motion_that_is_missing() -> None:
    frozen, moving = sliding(3, (0, 0), blur=3), sliding(3, (1, 0), blur=3)
    assert metrics.t_of(frozen, metrics.farneback(moving)) == pytest.approx(1, abs=0.15)
    assert metrics.t_of(moving, metrics.farneback(moving)) == 0


def test_same_clip_has_the_same_detail() -> None:
    clip = sliding(2)
    assert metrics.hf_ratio(clip, clip) == 1
    assert metrics.hf_log_ratio(clip, clip) == 0


def test_blur_lowers_the_detail_and_noise_raises_it() -> None:
    clip = sliding(2)
    soft, softer = ([cv2.GaussianBlur(picture, (0, 0), s) for picture in clip] for s in (0.7, 1.5))
    assert metrics.hf_ratio(softer, clip) < metrics.hf_ratio(soft, clip) < 0.9
    assert metrics.hf_log_ratio(soft, clip) == pytest.approx(math.log(metrics.hf_ratio(soft, clip)))
    noisy = [np.clip(picture + grain - 0.5, 0, 1) for picture, grain in zip(clip, noise(0.1, 2), strict=True)]
    assert metrics.hf_ratio(noisy, clip) > 1


def test_halved_contrast_halves_the_detail() -> None:
    clip = sliding(2)
    assert metrics.hf_ratio([picture / 2 for picture in clip], clip) == pytest.approx(0.5)
    assert metrics.hf_log_ratio([picture / 2 for picture in clip], clip) == pytest.approx(-math.log(2))


def test_detail_of_flat_pictures() -> None:
    flat = [np.full((H, W, 3), 90, np.uint8)]
    assert metrics.hf_log_ratio(flat, flat) == 0
    assert metrics.hf_log_ratio(flat, [texture()]) == -math.inf
    assert metrics.hf_log_ratio([texture()], flat) == math.inf


def test_psnr_of_known_noise() -> None:
    clip = brightness(*[0.5] * 4)
    assert metrics.psnr(noise(0.05), clip) == pytest.approx(-20 * math.log10(0.05), abs=0.1)
    assert metrics.psnr(clip, clip) == math.inf
    half_right = [*clip[:2], *noise(0.05)[2:]]  # half the squared error: 3 dB more, not infinity
    assert metrics.psnr(half_right, clip) == pytest.approx(-20 * math.log10(0.05) + 3.01, abs=0.1)


def test_ssim_of_flat_greys_is_its_luminance_term() -> None:
    expected = (2 * 0.5 * 0.6 + 0.01**2) / (0.5**2 + 0.6**2 + 0.01**2)
    assert metrics.ssim(brightness(0.5), brightness(0.6)) == pytest.approx(expected)
    clip = sliding(2)
    assert metrics.ssim(clip, clip) == pytest.approx(1)
    assert metrics.ssim(noise(0.1, 2), clip) < 0.5


@pytest.mark.parametrize(
    ("sigma", "true", "printed"), [(1, 0.76, 79.3), (2, 1.58, 102.8), (4, 3.19, 115.3), (8, 6.38, 121.8)]
)
def test_streamv2v_figure_saturates_where_the_true_error_does_not(sigma: float, true: float, printed: float) -> None:
    level = 128 / 255
    clean, noisy = np.full((200, 200, 3), level), noise(sigma / 255, 2, (200, 200), level)
    clip = rounded([clean, noisy[0], clean, noisy[1]])
    motion = still_pairs(clip)
    assert 255 * metrics.static_flicker(clip, [clip[0]] * 4, motion) == pytest.approx(true, rel=0.02)
    assert metrics.compat_streamv2v_wraparound_error(clip, motion) == pytest.approx(printed, abs=1)


def test_streamv2v_figure_compares_what_leaves_the_picture_with_black() -> None:
    grey = [np.full((H, W, 3), 100, np.uint8)] * 2
    forth, back = constant(-3, 2), constant(3, -2)
    pair = Pair(forth, back, metrics.visible(forth, back), metrics.visible(back, forth))
    counted = (H - 2) * (W - 3)  # all but the left columns and bottom rows, which the earlier frame loses
    black = 2 * (W - 3) + 3 * (H - 4)  # the top rows and right columns, which the later frame gains
    figure = metrics.compat_streamv2v_wraparound_error(grey, [pair])
    assert figure == pytest.approx((256 - 100) * black / counted, rel=1e-5)


def test_float_picture_in_the_wrong_unit_is_refused() -> None:
    for wrong in (brightness(0, 254), brightness(-0.1, 0.5), brightness(math.nan, 0.5)):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            metrics.e_warp(wrong, still_pairs(brightness(0.5, 0.5)))
    with pytest.raises(ValueError, match=r"\(H, W, 3\)"):
        metrics.psnr([np.zeros((H, W))], [np.zeros((H, W))])


def test_clips_and_motion_must_fit_together() -> None:
    clip = noise(0.1, 3)
    motion = still_pairs(clip)
    small = noise(0.1, 3, (H // 2, W // 2))
    with pytest.raises(ValueError, match="flow"):
        metrics.e_warp(small, motion)
    for measure in MEASURES.values():
        with pytest.raises(ValueError, match="zip"):
            measure(clip[:2], clip, motion)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP as transformers saves one."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    from tests.folders import tokenizer

    torch.manual_seed(0)
    words = tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = CLIPConfig(
        text_config={**small, **ends, "vocab_size": len(words), "max_position_embeddings": 77},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_clip_scores_are_cosines_of_the_models_own_embeddings(clip_folder: Path) -> None:
    embed = metrics.load_clip(clip_folder)
    pictures = rounded([texture(), *noise(0.1, 2)])
    frames, text = embed.pictures(pictures), embed.text("oil painting")
    assert frames.shape == (3, 8)
    inputs = {**embed.prepare(pictures, return_tensors="pt"), **embed.tokenizer(["oil painting"], return_tensors="pt")}
    with torch.no_grad():
        theirs = embed.model(**inputs)
    scale = embed.model.logit_scale.exp().item()
    cosines = theirs.logits_per_text[0] / scale
    assert metrics.clip_text(frames, text) == pytest.approx(100 * cosines.mean().item(), rel=1e-4)
    steps = torch.cosine_similarity(theirs.image_embeds[:-1], theirs.image_embeds[1:])
    assert metrics.clip_frame(frames) == pytest.approx(100 * steps.mean().item(), rel=1e-4)


def test_clip_frame_score_of_a_clip_that_never_changes_is_a_hundred(clip_folder: Path) -> None:
    frames = metrics.load_clip(clip_folder).pictures([texture()] * 3)
    assert metrics.clip_frame(frames) == pytest.approx(100, rel=1e-5)


def test_clip_embeds_bytes_and_floats_alike(clip_folder: Path) -> None:
    embed = metrics.load_clip(clip_folder)
    clip = rounded(noise(0.1, 2))
    torch.testing.assert_close(embed.pictures(clip), embed.pictures([picture / 255 for picture in clip]))


def test_prompt_longer_than_clip_reads_is_cut(clip_folder: Path) -> None:
    assert metrics.load_clip(clip_folder).text("ink " * 200).shape == (1, 8)


def test_folder_without_a_whole_clip_is_the_users_to_mend(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no CLIP model"):
        metrics.load_clip(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    with pytest.raises(UserError, match="no whole CLIP model"):
        metrics.load_clip(tmp_path)


def test_clip_with_missing_weights_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="1 weights are missing"):
        metrics.load_clip(folder)
