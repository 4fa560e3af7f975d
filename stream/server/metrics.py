"""`/metrics` for Prometheus, and whether the server is well: `/healthz`, `/readyz`."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import psutil
from fastapi import APIRouter, Depends
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from models.spec import MODELS
from stream.histogram import Histogram
from stream.hub import Hub
from stream.live import Stream
from stream.server.auth import Guard
from stream.server.errors import Problem, Refused

TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Streams(Collector):
    """Reads every stream's meter when it is asked; what is gone is not told any more."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def collect(self) -> Iterable[Metric]:
        """One family per number, a label per stream."""
        streams, now = self._hub.streams(), time.monotonic()
        totals: tuple[tuple[str, str, Callable[[Stream], float]], ...] = (
            ("frames_in", "captured pictures", lambda s: s.meter.frames_in),
            ("frames_out", "pictures that came out", lambda s: s.meter.frames_out),
            ("frames_dropped", "captured pictures that came out nowhere", lambda s: s.meter.dropped),
            ("frames_diffused", "pictures made by the style lane", lambda s: s.meter.keys),
            ("reconnects", "times a source was opened again", lambda s: s.reconnects),
        )
        for name, help, value in totals:
            counter = CounterMetricFamily(f"livestyle_{name}", help, labels=("stream",))
            for stream in streams:
                counter.add_metric((stream.name,), value(stream))
            yield counter
        gauges: tuple[tuple[str, str, Callable[[Stream], float]], ...] = (
            ("fps", "pictures per second that come out", lambda s: s.meter.recent_fps(now)),
            ("style_fps", "diffused pictures per second", lambda s: s.meter.recent_style_fps(now)),
            ("viewers", "viewers", lambda s: s.viewers),
            ("outputs", "recordings and outputs that run", lambda s: sum(o.is_alive() for o in s.outputs)),
            ("up", "1 while pictures come out", lambda s: float(s.phase == "live")),
        )
        for name, help, value in gauges:
            gauge = GaugeMetricFamily(f"livestyle_{name}", help, labels=("stream",))
            for stream in streams:
                gauge.add_metric((stream.name,), value(stream))
            yield gauge
        yield GaugeMetricFamily("livestyle_streams", "streams", value=len(streams))
        yield from _histograms(streams)


class Machine(Collector):
    """The process, the device's memory, and the answers of the server by status."""

    def __init__(self, answers: Counter[int]) -> None:
        self._answers = answers
        self._process = psutil.Process()

    def collect(self) -> Iterable[Metric]:
        """Read now."""
        with self._process.oneshot():
            times = self._process.cpu_times()
            resident, threads = self._process.memory_info().rss, self._process.num_threads()
            yield GaugeMetricFamily("process_resident_memory_bytes", "resident memory", value=resident)
            yield GaugeMetricFamily("process_threads", "threads", value=threads)
            yield CounterMetricFamily("process_cpu_seconds", "user and system time", value=times.user + times.system)
            if hasattr(self._process, "num_fds"):
                yield GaugeMetricFamily("process_open_fds", "open files", value=self._process.num_fds())
        answers = CounterMetricFamily("livestyle_http_responses", "answers by status", labels=("status",))
        for status, count in sorted(self._answers.items()):
            answers.add_metric((str(status),), count)
        yield answers
        memory = device_memory()
        if memory is not None:
            yield GaugeMetricFamily(
                "livestyle_device_memory_used_bytes", "memory in use on the device", value=memory[0]
            )
            yield GaugeMetricFamily("livestyle_device_memory_bytes", "memory of the device", value=memory[1])


def device_memory() -> tuple[int, int] | None:
    """Bytes used and there are on the CUDA device that the model runs on; None where it runs on none."""
    cuda = sys.modules.get("torch.cuda")  # never imported here: where a device is in use, the model has imported it
    initialized = getattr(cuda, "is_initialized", None)  # not there yet while another thread is importing it
    if cuda is None or initialized is None or not initialized():
        return None
    free, total = cuda.mem_get_info()
    return total - free, total


def router(hub: Hub, guard: Guard, answers: Counter[int]) -> APIRouter:
    """`/metrics`, which shows the names of streams and so needs the token for view, `/healthz` and `/readyz`."""
    routes = APIRouter(tags=["watching"])
    registry = CollectorRegistry()
    registry.register(Streams(hub))
    registry.register(Machine(answers))
    text: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {}}},
        401: {"model": Problem},
        403: {"model": Problem},
    }

    @routes.get("/metrics", dependencies=[Depends(guard("view"))], responses=text, response_class=Response)
    async def metrics() -> Response:
        """Counters, rates and latencies in the Prometheus text format."""
        return Response(generate_latest(registry), media_type=TEXT)

    @routes.get("/healthz", responses={503: {"model": Problem}})
    async def health() -> dict[str, bool]:
        """200 while the event loop and the worker run."""
        if not hub.alive:
            raise Refused(503, "the worker has ended", "restart the server")
        return {"alive": True}

    @routes.get("/readyz", responses={503: {"model": Problem}})
    async def ready() -> dict[str, bool]:
        """200 when a stream can be started: the model is here."""
        model = MODELS.get(hub.settings.model)
        if not hub.alive or model is None or not (model.folder / "model_index.json").is_file():
            raise Refused(503, f"the model {hub.settings.model} is not here", "see `livestyle models`")
        return {"ready": True}

    return routes


def _histograms(streams: list[Stream]) -> Iterable[Metric]:
    latency = HistogramMetricFamily(
        "livestyle_latency_seconds", "capture to the outlet, of every picture", labels=("stream",)
    )
    stages = HistogramMetricFamily("livestyle_stage_seconds", "time per stage", labels=("stream", "stage"))
    for stream in streams:
        for name, histogram in stream.meter.histograms().items():
            family, labels = (stages, (stream.name, name)) if name else (latency, (stream.name,))
            family.add_metric(labels, _buckets(histogram), histogram.sum_ms / 1000)
    yield latency
    yield stages


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    total, buckets = 0, []
    for bound, count in zip((*histogram.bounds_ms, float("inf")), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound / 1000), float(total)))
    return buckets
