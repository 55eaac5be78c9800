"""What /metrics shows: requests, tokens, latencies, and the engine's queue, batch and pages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kimi_jax.server.answer import End, Step
from kimi_jax.server.engine import Load
from kimi_jax.server.service import Parts

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class _EngineLoad(Collector):
    def __init__(self, load: Callable[[], Load]):
        self._load = load

    def collect(self) -> Iterable[Metric]:
        load = self._load()
        yield GaugeMetricFamily("kimi_requests_running", "Sequences in the batch.", load.running)
        yield GaugeMetricFamily("kimi_requests_waiting", "Sequences in the queue.", load.waiting)
        yield GaugeMetricFamily("kimi_kv_pages_used", "Cache pages in use.", load.pages_used)
        yield GaugeMetricFamily("kimi_kv_pages_total", "Cache pages there are.", load.pages_total)


class Metrics:
    """One registry per server, so that several can live in one process."""

    def __init__(self, load: Callable[[], Load]):
        self.registry = registry = CollectorRegistry()
        registry.register(_EngineLoad(load))
        ProcessCollector(registry=registry)  # CPU seconds and memory, under Prometheus' usual names
        self._requests = Counter("kimi_http_requests", "Answered HTTP requests.", ["path", "status"], registry=registry)
        self._prompt = Counter("kimi_prompt_tokens", "Prompt tokens of finished answers.", registry=registry)
        self._output = Counter("kimi_generation_tokens", "Generated tokens.", registry=registry)
        self._first = Histogram(
            "kimi_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=_FIRST,
            registry=registry,
        )
        self._next = Histogram(
            "kimi_inter_token_seconds", "Between the tokens of an answer.", buckets=_NEXT, registry=registry
        )

    def answered(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def page(self) -> bytes:
        return generate_latest(self.registry)

    async def observe(self, parts: Parts, prompt_tokens: int, began: float) -> Parts:
        """Passes ``parts`` on and times them. ``began`` is when the request arrived, by ``time.perf_counter``."""
        last: dict[int, float] = {}
        try:
            async for index, part in parts:
                now = time.perf_counter()
                if isinstance(part, Step) and part.tokens:
                    if index in last:
                        self._next.observe(now - last[index])
                    else:
                        self._first.observe(now - began)
                    last[index] = now
                    self._output.inc(len(part.tokens))
                elif isinstance(part, End):
                    self._prompt.inc(prompt_tokens)
                yield index, part
        finally:
            await parts.aclose()
