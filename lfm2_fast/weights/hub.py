"""From a name to a folder: a local checkpoint, or a hub id through the hub's cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lfm2_fast.config import Config
from lfm2_fast.config_values import CheckpointError
from lfm2_fast.weights import adapter_config
from lfm2_fast.weights.adapter_config import AdapterConfig
from lfm2_fast.weights.adapter_hub import fetch_adapter
from lfm2_fast.weights.checkpoint import GENERATION_CONFIG
from lfm2_fast.weights.formats import find_format
from lfm2_fast.weights.gguf_file import SPLIT, is_gguf, parts_of_split, split_name
from lfm2_fast.weights.hub_files import Repository
from lfm2_fast.weights.safetensors_files import INDEX, shards, variant_of

# Options of ``find_checkpoint`` for the place of a checkpoint on the hub, and its download.
HUB_OPTIONS = (
    "revision",
    "cache_dir",
    "token",
    "local_files_only",
    "force_download",
    "subfolder",
    "variant",
    "gguf_file",
)
# A name with the type of a GGUF file behind it, as llama.cpp's users write one.
TAGGED = re.compile(r"(.+):([\w.-]+)", re.DOTALL | re.ASCII)
# GGUF files that hold no language model of their own.
BESIDE = re.compile(r"(mmproj|imatrix|mtp-|eagle3-|dflash-|dspark-)[^/]*$", re.IGNORECASE)


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``options`` that ``find_checkpoint`` takes."""
    return {name: options[name] for name in HUB_OPTIONS if name in options}


def find_checkpoint(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str = "",
    variant: str | None = None,
    gguf_file: str | None = None,
    weights: bool = True,
    also: Sequence[str] = (),
) -> Path:
    """Return the folder of checkpoint ``model``. A hub id is downloaded into the hub's cache.

    For a GGUF checkpoint the result is the file. This is ``model`` itself, ``gguf_file`` in the
    folder ``model`` or on the hub, or the only one without a config.json. If ``model`` ends in
    ":TYPE", it is the file with the type TYPE in its name. For a split file the result is the first
    part, and all parts are there.

    A folder that holds only an adapter is a result too. Of a repository with an adapter, the result
    has the adapter and no other weights.

    The config is downloaded and checked before gigabytes follow. Then come the generation config,
    the files in ``also`` that exist, and the weights if ``weights`` is true. All are of one commit.
    The hub's progress bars are shown, and its settings like HF_HUB_OFFLINE apply. ``subfolder`` is
    the checkpoint's folder inside of ``model``, ``variant`` a word in the names of its weights.
    ``force_download`` downloads files again that the cache has. Raises CheckpointError.
    """
    name, tag = os.fspath(model), None
    if (tagged := TAGGED.fullmatch(name)) and not Path(name).exists():
        name, tag = tagged[1], tagged[2]
        if gguf_file is not None:
            raise CheckpointError(
                f"{os.fspath(model)!r} names a GGUF type, and gguf_file={gguf_file!r} a file: give "
                "one of them"
            )
    found = _on_disk(name, subfolder, gguf_file, tag)
    if found is not None:
        return found
    repository = Repository(
        name, revision, cache_dir, token, local_files_only, force_download, subfolder
    )
    if gguf_file is not None:
        return _download_gguf(repository, gguf_file)
    return _from_hub(repository, tag, variant, weights=weights, also=also)


def _on_disk(name: str, subfolder: str, gguf_file: str | None, tag: str | None) -> Path | None:
    """Return the folder or GGUF file that ``name`` is; None if it can be a hub id."""
    folder = Path(name)
    with suppress(RuntimeError):  # "~" of an unknown user
        folder = folder.expanduser()
    if folder.is_dir():
        folder /= subfolder
        if not folder.is_dir():
            raise CheckpointError(f"there is no folder {folder}; check subfolder={subfolder!r}")
        return _gguf_in(folder, gguf_file, tag) or folder
    if folder.is_file():
        if not is_gguf(folder):
            raise CheckpointError(
                f"{folder} is a file; give the folder that holds config.json, or a GGUF file"
            )
        return parts_of_split(folder)[0]
    # A name that cannot be OWNER/NAME was meant as a path.
    if name.count("/") != 1 or name.startswith(("/", ".", "~")) or os.sep != "/" and os.sep in name:
        raise CheckpointError(
            f"there is no folder {name!r}; give a checkpoint folder or a hub id like "
            "'LiquidAI/LFM2-1.2B'"
        )
    return None


