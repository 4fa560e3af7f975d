"""The bench's arithmetic and its page, with backends that do no work."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from accel.engine import EngineSpec, TensorSpec
from accel.null_backend import NullBackend
from accel.torch_backend import TorchBackend
from bench import engines, report

X = TensorSpec("x", (1, 4))
LINEAR = (lambda: nn.Linear(4, 4), EngineSpec("linear", (X,), (X,), "f"), (torch.ones(1, 4),))


def same_weights() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def test_measure_returns_plain_numbers_for_every_network_and_backend() -> None:
    network = (same_weights, *LINEAR[1:])
    found = engines.measure({"a": network, "b": network}, [TorchBackend(), NullBackend()], n=4)
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
    assert len(null_row["samples_ms"]) == 4
    assert json.loads(json.dumps(found)) == found


def test_ratio_is_unknown_without_the_torch_backend() -> None:
    (row,) = engines.measure({"a": LINEAR}, [NullBackend()], n=1)["results"]
    assert row["ratio_to_torch"] is None


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
    assert len(plots) == 4
    for plot in plots:
        ElementTree.fromstring(f"<svg{plot}</svg>")
        assert "nan" not in plot


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
