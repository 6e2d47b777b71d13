"""serve(): a model as an HTTP service, in this thread until a signal, or in its own thread."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.memory import memory_amount
from lfm2_fast.hf.causal_lm import Lfm2ForCausalLM
from lfm2_fast.hf.load import load
from lfm2_fast.text.conversation import set_template
from lfm2_fast.text.presets import sampling
from lfm2_fast.text.tokenizer import load_tokenizer
from lfm2_fast.weights.adapter_hub import OPTIONS, find_adapter
from lfm2_fast.weights.hub import hub_options

if TYPE_CHECKING:
    from fastapi import FastAPI

# Default share of the free memory for pages.
CPU_MEMORY, GPU_MEMORY = "25%", "85%"
HOST, PORT, ROWS, QUEUE, DRAIN = "127.0.0.1", 8000, 16, 1024, 60
# Seconds that answers have to say that the server leaves, once it has waited for them.
FAREWELL = 5


def check_extra() -> None:
    """Raise ImportError, with the remedy, if the extra "server" is not installed."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the server needs the extra of that name ({error}): pip install 'lfm2-fast[server]'"
        ) from error


def check_settings(
    served_model_name: str | Sequence[str] | None,
    api_key: str | Sequence[str],
    memory: int | str | None,
    preset: str | None,
) -> None:
    """Raise ValueError for settings of ``create_app`` that are wrong for any model."""
    if not all(_several(served_model_name)):
        raise ValueError("served_model_name is an empty text: give a name, or leave it out")
    if not all(_several(api_key)):
        raise ValueError(
            "api_key is an empty text, which anyone can send: give a key, or leave it out"
        )
    if memory is not None:
        memory_amount(memory)
    sampling("", preset=preset)


def create_app(
    model: Lfm2ForCausalLM | str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    served_model_name: str | Sequence[str] | None = None,
    api_key: str | Sequence[str] = (),
    max_rows: int = ROWS,
    max_model_len: int | None = None,
    memory: int | str | None = None,
    max_queue: int | None = QUEUE,
    preset: str | None = None,
    chat_template: str | None = None,
    cors_origins: Sequence[str] = (),
    timeout: float | None = None,
    max_body: int = 16 * 2**20,
    page: bool = True,
    prompt_lookup: int = 0,
    drafter: str | os.PathLike[str] | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    load_adapters: bool = False,
    max_adapters: int | None = None,
    max_lora_rank: int | None = None,
    **loading: Any,
) -> FastAPI:
    """Return the service of a model as an application, to run alone or inside another one.

    ``model`` is a loaded one, or a name for ``load`` with the arguments ``loading``. ``tokenizer``
    is the checkpoint's by default. ``served_model_name`` are the names that clients may ask for;
    the default is the checkpoint's. ``api_key`` are keys; clients must send one of them. Without
    keys every client may call. ``max_rows``, ``max_model_len`` and ``memory`` are the engine's
    ``max_rows``, ``max_length`` and ``memory``. While ``max_queue`` continuations wait, requests
    are refused with 503. ``preset`` is the sampling of requests without settings. ``chat_template``
    is the text of a template. Pages of ``cors_origins`` may call. A request of more than
    ``timeout`` seconds, or a body of more than ``max_body`` bytes, is refused. ``prompt_lookup`` is
    the engine's, and ``drafter`` the folder or hub id of a DSpark drafter.

    ``adapters`` are LoRA adapters by the name that clients ask for as ``model``: folders or hub
    ids. With ``load_adapters`` clients may load others from any path, and unload them. Room for
    ``max_adapters`` of at most ``max_lora_rank`` is reserved, and more are refused; None is no
    limit.

    The application's ``state.service`` has a ``close``, which a server calls at its end; an
    application that this one is mounted in must call it. Raises ImportError without the extra
    "server", ValueError for an empty key, and what ``load`` and ``Engine`` raise.
    """
    check_extra()
    check_settings(served_model_name, api_key, memory, preset)
    from lfm2_fast.server.app import application
    from lfm2_fast.server.parameters import Defaults
    from lfm2_fast.server.service import Options, Service

    if not isinstance(model, Lfm2ForCausalLM):
        name = os.fspath(model)
        if tokenizer is None:
            tokenizer = load_tokenizer(name, **hub_options(loading))
        model = load(name, **loading)
    elif loading:
        name = sorted(loading)[0]
        raise TypeError(f"{name} is an argument of loading, and the model is loaded: leave it out")
    name = str(model.name_or_path or "lfm2")
    if tokenizer is None:
        tokenizer = load_tokenizer(name)
    if chat_template is not None:
        set_template(tokenizer, chat_template)
    if memory is None:
        memory = CPU_MEMORY if model.device.type == "cpu" else GPU_MEMORY
    config = model.network.config
    defaults = Defaults.of(name, model.generation_defaults(), config.vocab_size, preset)
    # Revision and subfolder are the base's.
    hub = {**hub_options(loading), "revision": None, "subfolder": ""}
    names = _several(served_model_name) or (_served_name(name),)
    options = Options(
        names,
        api_keys=_several(api_key),
        seconds=timeout,
        max_body=max_body,
        origins=tuple(cors_origins),
        page=page,
        loads_adapters=load_adapters,
        hub=hub,
    )
    if drafter is not None:
        model.load_drafter(drafter, **{each: hub[each] for each in OPTIONS if each in hub})
    if (max_adapters, max_lora_rank) != (None, None):
        model.network.adapters.limit(max_adapters, max_lora_rank)
    _load_adapters(model, adapters or {}, names, hub)
    engine = Engine(
        model,
        max_rows=max_rows,
        max_length=max_model_len,
        memory=memory,
        max_waiting=max_queue,
        prompt_lookup=prompt_lookup,
    )
    engine.warm_up([defaults.sampling])
    return application(Service(engine, tokenizer, defaults, options))


