"""Service of many replicas on Ray Serve: its application, and the call that runs it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from lfm2_fast.cluster.extra import check_extra, node_cores
from lfm2_fast.cluster.scale import Scale
from lfm2_fast.server.run import DRAIN, FAREWELL, QUEUE, ROWS, bound_socket, create_app

if TYPE_CHECKING:
    from ray.serve import Application

NAME = "lfm2_fast"
MAX_BODY = 16 * 2**20
# Requests that one Front relays at once before another one starts.
FRONT_REQUESTS = 64
# What Ray reserves for a Front. Cores may all be the replicas', and Ray puts actors that reserve
# nothing on any node: the loss of one could then be that of all.
FRONT = {"num_cpus": 0, "memory": 2**20}


def build(args: Mapping[str, Any]) -> Application:
    """Return the application of a model, for ``serve.run`` or a config file's ``import_path``.

    ``args`` are ``model``, the fields of ``Scale``, ``drain``, and the arguments of ``create_app``.
    Without ``api_key`` the keys are those in the environment's LFM2_FAST_API_KEY. Raises
    ImportError without the extra "ray", and ValueError for what replicas cannot serve.
    """
    check_extra()
    import ray

    options = dict(args)
    if "model" not in options:
        raise ValueError("args has no model: give a hub id, a folder or a GGUF file")
    if options.get("load_adapters"):
        raise ValueError(
            "load_adapters is not supported with replicas: a client reaches one of them only; "
            "name the adapters at the start"
        )
    names = {field.name for field in fields(Scale)}
    scale = Scale(**{name: options.pop(name) for name in names & options.keys()})
    drain = options.pop("drain", DRAIN)
    device = str(options.get("device") or "auto")
    cluster = ray.cluster_resources() if ray.is_initialized() else {}
    # Requests wait at the fronts: an engine takes all that its replica may get.
    queue = options.get("max_queue", QUEUE)
    options["max_queue"] = None
    resources = scale.resources(device, cluster, node_cores())
    if options.get("memory") is None:
        options["memory"] = scale.memory(resources)
    return application(
        partial(_make, options),
        scale,
        rows=options.get("max_rows") or ROWS,
        queue=queue,
        keys=partial(_keys, options.get("api_key")),
        max_body=options.get("max_body") or MAX_BODY,
        origins=tuple(options.get("cors_origins") or ()),
        drain=drain,
        resources=resources,
    )


def _make(options: dict[str, Any]) -> Any:
    return create_app(**{**options, "api_key": _keys(options.get("api_key"))})


def _keys(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the keys that are given, else those in this process's environment."""
    if isinstance(given, str):
        # An empty text does not mean "no keys": the application refuses it.
        return (given,)
    return tuple(given or os.environ.get("LFM2_FAST_API_KEY", "").split())


def application(
    make: Callable[[], Any],
    scale: Scale,
    *,
    rows: int = ROWS,
    queue: int | None = QUEUE,
    keys: Callable[[], Sequence[str]] = tuple,
    max_body: int = MAX_BODY,
    origins: Sequence[str] = (),
    drain: int = DRAIN,
    resources: Mapping[str, float],
) -> Application:
    """Return replicas of what ``make`` returns, behind fronts that take the requests.

    ``make`` is called in each replica. ``keys`` is called in each front, and returns the API keys.
    Both can be pickled. A replica gets twice its ``rows`` requests, so that a free row finds one.
    Of others, ``queue`` wait at each front. Pages of ``origins`` may call.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from lfm2_fast.cluster.front import Front
    from lfm2_fast.cluster.replica import Replica

    routing: dict[str, Any] = {}
    if scale.prefix_routing:
        path = "lfm2_fast.cluster.prefix_router.PrefixRouter"
        routing["request_router_config"] = RequestRouterConfig(request_router_class=path)
    replicas = serve.deployment(Replica).options(
        name="Replica",
        ray_actor_options=dict(resources),
        max_ongoing_requests=2 * rows,
        max_queued_requests=-1 if queue is None else max(queue, 1),
        graceful_shutdown_timeout_s=drain,
        health_check_period_s=5,
        **scale.number(rows),
        **routing,
    )
    fronts = serve.deployment(Front).options(
        name="Front",
        ray_actor_options=FRONT,
        max_ongoing_requests=10_000,
        # Its requests may tell clients how those of a replica ended.
        graceful_shutdown_timeout_s=drain + FAREWELL,
        health_check_period_s=5,
        autoscaling_config={
            "min_replicas": min(2, scale.most),
            "max_replicas": 2 * scale.most,
            "target_ongoing_requests": FRONT_REQUESTS,
        },
    )
    return fronts.bind(replicas.bind(make), keys, max_body, origins)


def serve_replicas(
    args: Mapping[str, Any],
    *,
    host: str,
    port: int,
    address: str | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve replicas of a model; ``args`` are those of ``build``, ``ready`` gets the URL.

    Without ``address`` a Ray of its own runs on this machine until Ctrl-C, which raises
    KeyboardInterrupt, or SIGTERM. Requests that run then have ``drain`` seconds. With the
    ``address`` of a cluster, "auto" for one on this machine, the service stays there when the call
    returns. A service that is there already is updated without a failed request. If Serve runs
    already, its host and port stay, and ``ready`` gets those. Raises OSError if the address cannot
    be used, and what ``build`` raises.
    """
    check_extra()
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client

    drain = args.get("drain", DRAIN)
    if address is not None and port == 0:
        raise ValueError(
            "port=0 may be another port on each node: give one that is free on all nodes"
        )
    if address is None:
        with bound_socket(host, port) as bound:
            port = bound.getsockname()[1]
    if not ray.is_initialized():
        ray.init(address or "local", include_dashboard=False if address is None else None)
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
        serve.run(build(args), name=NAME, route_prefix="/")
        # A Serve that ran before has its own address, which nothing public tells.
        url = _get_global_client().root_url
        ready(url if address is None else f"{url} on each node with a proxy of Ray Serve")
        if address is None:
            threading.Event().wait()
    except Terminated:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            if address is None:
                _stop(drain + FAREWELL)
        finally:
            signal.signal(signal.SIGTERM, before)


class Terminated(BaseException):
    """Signal SIGTERM, in the main thread."""


def _leave(*_: object) -> None:
    raise Terminated


def _stop(seconds: float) -> None:
    """Let running requests end, for some seconds at most, and stop Ray."""
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    end = time.monotonic() + seconds
    try:
        while True:
            try:
                serve.delete(NAME)
                break
            except TimeoutError:
                # The library waits for a minute at most.
                if time.monotonic() > end:
                    break
            except RayServeException:
                # It was never started.
                break
    finally:
        serve.shutdown()
        ray.shutdown()
