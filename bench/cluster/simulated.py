"""Simulated Ray cluster: nodes that are processes of this machine, each with a proxy of its own."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster

from bench.cluster.sleeping import make_app
from lfm2_fast.cluster.scale import Scale
from lfm2_fast.cluster.serving import NAME, application

HERE = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as found:
        found.bind((HERE, 0))
        return int(found.getsockname()[1])


def eventually(true: Callable[[], Any], seconds: float = 60) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


class Simulated:
    """Cluster of a head, which runs no replicas, and of workers; ``urls`` are their proxies'."""

    def __init__(self, workers: int, cores: int) -> None:
        self.ports = [free_port() for _ in range(workers + 1)]
        self.urls = [f"http://{HERE}:{port}" for port in self.ports]
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.cores = cores
        self.workers = [self.add_worker(port) for port in self.ports[1:]]
        self.cluster.connect()
        options = {"host": HERE, "port": self.ports[0]}
        serve.start(proxy_location="EveryNode", http_options=options)

    def add_worker(self, port: int) -> Any:
        """Start a node whose proxy listens on a port of its own."""
        os.environ["RAY_SERVE_WORKER_PROXY_HTTP_PORT"] = str(port)
        try:
            return self.cluster.add_node(num_cpus=self.cores)
        finally:
            del os.environ["RAY_SERVE_WORKER_PROXY_HTTP_PORT"]

    def run(
        self, step: float = 0.05, *, drain: int = 20, scale: Any = None, **options: Any
    ) -> None:
        """Deploy engines with steps of a fixed time; return when all proxies know of them."""
        rows = options.setdefault("max_rows", 4)
        scale = scale or Scale(replicas=2, cpus_per_replica=1)
        made = application(
            partial(make_app, step, **options),
            scale,
            rows=rows,
            drain=drain,
            resources=scale.resources("cpu", {}),
        )
        serve.run(made, name=NAME, route_prefix="/")

    def remove(self) -> None:
        """Remove what was deployed."""
        serve.delete(NAME)

    def processes(self, title: str) -> list[Any]:
        """Return the living processes of this cluster that Ray calls by a name."""
        found = []
        for each in psutil.Process().children(recursive=True):
            try:
                if title in " ".join(each.cmdline()) and each.status() != psutil.STATUS_ZOMBIE:
                    found.append(each)
            except psutil.NoSuchProcess:
                continue
        return found

    def close(self) -> None:
        """Stop all processes."""
        serve.shutdown()
        ray.shutdown()
        self.cluster.shutdown()
