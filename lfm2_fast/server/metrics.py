"""Metrics under vLLM's names, for existing dashboards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lfm2_fast.engine.async_engine import AsyncEngine

# Bounds of the histograms, in seconds and in numbers of tokens.
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """Counts and times of one service, in a registry of its own."""

    def __init__(self, engine: AsyncEngine, model: str) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.registry = CollectorRegistry()
        self._engine, self._model = engine, model
        label: dict[str, Any] = {"labelnames": ["model_name"], "registry": self.registry}

        def histogram(name: str, meaning: str, buckets: Any) -> Any:
            made = Histogram(f"vllm:{name}", meaning, buckets=buckets, **label)
            return made.labels(model)

        self.first_token = histogram(
            "time_to_first_token_seconds", "Seconds from a request to its first token.", LONG
        )
        self.between_tokens = histogram(
            "inter_token_latency_seconds", "Seconds between tokens of a choice.", SHORT
        )
        self.whole = histogram(
            "e2e_request_latency_seconds", "Seconds from a request to its end.", LONG
        )
        self.prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self.generated = histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)
        self.prompt_tokens = Counter(
            "vllm:prompt_tokens", "Tokens of prompts of requests that were taken.", **label
        ).labels(model)
        self.generated_tokens = Counter(
            "vllm:generation_tokens", "Tokens that were written.", **label
        ).labels(model)
        self._success = Counter(
            "vllm:request_success",
            "Choices that have ended, by reason; abort is a client that left, or an error.",
            labelnames=["model_name", "finished_reason"],
            registry=self.registry,
        )
        for reason in ("stop", "length", "abort"):
            self._success.labels(model, reason)
        self.registry.register(self)

    def ended(self, reason: str) -> None:
        """Count a choice that has ended."""
        known = {"tool_calls": "stop", "stop": "stop", "length": "length"}
        self._success.labels(self._model, known.get(reason, "abort")).inc()

    def collect(self) -> Iterator[Any]:
        """Yield the engine's numbers."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        found = self._engine.engine.statistics
        pages = found.pages_free + found.pages_cached + found.pages_used
        gauges = {
            "num_requests_running": ("Continuations that run.", found.running),
            "num_requests_waiting": ("Continuations that wait for a row.", found.waiting),
            "kv_cache_usage_perc": (
                "Share of the pages that rows own, from 0 to 1.",
                found.pages_used / pages if pages else 0.0,
            ),
        }
        counters = {
            "prefix_cache_queries": ("Tokens of prompts that were looked up.", found.prompt_tokens),
            "prefix_cache_hits": ("Tokens of prompts that were not run again.", found.prefix_hits),
            "num_preemptions": ("Rows that gave their pages back for a time.", found.preemptions),
        }
        for name, (meaning, value) in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", meaning, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, (meaning, value) in counters.items():
            counter = CounterMetricFamily(f"vllm:{name}", meaning, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter

    def page(self) -> bytes:
        """Return the text for Prometheus."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
