"""The bench's arithmetic and its page, with backends that do no work."""

from __future__ import annotations

import itertools
import json
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from accel.engine import EngineSpec, TensorSpec
from accel.null_backend import NullBackend
from accel.torch_backend import TorchBackend
from bench import engines, record, report
from bench.machine import Ceilings
from bench.networks import measure_model

X = TensorSpec("x", (1, 4))
LINEAR = (lambda: nn.Linear(4, 4), EngineSpec("linear", (X,), (X,), "f"), (torch.ones(1, 4),))

LIMITS = {"cpu": Ceilings({"float32": 50.0, "bfloat16": 100.0}, 10.0)}


def same_weights() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def test_measure_returns_plain_numbers_for_every_network_and_backend() -> None:
    network = (same_weights, *LINEAR[1:])
    found = engines.measure({"a": network, "b": network}, [TorchBackend(), NullBackend()], n=4, limits=LIMITS)
    assert [(r["network"], r["backend"]) for r in found["results"]] == [
        ("a", "torch"),
        ("a", "null"),
        ("b", "torch"),
        ("b", "null"),
    ]
    torch_row, null_row = found["results"][:2]
    assert torch_row["ratio_to_torch"] == 1
    assert torch_row["max_abs"] == 0
    assert null_row["max_abs"] is None
    assert torch_row["gflop"] == pytest.approx(2 * 4 * 4 / 1e9)
    assert torch_row["of_matmul"] == pytest.approx(torch_row["gflop"] / (torch_row["quickest_ms"] / 1e3) / 100)
    assert torch_row["weights_mb"] == pytest.approx(20 * 4 / 1e6, abs=0.01)
    assert 0 < null_row["of_copy"] < 1
    assert sum(map(len, found["lanes"]["null"]["a"]["blocks"])) == 4
    assert found["lanes"]["torch"]["a error"]["blocks"] == [[0.0]]
    assert "a error" not in found["lanes"]["null"]
    assert found["work"] == {"networks": {"a": "f", "b": "f"}, "launches": 4}
    assert not record.fault(found)
    assert "Share of the matmul ceiling" in report.html(found)


def test_two_backends_of_one_name_are_two_lanes() -> None:
    found = engines.measure({"a": LINEAR}, [NullBackend(), NullBackend()], n=4, limits=LIMITS)
    assert list(found["lanes"]) == ["null", "null 2"]
    assert [row["backend"] for row in found["results"]] == ["null", "null 2"]
    assert json.loads(json.dumps(found)) == found


def test_ratio_is_unknown_without_the_torch_backend() -> None:
    (row,) = engines.measure({"a": LINEAR}, [NullBackend()], n=1, limits=LIMITS)["results"]
    assert row["ratio_to_torch"] is None


def test_a_network_that_reads_its_numbers_is_measured_without_a_count_of_operations() -> None:
    class Reading(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * float(x.sum())

    network = (lambda: Reading(4, 4), *LINEAR[1:])
    found = engines.measure({"a": network}, [TorchBackend()], n=1, limits=LIMITS)
    (row,) = found["results"]
    assert (row["gflop"], row["of_matmul"]) == (None, None)
    assert "–" in report.html(found)


def test_every_network_of_a_model_is_measured_with_inputs_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    highest = itertools.chain([60.0], itertools.repeat(50.0))  # one that was not disturbed is enough
    monkeypatch.setattr("bench.engines.ceilings", lambda kind: Ceilings({"float32": next(highest)}, 10.0))
    found = measure_model("mini", (64, 64), ("null", "torch"), n=1)
    assert {r["network"] for r in found["results"]} == {"encode", "unet", "decode"}
    assert all(r["gflop"] > 0 for r in found["results"])
    assert all(r["max_abs"] == 0 for r in found["results"] if r["backend"] == "torch")
    assert found["work"]["size"] == "64x64"
    assert found["ceilings"]["cpu"] == {"gflops": {"float32": 60.0}, "gbytes": 10.0}
    assert len(found["work"]["model_digest"]) == 12


def test_percentile_lies_between_the_nearest_samples() -> None:
    assert engines.percentile([1, 2, 3, 4, 5], 50) == 3
    assert engines.percentile([10, 0], 95) == pytest.approx(9.5)
    assert engines.percentile([7], 95) == 7


SECTIONS = [
    {"kind": "table", "title": "T", "columns": ["name", "ms"], "rows": [["<script>", 1.5], ["b", None]]},
    {
        "kind": "bars",
        "title": "B",
        "unit": "ms",
        "groups": [{"label": "g", "bars": [{"label": "p", "value": 2.0, "high": 3.0}, {"label": "q", "value": 0.0}]}],
    },
    {
        "kind": "lines",
        "title": "L",
        "x": "s",
        "y": "ms",
        "series": [{"label": "p", "x": [0, 1, 2], "y": [1.0, 5.0, 2.0]}, {"label": "r", "x": [], "y": []}],
    },
    {"kind": "histogram", "title": "H", "unit": "ms", "series": [{"label": "q", "values": [1.0, 1.1, 1.2, 90.0]}]},
    {"kind": "intervals", "title": "I", "one": 1.0, "rows": [{"label": "m", "value": 1.1, "low": 0.9, "high": 1.2}]},
    {"kind": "histogram", "title": "one value", "unit": "ms", "series": [{"label": "q", "values": [3.0]}]},
]


def test_page_is_self_contained_escaped_and_its_plots_are_xml() -> None:
    page = report.html({"title": "Latency & more", "machine": {"CPU": "x"}, "sections": SECTIONS})
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "Latency &amp; more" in page
    assert "http" not in page
    assert "src=" not in page
    plots = [part.split("</svg>")[0] for part in page.split("<svg")[1:]]
    assert len(plots) == 5
    for plot in plots:
        ElementTree.fromstring(f"<svg{plot}</svg>")
        assert "nan" not in plot


@pytest.mark.parametrize("low", [0.9, 0.3, 0.0])
def test_ratios_near_and_far_lie_inside_their_plot_in_order(low: float) -> None:
    rows = [
        {"label": "m", "value": 1.1, "low": low, "high": 1.4},
        {"label": "n", "value": 1.0, "low": 1.0, "high": 1.0},
    ]
    plot = report._intervals({"one": 1.0, "rows": rows}, {})
    first, second = plot["rows"]
    assert plot["left"] <= first["x0"] < plot["one"] < first["x"] < first["x1"] <= report.WIDTH
    assert second["x0"] == second["x1"] == plot["one"]
    assert len(plot["axis"]) >= 2


def test_one_label_has_one_colour_on_the_whole_page() -> None:
    colours = report._colours(SECTIONS)
    assert colours == {"p": 0, "q": 1, "r": 2}


def test_unknown_section_is_refused() -> None:
    with pytest.raises(ValueError, match="pie"):
        report.html({"title": "", "machine": {}, "sections": [{"kind": "pie", "title": ""}]})


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01234, "0.0123"), (1234.5, "1234"), (100.0, "100"), (2.50, "2.5"), (1e-9, "1e-09")]
)
def test_numbers_read_as_a_person_writes_them(value: float, text: str) -> None:
    assert report.number(value) == text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0), (0.3, 17.2), (5, 5), (0, 1e-6), (-3, 4)])
def test_ticks_are_few_and_cover_the_values(low: float, high: float) -> None:
    ticks = report._ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