def _from_hub(
    repository: Repository,
    tag: str | None,
    variant: str | None,
    *,
    weights: bool,
    also: Sequence[str],
) -> Path:
    """Download a repository's checkpoint, adapter, or GGUF file of the type ``tag``."""
    name = repository.name
    # A config.json in a repository of GGUF files is there to have downloads counted.
    if tag is None and ("gguf" not in name.lower() or variant is not None):
        config = repository.fetch("config.json", needed=True)
        if config is not None and repository.fetch(adapter_config.FILE) is not None:
            # As Hugging Face does: the adapter counts, with the base that it names.
            return fetch_adapter(repository, weights=weights, also=also)
        if config is not None:
            return _download(repository, config, variant, weights=weights, also=also)
    names = repository.names()
    if tag is None and adapter_config.FILE in names and "config.json" not in names:
        return fetch_adapter(repository, weights=weights, also=also)
    whole = tag is None and any(each.endswith(".safetensors") for each in names)
    found = None if whole else _choose(names, tag, name)
    if found is not None:
        return _download_gguf(repository, found)
    config = repository.fetch("config.json", needed=True)
    if config is None or tag is not None:
        lacks = "no config.json and no GGUF file; it is not a model checkpoint"
        raise CheckpointError(
            f"{name} on the hub has {'no GGUF file' if tag else lacks}"
            + (f"; those of LiquidAI's models are in repositories like {name}-GGUF" if tag else "")
        )
    return _download(repository, config, variant, weights=weights, also=also)


def find_base(folder: Path, **options: Any) -> Path:
    """Return the folder of the base that the adapter in ``folder`` names.

    ``options`` are those of ``find_checkpoint``. The place of the adapter in its repository does
    not count for the base. Raises CheckpointError.
    """
    fields = AdapterConfig.from_file(folder / adapter_config.FILE)
    if not fields.base:
        raise CheckpointError(
            f"{folder} holds an adapter that does not name its base: load the base, with "
            f"adapter={str(folder)!r}"
        )
    own = ("subfolder", "variant", "gguf_file")
    kept = {name: value for name, value in options.items() if name not in own}
    return find_checkpoint(fields.base, **{**kept, "revision": fields.revision})


def _gguf_in(folder: Path, name: str | None, tag: str | None) -> Path | None:
    """Return the GGUF file to load from ``folder``, or None if it has safetensors.

    Raises CheckpointError if ``name`` does not exist, or if there are several files and no name.
    """
    if name is not None:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no file {name!r}; check gguf_file")
        return parts_of_split(folder / name)[0]
    if tag is None and (folder / "config.json").is_file():
        return None
    found = _choose((path.name for path in folder.glob("*.gguf")), tag, str(folder))
    if found is None and tag is not None:
        raise CheckpointError(f"{folder} has no GGUF file, and {tag!r} asks for one")
    return None if found is None else parts_of_split(folder / found)[0]


def _choose(names: Iterable[str], tag: str | None, where: str) -> str | None:
    """Return the one GGUF file among ``names`` that ``tag`` means; None if there is no GGUF file.

    A split file counts once. Raises CheckpointError, which lists the files, if several or none fit.
    """
    firsts = set()
    for name in names:
        if name.endswith(".gguf") and not BESIDE.search(name):
            part = SPLIT.fullmatch(name)
            firsts.add(split_name(part[1], 0, int(part[3])) if part else name)
    if not firsts:
        return None
    fits = sorted(firsts)
    if tag is not None:
        pattern = re.compile(rf"(?:^|[-._/]){re.escape(tag)}[.-]", re.IGNORECASE)
        fits = [name for name in fits if pattern.search(name)]
    if len(fits) == 1:
        return fits[0]
    if not fits:
        raise CheckpointError(
            f"{where} has no GGUF file of type {tag!r}; it has {', '.join(sorted(firsts))}"
        )
    raise CheckpointError(
        f"{where} has {len(fits)} GGUF files: name one of {', '.join(fits)} (gguf_file, or a type "
        "behind a colon, like :Q4_K_M)"
    )


def _download_gguf(repository: Repository, name: str) -> Path:
    """Return a GGUF file of a repository in the hub's cache, with all parts of a split one."""
    found = SPLIT.fullmatch(name)
    names = [name]
    if found is not None:
        names = [split_name(found[1], i, int(found[3])) for i in range(int(found[3]))]
    first = None
    for each in names:
        path = repository.fetch(each, needed=True)
        if path is None:
            raise CheckpointError(f"{repository.name} on the hub has no {each}; check gguf_file")
        if first is None:
            first, repository = path, repository.at_commit_of(path, each)
    if first is None:
        raise CheckpointError(
            f"gguf_file={name!r} names a split file without parts; check the name"
        )
    return first


def _download(
    repository: Repository,
    config: Path,
    variant: str | None,
    *,
    weights: bool,
    also: Sequence[str],
) -> Path:
    """Return the folder, in the hub's cache, of a checkpoint whose ``config`` is there."""
    repository = repository.at_commit_of(config, "config.json")
    whole = variant_of(find_format(Config.from_file(config).quantization, config).file, variant)
    listing = variant_of(INDEX, variant)
    for name in (GENERATION_CONFIG, *also):
        repository.fetch(name)
    if not weights:
        return config.parent
    if repository.fetch(whole) is not None:
        return config.parent
    index = repository.fetch(listing)
    missing: str | None = whole
    if index is not None:
        missing = next((name for name in shards(index) if repository.fetch(name) is None), None)
    if missing is None:
        return config.parent
    if repository.is_offline:
        where, remedy = "the local cache", "connect to the network once to download it"
    else:
        where, remedy = "the hub", "lfm2_fast reads safetensors only"
    raise CheckpointError(f"{repository.name} has no {missing} in {where}; {remedy}")
