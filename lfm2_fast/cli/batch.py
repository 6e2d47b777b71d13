"""``lfm2-fast batch``: a file of requests, answered without a server."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lfm2_fast.cli import options as opt

# Options of a batch on Ray.
ON_RAY = ("ray_address", "replicas", "cpus_per_replica", "gpus_per_replica", "rows_per_block")


def batch(
    context: typer.Context,
    model: opt.Model,
    requests: Annotated[
        str, typer.Argument(metavar="REQUESTS", help="File of requests: one JSON object a line.")
    ],
    output: Annotated[
        str, typer.Option(help="File of the answers. Requests that it answers do not run again.")
    ],
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Take every Nth line, from the Ith on.")
    ] = "1/1",
    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Use Ray Data: REQUESTS may be a folder, .parquet or a URL; OUTPUT a folder.",
        ),
    ] = False,
    ray_address: opt.RayAddress = None,
    replicas: opt.Replicas = None,
    cpus_per_replica: opt.CpusPerReplica = None,
    gpus_per_replica: opt.GpusPerReplica = None,
    rows_per_block: Annotated[
        int | None,
        typer.Option(min=1, help="With --ray: requests written together; else 4 times --max-rows."),
    ] = None,
    served_model_name: opt.ServedModelName = None,
    max_rows: opt.MaxRows = 16,
    max_model_len: opt.MaxModelLen = None,
    memory: opt.Memory = None,
    preset: opt.Preset = None,
    chat_template: opt.ChatTemplate = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    backend: opt.Backend = "auto",
    quantization: opt.Quantization = None,
    revision: opt.Revision = None,
    gguf_file: opt.GGUFFile = None,
    adapter: opt.Adapter = None,
    local_files_only: opt.LocalFilesOnly = False,
    force_download: opt.ForceDownload = False,
) -> None:
    """Answer the requests of a file in OpenAI's batch format, and write each answer as a line.

    Needs the extra "server": pip install 'lfm2-fast[server]'. After a crash, run the same command
    again: it continues, and runs no request twice. A line that is not a request gets an error. With
    --ray many engines answer, on the cores and GPUs of a cluster; that needs the extra "ray" too.
    """
    from lfm2_fast.cli.terminal import Terminal
    from lfm2_fast.hf.loading import check_options
    from lfm2_fast.server.run import check_extra, create_app

    check_extra()
    from lfm2_fast.server.batch import Output, lines_of, run_batch, shard_of

    part = shard_of(shard)
    on_ray = {name: context.params[name] for name in ON_RAY}
    if ray and part != (1, 1):
        raise ValueError(f"--shard {shard} is for batches without --ray, which shares them out")
    for name, value in on_ray.items():
        if not ray and value is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for --ray")
    if not (Path(requests).is_file() or ray and ("://" in requests or Path(requests).exists())):
        raise ValueError(f"{requests} is not a file")
    template = None if chat_template is None else opt.read_text(chat_template)
    loading = opt.loading_options(context)
    check_options(**loading)
    options = {
        "model": model,
        "served_model_name": served_model_name,
        "max_rows": max_rows,
        "max_model_len": max_model_len,
        "memory": memory,
        "preset": preset,
        "chat_template": template,
        **loading,
    }
    if ray:
        from lfm2_fast.cluster.batch import run_batch_on_ray
        from lfm2_fast.cluster.scale import Scale

        scale = Scale(replicas, None, None, None, cpus_per_replica, gpus_per_replica)
        run_batch_on_ray(
            requests, output, options, scale, address=ray_address, rows_per_block=rows_per_block
        )
        Terminal().note(f"the answers are in {output}")
        return
    terminal = Terminal()
    answers = Output(Path(output))
    begin = time.perf_counter()
    try:
        terminal.note(f"loading {model}")
        app = create_app(**options, max_queue=None)
        service = app.state.service
        terminal.note(f"sampling: {service.defaults.words}")

        async def work() -> Any:
            from tqdm import tqdm

            with tqdm(unit=" requests", disable=not terminal.err.is_terminal) as bar:

                def told(summary: Any) -> None:
                    bar.update(summary.answered - bar.n)
                    bar.set_postfix(failed=summary.failed, tokens=summary.new_tokens)

                lines = lines_of(Path(requests), part)
                return await run_batch(service, lines, answers, at_once=2 * max_rows, told=told)

        try:
            summary = asyncio.run(work())
        except KeyboardInterrupt:
            terminal.note(f"stopped; the same command continues {output}")
            raise
        finally:
            service.close()
    finally:
        answers.close()
    seconds = time.perf_counter() - begin
    terminal.note(
        f"{summary.answered} answered in {seconds:.1f} s, {summary.failed} of them with an error, "
        f"{summary.kept} were there before; {summary.prompt_tokens} prompt tokens, "
        f"{summary.new_tokens} new ones at {summary.new_tokens / seconds:.0f} tokens/s"
    )
