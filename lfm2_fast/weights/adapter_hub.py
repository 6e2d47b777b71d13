"""Adapter's folder, from its name: a folder here, or a repository on the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lfm2_fast.config_values import CheckpointError
from lfm2_fast.weights import adapter, adapter_config
from lfm2_fast.weights.hub_files import Repository, folder_or_repository, looking_up

# Options for the place of an adapter or a drafter on the hub, and its download.
OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
# Those of ``find_adapter``: an adapter may be in a folder of its repository.
ADAPTER_OPTIONS = (*OPTIONS, "subfolder")


def find_adapter(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str = "",
    **_: Any,
) -> Path:
    """Return the folder of an adapter that PEFT saved, downloaded if ``name`` is a hub id.

    The options are those of ``hub.find_checkpoint``; a checkpoint's own are ignored. Raises
    CheckpointError.
    """
    options = revision, cache_dir, token, local_files_only, force_download, subfolder
    folder = folder_or_repository(name, *options)
    if isinstance(folder, Repository):
        return fetch_adapter(folder, weights=True)
    folder /= subfolder
    with looking_up(name):
        is_there = (folder / adapter_config.FILE).is_file()
    if not is_there:
        raise CheckpointError(
            f"{folder} has no {adapter_config.FILE}; give the folder that PEFT saved an adapter "
            "in, or a hub id"
        )
    return folder


def fetch_adapter(repository: Repository, *, weights: bool, also: Sequence[str] = ()) -> Path:
    """Return the folder of a repository's adapter in the hub's cache, all of one commit.

    Without ``weights`` its tensors are left out; files of ``also`` come where they exist. Raises
    CheckpointError.
    """
    config = repository.fetch(adapter_config.FILE, needed=True)
    if config is None:
        raise CheckpointError(
            f"{repository.name} on the hub has no {repository.path(adapter_config.FILE)}; it is no "
            "adapter of PEFT"
        )
    repository = repository.at_commit_of(config, adapter_config.FILE)
    for name in (*((adapter.FILE,) if weights else ()), *also):
        repository.fetch(name)
    return config.parent
