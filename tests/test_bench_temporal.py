"""The steadiness benchmark: every row is there, and the figures say what the pictures say."""

from __future__ import annotations

from typing import Any

import pytest

from accel.errors import UserError
from bench import record, temporal
from bench.latency import text
from bench.report import html
from tests import fakes


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.load.load", lambda model, size, engine, log: fakes.FakeStylizer(size))
        return temporal.measure(["demo"], size=(128, 96), frames=24)


def row(report: dict[str, Any], part: str, what: str) -> dict[str, Any]:
    (found,) = [row for row in report["results"][part] if row["what"] == what]
    return dict(found)


def test_the_refiner_takes_flicker_out_and_keeps_detail_where_blur_loses_it(report: dict[str, Any]) -> None:
    shaken, refined, blurred = (
        row(report, "flicker", what) for what in ("frame-wise", "analytic", "blur of equal E_warp")
    )
    assert shaken["ratio"] == 1
    assert refined["ratio"] < 0.35
    assert refined["psnr"] > shaken["psnr"] + 2
    assert blurred["hf_ratio"] < 0.5 * refined["hf_ratio"]


def test_a_steady_stylizer_has_nothing_to_gain_from_other_seeds(report: dict[str, Any]) -> None:
    assert row(report, "seeds", "analytic")["e_warp"] <= row(report, "seeds", "frame-wise")["e_warp"]


def test_reprojection_is_nearer_to_every_frame_than_holding(report: dict[str, Any]) -> None:
    held, carried = (row(report, "modes", what) for what in ("hold the last key", "reproject"))
    assert carried["psnr"] > held["psnr"] + 3


def test_the_report_is_a_table_and_a_page_with_pictures(report: dict[str, Any]) -> None:
    assert "Known flicker" in text(report)
    page = html(report)
    assert page.count("data:image/jpeg;base64,") == 9
    assert "frames in a row" in page


def test_one_frame_is_too_few() -> None:
    with pytest.raises(UserError, match="at least two frames"):
        temporal.measure(["demo"], frames=1)


def test_it_is_a_record_with_a_lane_per_variant_and_a_block_per_clip(report: dict[str, Any]) -> None:
    assert not record.fault(report)
    assert report["work"]["sources"] == [{"source": "demo"}]
    assert len(report["lanes"]["flicker: analytic"]["PSNR"]["blocks"]) == 1
