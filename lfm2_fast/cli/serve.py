"""``lfm2-fast serve``: a checkpoint as an OpenAI-compatible HTTP service."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfm2_fast.cli import options as opt

if TYPE_CHECKING:
    from lfm2_fast.cli.terminal import Terminal

# Options of other servers that this one refuses, with advice.
REFUSED = {
    "tensor_parallel_size": "use --replicas, or several servers, one for each device",
    "context_shift": "it drops the middle of a text; ask for fewer tokens, or start a new text",
    "embeddings": "load the checkpoint with sentence-transformers instead",
}
# Options that ask for replicas.
SCALE = (
    "replicas",
    "min_replicas",
    "max_replicas",
    "target_ongoing_requests",
    "cpus_per_replica",
    "gpus_per_replica",
)
# Options that ``create_app`` takes as they are.
SETTINGS = (
    "served_model_name",
    "max_rows",
    "max_model_len",
    "memory",
    "max_queue",
    "preset",
    "timeout",
    "max_body",
    "page",
    "prompt_lookup",
    "drafter",
    "load_adapters",
    "max_adapters",
    "max_lora_rank",
)
LOOPBACK = ("127.", "localhost", "::1")


def serve(
    context: typer.Context,
    model: opt.Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free port.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="LFM2_FAST_API_KEY", help="Key that clients must send; repeatable."),
    ] = None,
    served_model_name: opt.ServedModelName = None,
    max_rows: opt.MaxRows = 16,
    max_model_len: opt.MaxModelLen = None,
    memory: opt.Memory = None,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Texts that may wait; more get status 503.")
    ] = 1024,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds that a request may take.")
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Largest request in bytes.")] = 16 * 2**20,
    drain: Annotated[
        int, typer.Option(min=0, help="Seconds that running requests have after SIGTERM.")
    ] = 60,
    preset: opt.Preset = None,
    chat_template: opt.ChatTemplate = None,
    cors_origins: Annotated[
        list[str] | None, typer.Option(help="Origin of web pages that may call; repeatable.")
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Show a page at /.")] = True,
    prompt_lookup: Annotated[
        int,
        typer.Option(min=0, help="Tokens to draft by prompt lookup, like 7; no text changes."),
    ] = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    backend: opt.Backend = "auto",
    quantization: opt.Quantization = None,
    revision: opt.Revision = None,
    gguf_file: opt.GGUFFile = None,
    local_files_only: opt.LocalFilesOnly = False,
    force_download: opt.ForceDownload = False,
    drafter: Annotated[
        str | None, typer.Option(help="DSpark drafter: hub id or folder; no text changes.")
    ] = None,
    named_adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", metavar="NAME=PATH", help="LoRA adapter that clients name; repeatable."
        ),
    ] = None,
    load_adapters: Annotated[
        bool, typer.Option("--load-adapters", help="Let clients load adapters from any path.")
    ] = False,
    max_adapters: Annotated[
        int | None, typer.Option(min=1, help="Adapters that may be loaded; their room is reserved.")
    ] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank that an adapter may have.")
    ] = None,
    replicas: opt.Replicas = None,
    ray_address: opt.RayAddress = None,
    min_replicas: Annotated[int | None, typer.Option(min=0, help="Fewest replicas.")] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Most replicas; as many run as the requests need.")
    ] = None,
    target_ongoing_requests: Annotated[
        float | None,
        typer.Option(min=0.1, help="Requests at once that a replica should have; else --max-rows."),
    ] = None,
    cpus_per_replica: opt.CpusPerReplica = None,
    gpus_per_replica: opt.GpusPerReplica = None,
    no_prefix_routing: Annotated[
        bool,
        typer.Option("--no-prefix-routing", help="Route requests without regard to their prefix."),
    ] = False,
    tensor_parallel_size: Annotated[int, typer.Option(hidden=True)] = 1,
    context_shift: Annotated[bool, typer.Option("--context-shift", hidden=True)] = False,
    embeddings: Annotated[bool, typer.Option("--embeddings", hidden=True)] = False,
) -> None:
    """Serve a checkpoint to OpenAI's clients, until Ctrl-C or SIGTERM.

    Needs the extra "server": pip install 'lfm2-fast[server]'. Without --api-key, every program that
    reaches the address may call. Several replicas need the extra "ray". With --ray-address the
    service stays in that cluster when the command ends; the same command updates it there.
    """
    for name, advice in REFUSED.items():
        value = context.params[name]
        if value is True or value not in (None, False, 1):
            raise ValueError(f"--{name.replace('_', '-')} is not supported: {advice}")
    from lfm2_fast.cli.terminal import Terminal
    from lfm2_fast.hf.loading import check_options
    from lfm2_fast.server.run import check_extra, check_settings

    check_extra()
    check_settings(served_model_name, api_key or (), memory, preset)
    template = None if chat_template is None else opt.read_text(chat_template, "--chat-template")
    loading = opt.loading_options(context)
    check_options(**loading)
    terminal = Terminal()
    if not (api_key or host.startswith(LOOPBACK)):
        terminal.note("without --api-key everyone who reaches this address may call")
    options: dict[str, Any] = {name: context.params[name] for name in SETTINGS} | {
        "api_key": api_key or (),
        "chat_template": template,
        "cors_origins": cors_origins or (),
        "adapters": _by_name(named_adapters or ()),
    }

    def ready(url: str) -> None:
        terminal.write(f"ready at {url}\n")

    scale = {name: context.params[name] for name in SCALE}
    if any(value is not None for value in scale.values()) or ray_address is not None:
        from lfm2_fast.cluster.serving import serve_replicas

        serve_replicas(
            {"model": model, "drain": drain, "prefix_routing": not no_prefix_routing}
            | scale
            | options
            | loading,
            host=host,
            port=port,
            address=ray_address,
            ready=ready,
        )
        return
    if no_prefix_routing:
        raise ValueError("--no-prefix-routing needs replicas: add --replicas or --ray-address")
    _serve_one(terminal, model, loading, options, (host, port), drain, ready)


def _serve_one(
    terminal: Terminal,
    model: str,
    loading: dict[str, Any],
    options: dict[str, Any],
    address: tuple[str, int],
    drain: int,
    ready: Callable[[str], None],
) -> None:
    """Serve one engine until Ctrl-C or SIGTERM; ``ready`` gets its URL."""
    from lfm2_fast.cli.session import load_both
    from lfm2_fast.server.run import bound_socket, create_app, run, url_of

    # A port in use is an error before the weights are loaded.
    with bound_socket(*address) as bound:
        loaded, tokenizer = load_both(terminal, model, **loading)
        app = create_app(loaded, tokenizer=tokenizer, **options)
        service = app.state.service
        terminal.note(f"sampling: {service.defaults.words}")
        terminal.note(str(service.engine.engine))
        _log_requests()
        run(app, bound, drain, lambda: ready(url_of(bound)))
        terminal.note("the server has stopped")


def _by_name(adapters: Sequence[str]) -> dict[str, str]:
    """Return the paths of adapters ``NAME=PATH`` by name. Raises ValueError for another form."""
    paths: dict[str, str] = {}
    for adapter in adapters:
        name, _, path = adapter.partition("=")
        if not name or not path:
            raise ValueError(f"--adapter {adapter!r} is not NAME=PATH: give a name and a path")
        if name in paths:
            raise ValueError(f"--adapter {name}= is given twice; give each adapter its own name")
        paths[name] = path
    return paths


def _log_requests() -> None:
    """Write the access log, and warnings of the server's library, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name, level in (("lfm2_fast.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
