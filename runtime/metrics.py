"""What `/metrics` shows: counts, tokens, latencies, caches, line and memory, in Prometheus' own format."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.engine import EngineStats
from runtime.latency import Timing

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One registry per server, so that two in one process (tests) do not meet."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_EngineCollector(stats))
        self._responses = Counter(
            "vlm_responses", "Answered requests by HTTP status", ["status"], registry=self.registry
        )
        self._finished = Counter("vlm_finished", "Finished answers by reason", ["finish"], registry=self.registry)
        self._tokens = Counter("vlm_tokens", "Tokens by kind", ["kind"], registry=self.registry)
        self._ttft = _histogram("vlm_ttft_seconds", "Receipt to first token", self.registry)
        self._tpot = _histogram("vlm_tpot_seconds", "Time per token after the first", self.registry)
        self._e2el = _histogram("vlm_e2el_seconds", "Receipt to the end of the answer", self.registry)
        self.in_flight = Gauge(
            "vlm_requests_in_flight", "Requests being read, waiting or answered", registry=self.registry
        )

    def response(self, status: int) -> None:
        self._responses.labels(str(status)).inc()

    def finished(self, finish: str, measured: Timing) -> None:
        self._finished.labels(finish).inc()
        self._tokens.labels("prompt").inc(measured.prompt_tokens or 0)
        self._tokens.labels("cached").inc(measured.cached_tokens or 0)
        self._tokens.labels("completion").inc(measured.completion_tokens or 0)
        for histogram, value in (
            (self._ttft, measured.ttft_ms),
            (self._tpot, measured.tpot_ms),
            (self._e2el, measured.e2el_ms),
        ):
            if value is not None:
                histogram.observe(value / 1000)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def _histogram(name: str, text: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(name, text, buckets=SECONDS, registry=registry)


class _EngineCollector(Collector):
    """Reads the engine's own counters at the moment somebody asks."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("vlm_loaded", "1 once the model answers", value=float(stats is not None))
        if stats is None:
            return
        yield GaugeMetricFamily("vlm_queue_waiting", "Requests in the engine's line", value=stats.waiting)
        yield GaugeMetricFamily("vlm_image_cache_bytes", "Image embeddings kept", value=stats.images.bytes)
        yield GaugeMetricFamily("vlm_image_cache_entries", "Images kept", value=stats.images.entries)
        yield CounterMetricFamily("vlm_image_cache_hits", "Images not encoded again", value=stats.images.hits)
        yield CounterMetricFamily("vlm_image_cache_misses", "Images encoded", value=stats.images.misses)