def _load_adapters(
    model: Lfm2ForCausalLM,
    adapters: Mapping[str, str | os.PathLike[str]],
    taken: Sequence[str],
    hub: Mapping[str, Any],
) -> None:
    """Load adapters by name, found with the options ``hub``. Raises ValueError for ``taken``."""
    network = model.network
    for name, path in adapters.items():
        if name in taken:
            raise ValueError(f"adapter {name!r} has the model's own name; give it another")
        network.adapters.load(find_adapter(path, **hub), name, network.embedding_norm.weight)


def _several(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def _served_name(name: str) -> str:
    """Return a folder's own name, or a hub id unchanged."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address but does not listen yet. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise OSError(
            f"cannot serve on {host} port {port}: {error.strerror or error}; choose another with "
            "--host or --port"
        ) from error
    return made


def url_of(bound: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class RunningServer:
    """Server in its own thread, at ``url``; ``close`` it, or use it as a context."""

    def __init__(self, app: FastAPI, bound: socket.socket, drain: int = DRAIN) -> None:
        self.app, self.url = app, url_of(bound)
        self._server = _server(app, drain)
        started = threading.Event()
        self._server.ready = started.set
        work = self._server.run
        self._thread = threading.Thread(
            target=work, kwargs={"sockets": [bound]}, name="lfm2_fast server", daemon=True
        )
        self._thread.start()
        while not started.wait(0.1):
            if not self._thread.is_alive():
                raise RuntimeError("the server did not start; its log says why")

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let running requests end, then stop. A second call does nothing."""
        self._server.should_exit = True
        self._thread.join()


def serve(
    model: Lfm2ForCausalLM | str | os.PathLike[str],
    *,
    host: str = HOST,
    port: int = PORT,
    background: bool = False,
    drain: int = DRAIN,
    **options: Any,
) -> RunningServer | None:
    """Serve a model over HTTP until Ctrl-C or SIGTERM; then requests that run may end.

    They have ``drain`` seconds for it. Port 0 is any free port. With ``background`` the server runs
    in a thread, and the call returns when it is ready. ``options`` are those of ``create_app``.
    Raises OSError if the address cannot be used, and the exceptions of ``create_app``.
    """
    check_extra()
    bound = bound_socket(host, port)
    try:
        app = create_app(model, **options)
        if background:
            return RunningServer(app, bound, drain)
        run(app, bound, drain, lambda: print(f"ready at {url_of(bound)}", flush=True))
    except BaseException:
        bound.close()
        raise
    bound.close()
    return None


def run(app: FastAPI, bound: socket.socket, drain: int, ready: Callable[[], None]) -> None:
    """Run an application in this thread until a signal, and call ``ready`` when it is ready.

    Raises KeyboardInterrupt after Ctrl-C; after SIGTERM it returns.
    """
    server = _server(app, drain)
    server.ready = ready
    # The library raises the signal once more at its end, which would kill the process.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, before)
        app.state.service.close()


def _server(app: FastAPI, drain: int) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        ready: Callable[[], None]

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                self.ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            loop = asyncio.get_running_loop()
            # The library's own end of a wait cuts answers off without a word. An engine that is
            # closed gives each an error, which ends it.
            close = app.state.service.close
            ending = loop.call_later(drain, loop.run_in_executor, None, close)
            try:
                await super().shutdown(sockets)
            finally:
                ending.cancel()

    config = uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=drain + FAREWELL,
    )
    return Server(config)
