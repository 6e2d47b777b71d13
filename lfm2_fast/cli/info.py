"""``lfm2-fast info``: facts about this machine and about a checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from lfm2_fast.cli import options as opt


def info(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Hub id or folder to describe.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
    device: opt.Device = "auto",
    backend: opt.Backend = "auto",
    revision: opt.Revision = None,
    gguf_file: opt.GGUFFile = None,
    local_files_only: opt.LocalFilesOnly = False,
    force_download: opt.ForceDownload = False,
) -> None:
    """Show versions, device, the backend of each operation, and why a faster one does not run.

    Only the config of MODEL is read, or the header of its GGUF file.
    """
    from lfm2_fast.cli.environment import checkpoint_facts, machine_facts, show

    facts = machine_facts(device, backend)
    if model is not None:
        facts |= checkpoint_facts(
            model,
            revision=revision,
            gguf_file=gguf_file,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    show(facts, as_json=json)
