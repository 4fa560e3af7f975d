"""What Prometheus reads, and whether the server is well."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stream.histogram import Histogram
from tests.serving import Serving, eventually, serving


def samples(s: Serving) -> dict[tuple[str, ...], float]:
    """Every sample by its name and labels."""
    answer = s.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_every_stream_is_counted_and_forgotten_with_its_end(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        s.stream("one")
        s.stream("two")
        eventually(lambda: samples(s)["livestyle_frames_out_total", "two"] > 10)
        found = samples(s)
        assert found["livestyle_streams",] == 2
        assert found["livestyle_up", "one"] == 1
        assert found["livestyle_fps", "one"] > 1
        assert found["livestyle_frames_dropped_total", "one"] >= 0
        assert found["livestyle_reconnects_total", "one"] == 0
        assert found["livestyle_viewers", "one"] == 0
        s.hub.remove("one")
        assert ("livestyle_up", "one") not in samples(s)
        assert ("livestyle_up", "two") in samples(s)


def test_latencies_are_histograms_that_only_grow(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        s.stream("cam")
        eventually(lambda: samples(s).get(("livestyle_latency_seconds_count", "cam"), 0) > 5)
        eventually(lambda: samples(s).get(("livestyle_stage_seconds_count", "unet", "cam"), 0) > 5)
        first, second = samples(s), samples(s)
        buckets = [value for key, value in first.items() if key[0] == "livestyle_latency_seconds_bucket"]
        assert buckets == sorted(buckets)
        assert buckets[-1] == first["livestyle_latency_seconds_count", "cam"]
        assert first["livestyle_latency_seconds_sum", "cam"] > 0
        assert first["livestyle_stage_seconds_count", "unet", "cam"] > 0
        assert all(second[key] >= value for key, value in first.items() if key[0].endswith("_bucket"))


def test_the_process_and_the_answers_are_counted(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        s.client.get("/nothing")
        found = samples(s)
        assert found["process_resident_memory_bytes",] > 1e6
        assert found["process_threads",] > 1
        assert found["livestyle_http_responses_total", "404"] == 1
        assert not any(key[0].startswith("livestyle_device") for key in found)  # no CUDA device in use


def test_health_is_the_worker_and_readiness_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as s:
        assert s.client.get("/healthz").json() == {"alive": True}
        assert s.client.get("/readyz").json() == {"ready": True}
        monkeypatch.setattr("stream.server.metrics.MODELS", {})
        assert s.client.get("/readyz").status_code == 503
        s.hub.worker.close()
        dead = s.client.get("/healthz")
        assert (dead.status_code, set(dead.json())) == (503, {"error", "hint"})


def test_a_duration_on_a_bound_belongs_to_it() -> None:
    histogram = Histogram((10.0, 20.0))
    for ms in (10.0, 10.1, 20.0, 21.0):
        histogram.add(ms)
    copy = histogram.copy()
    histogram.add(1.0)
    assert (copy.counts, copy.sum_ms) == ([1, 2, 1], 61.1)
