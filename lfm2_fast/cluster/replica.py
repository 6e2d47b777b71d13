"""Replica: one engine with the server's whole application, as a Ray Serve deployment."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from ray import serve
from ray.util.metrics import Gauge
from starlette.types import Message

from lfm2_fast.cluster.asgi import run_app
from lfm2_fast.server.state import health


class Replica:
    """Application that answers requests of a ``Front``.

    ``make`` returns the application, whose ``state.service`` is closed at the end.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._app = make()
        self._service = self._app.state.service
        self._name = serve.get_replica_context().replica_id.unique_id
        self._gauges: dict[str, Any] = {}

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
        """Yield the application's messages to a request with this body.

        Messages that are sent while the consumer is busy come in one piece. If the consumer leaves,
        the application sees its client disconnect.
        """
        async for messages in run_app(self._app, scope, body):
            yield messages

    async def check_health(self) -> None:
        """Raise if the engine takes no requests; Ray Serve then replaces this replica.

        Ray Serve calls it every few seconds, which is how Ray's metrics get the engine's numbers.
        """
        await health(self._service)
        self._export()

    def _export(self) -> None:
        for family in self._service.metrics.registry.collect():
            for sample in family.samples if family.type in ("gauge", "counter") else ():
                name = sample.name.replace("vllm:", "lfm2_fast_")
                if name.endswith("_created"):
                    continue
                if name not in self._gauges:
                    keys = (*sample.labels, "replica")
                    self._gauges[name] = Gauge(name, family.documentation, keys)
                self._gauges[name].set(sample.value, {**sample.labels, "replica": self._name})

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.close()
