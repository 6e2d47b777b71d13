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
    from lfm2_fast.hf.loading import check_options
    from lfm2_fast.server.run import check_extra

    check_extra()
    from lfm2_fast.server.batch import shard_of

    part = shard_of(shard)
    if ray and part != (1, 1):
        raise ValueError(
            f"--shard {shard} has no effect with --ray, which divides the requests itself: leave "
            "it out"
        )
    for name in ON_RAY:
        if not ray and context.params[name] is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for --ray: add --ray, or leave it out")
    if not (Path(requests).is_file() or ray and ("://" in requests or Path(requests).exists())):
        raise ValueError(f"REQUESTS: there is no file {requests!r}; give a file of JSON lines")
    if not ray:
        opt.check_new_file(Path(output), "--output")
    template = None if chat_template is None else opt.read_text(chat_template, "--chat-template")
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
        _answer_on_ray(requests, output, options, context.params)
    else:
        _answer_here(Path(requests), Path(output), options, part)


def _answer_on_ray(
    requests: str, output: str, options: dict[str, Any], params: dict[str, Any]
) -> None:
    """Answer the requests on a Ray cluster; ``params`` has the options ``ON_RAY``."""
    from lfm2_fast.cli.terminal import Terminal
    from lfm2_fast.cluster.batch import run_batch_on_ray
    from lfm2_fast.cluster.scale import Scale

    scale = Scale(
        params["replicas"],
        cpus_per_replica=params["cpus_per_replica"],
        gpus_per_replica=params["gpus_per_replica"],
    )
    run_batch_on_ray(
        requests,
        output,
        options,
        scale,
        address=params["ray_address"],
        rows_per_block=params["rows_per_block"],
    )
    Terminal().note(f"the answers are in {output}")


def _answer_here(
    requests: Path, output: Path, options: dict[str, Any], shard: tuple[int, int]
) -> None:
    """Answer the requests of a shard with one engine, and show progress and totals."""
    from tqdm import tqdm

    from lfm2_fast.cli.terminal import Terminal
    from lfm2_fast.server.batch import Output, Summary, lines_of, run_batch
    from lfm2_fast.server.run import create_app

    terminal = Terminal()
    answers = Output(output)
    begin = time.perf_counter()
    try:
        terminal.note(f"loading {options['model']}")
        service = create_app(**options, max_queue=None).state.service
        terminal.note(f"sampling: {service.defaults.words}")

        async def work() -> Summary:
            with tqdm(unit=" requests", disable=not terminal.err.is_terminal) as bar:

                def progress(summary: Summary) -> None:
                    bar.update(summary.answered - bar.n)
                    bar.set_postfix(failed=summary.failed, tokens=summary.new_tokens)

                lines, rows = lines_of(requests, shard), options["max_rows"]
                return await run_batch(service, lines, answers, at_once=2 * rows, progress=progress)

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
