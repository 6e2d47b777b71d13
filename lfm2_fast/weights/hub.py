"""From a name to a folder: a local checkpoint as it is, a hub id through the hub's cache."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lfm2_fast.config import CheckpointError, Config
from lfm2_fast.weights.checkpoint import GENERATION_CONFIG, INDEX, shards, variant_of
from lfm2_fast.weights.formats import find_format
from lfm2_fast.weights.gguf_file import SPLIT, is_gguf, parts_of_split, split_name

# Options of ``find_checkpoint`` that say where on the hub a checkpoint is, and how it comes.
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


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ``options`` that ``find_checkpoint`` takes."""
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
    """The folder of checkpoint ``model``, downloaded into the hub's cache if it is a hub id.

    Of a GGUF checkpoint it is the file: ``model`` itself, ``gguf_file`` in the folder ``model`` or
    on the hub, or the only one of a folder that has no config.json. Of a file that was split, the
    first part is returned, and all are there.

    The config comes first and is checked before gigabytes follow; then only the generation config,
    the files in ``also`` where they exist, and, if ``weights``, those are fetched, all of one
    commit, with the hub's progress bars. HF_HUB_OFFLINE and the hub's other settings hold.
    ``subfolder`` is the checkpoint's folder inside of ``model``, ``variant`` a word in the names of
    its weights, and ``force_download`` fetches again what the cache has. Raises CheckpointError.
    """
    folder = Path(model)
    with suppress(RuntimeError):  # "~" of nobody
        folder = folder.expanduser()
    if folder.is_dir():
        folder /= subfolder
        if not folder.is_dir():
            raise CheckpointError(f"there is no folder {folder}; check subfolder={subfolder!r}")
        return _gguf_in(folder, gguf_file) or folder
    if folder.is_file():
        if not is_gguf(folder):
            raise CheckpointError(
                f"{folder} is a file; give the folder that holds config.json, or a GGUF file"
            )
        return parts_of_split(folder)[0]
    name = os.fspath(model)
    # Whatever cannot be OWNER/NAME was meant as a path.
    if name.count("/") != 1 or name.startswith(("/", ".", "~")) or os.sep != "/" and os.sep in name:
        raise CheckpointError(
            f"there is no folder {name!r}; give a checkpoint folder or a hub id like "
            "'LiquidAI/LFM2-1.2B'"
        )
    if gguf_file is not None:
        return _download_gguf(
            name,
            f"{subfolder}/{gguf_file}" if subfolder else gguf_file,
            {
                "revision": revision,
                "cache_dir": cache_dir,
                "token": token,
                "local_files_only": local_files_only,
                "force_download": force_download,
            },
        )
    return _download(
        name,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        force_download=force_download,
        subfolder=subfolder,
        variant=variant,
        weights=weights,
        also=also,
    )


def _gguf_in(folder: Path, name: str | None) -> Path | None:
    """Return the GGUF file that ``folder`` is to be loaded from, or None where it is safetensors.

    Raises CheckpointError where ``name`` is not there, and where one of several must be named.
    """
    if name is not None:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no file {name!r}; check gguf_file")
        return parts_of_split(folder / name)[0]
    if (folder / "config.json").is_file():
        return None
    firsts = sorted({parts_of_split(path)[0] for path in folder.glob("*.gguf")})
    if len(firsts) > 1:
        names = ", ".join(path.name for path in firsts)
        raise CheckpointError(f"{folder} has {len(firsts)} GGUF files: name one of {names}")
    return firsts[0] if firsts else None


