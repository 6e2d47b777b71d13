"""``lfm2-fast batch``: a file of requests, answered without a server."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lfm2_fast.cli import options as opt


def batch(
    context: typer.Context,
    model: opt.Model,
    requests: Annotated[
        Path, typer.Argument(metavar="REQUESTS", help="File of requests: one JSON object a line.")
    ],
    output: Annotated[
        Path, typer.Option(help="File of the answers. Requests that it answers do not run again.")
    ],
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Take every Nth line, from the Ith on.")
    ] = "1/1",
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
    again: it continues, and runs no request twice. A line that is not a request gets an error.
    """
    from lfm2_fast.cli.terminal import Terminal
    from lfm2_fast.hf.loading import check_options
    from lfm2_fast.server.run import check_extra, create_app

    check_extra()
    from lfm2_fast.server.batch import Output, lines_of, run_batch, shard_of

    part = shard_of(shard)
    if not requests.is_file():
        raise ValueError(f"{requests} is not a file")
    template = None if chat_template is None else opt.read_text(chat_template)
    loading = opt.loading_options(context)
    check_options(**loading)
    terminal = Terminal()
    answers = Output(output)
    begin = time.perf_counter()
    try:
        terminal.note(f"loading {model}")
        app = create_app(
            model,
            served_model_name=served_model_name,
            max_rows=max_rows,
            max_model_len=max_model_len,
            memory=memory,
            max_queue=None,
            preset=preset,
            chat_template=template,
            **loading,
        )
        service = app.state.service
        terminal.note(f"sampling: {service.defaults.words}")

        async def work() -> Any:
            from tqdm import tqdm

            with tqdm(unit=" requests", disable=not terminal.err.is_terminal) as bar:

                def told(summary: Any) -> None:
                    bar.update(summary.answered - bar.n)
                    bar.set_postfix(failed=summary.failed, tokens=summary.new_tokens)

                lines = lines_of(requests, part)
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