def _download_gguf(repo: str, name: str, options: Mapping[str, Any]) -> Path:
    """Return a GGUF file of a repository in the hub's cache, with all parts of a split one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    found = SPLIT.fullmatch(name)
    names = [name]
    if found is not None:
        names = [split_name(found[1], i, int(found[3])) for i in range(int(found[3]))]
    paths = []
    for each in names:
        try:
            paths.append(Path(hf_hub_download(repo, each, **options)))
        except LocalEntryNotFoundError as error:
            raise _explained(repo, options["revision"], each, error) from error
        except EntryNotFoundError as error:
            raise CheckpointError(f"{repo} on the hub has no {each}; check gguf_file") from error
        except Exception as error:
            raise _explained(repo, options["revision"], each, error) from error
    return paths[0]


def _download(
    repo: str,
    *,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
    force_download: bool,
    subfolder: str,
    variant: str | None,
    weights: bool,
    also: Sequence[str],
) -> Path:
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cache_dir = None if cache_dir is None else Path(cache_dir)

    def fetch(name: str) -> Path | None:
        """The file in the cache, or None where the repository does not have it."""
        try:
            path = f"{subfolder}/{name}" if subfolder else name
            cached = try_to_load_from_cache(repo, path, cache_dir, revision)
            if cached is _CACHED_NO_EXIST and not force_download:
                return None
            return Path(
                hf_hub_download(
                    repo,
                    path,
                    force_download=force_download,
                    revision=revision,
                    cache_dir=cache_dir,
                    token=token,
                    local_files_only=local_files_only,
                )
            )
        except LocalEntryNotFoundError as error:
            if name != "config.json" and _is_offline(local_files_only):
                return None
            # The hub gave no answer, or refused one: that says nothing of what it has.
            raise _explained(repo, revision, name, error) from error
        except EntryNotFoundError:
            return None
        except Exception as error:
            raise _explained(repo, revision, name, error) from error

    path = fetch("config.json")
    if path is None:
        raise CheckpointError(f"{repo} on the hub has no config.json; it is no model checkpoint")
    whole = variant_of(find_format(Config.from_file(path).quantization, path).file, variant)
    listing = variant_of(INDEX, variant)
    revision = path.parents[len(Path(subfolder).parts)].name
    for name in (GENERATION_CONFIG, *also):
        fetch(name)
    if not weights:
        return path.parent
    if fetch(whole) is not None:
        return path.parent
    index = fetch(listing)
    missing: str | None = whole
    if index is not None:
        missing = next((name for name in shards(index) if fetch(name) is None), None)
    if missing is None:
        return path.parent
    if _is_offline(local_files_only):
        where, remedy = "the local cache", "connect to the network once to download it"
    else:
        where, remedy = "the hub", "lfm2_fast reads safetensors only"
    raise CheckpointError(f"{repo} has no {missing} in {where}; {remedy}")


def _is_offline(local_files_only: bool) -> bool:
    from huggingface_hub import constants

    return local_files_only or constants.HF_HUB_OFFLINE


def _explained(repo: str, revision: str | None, name: str, error: Exception) -> Exception:
    """The hub's exception as one sentence with what to do; a programming error stays itself."""
    from huggingface_hub import errors

    at = f"{repo} at revision {revision!r}" if revision else repo
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{repo} is gated: accept its terms on the hub, then log in or pass token=..."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{repo} is neither a folder here nor a model on the hub that you may read; check the "
            "name, and pass token=... if it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{at} does not exist on the hub; check revision")
    if isinstance(error, errors.HFValidationError):
        return CheckpointError(
            f"{repo!r} is neither a folder here nor a hub id like 'LiquidAI/LFM2-1.2B'"
        )
    if isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # an answer that the client took for no connection
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        lacking = ", or use local_files_only if it never had one" if name != "config.json" else ""
        return CheckpointError(
            f"{name} of {at} is not in the local cache and the hub cannot be reached (or offline "
            f"mode is on); connect once to download it, or give a folder{lacking}"
        )
    if isinstance(error, OSError) or type(error).__module__.split(".")[0].startswith("http"):
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return CheckpointError(
            f"could not download {name} of {at} ({reason}); try again, it goes on where it stopped"
        )
    return error
