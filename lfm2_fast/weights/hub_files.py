"""One repository on the hub: its files, each through the hub's cache, and their names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lfm2_fast.config_values import CheckpointError

# Name of the hub's list of a repository's files, in messages.
LISTING = "the list of files"


@dataclass(frozen=True)
class Repository:
    """Repository's folder ``subfolder`` at a revision; the fields are the hub's options."""

    name: str
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str = ""

    @property
    def is_offline(self) -> bool:
        """Return True if the hub must not be asked."""
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE

    @property
    def _cache(self) -> Path | None:
        return None if self.cache_dir is None else Path(self.cache_dir)

    def at_commit_of(self, path: Path, name: str) -> Repository:
        """Return this repository at the commit of its file ``name``, which lies at ``path``."""
        depth = len(Path(self.subfolder, name).parts)
        return replace(self, revision=path.parents[depth - 1].name)

    def path(self, name: str) -> str:
        """Return the path of the file ``name`` in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def fetch(self, name: str, *, needed: bool = False) -> Path | None:
        """Return a file in the hub's cache, or None if the repository does not have it.

        Offline, None also means that the cache does not have it, unless the file is ``needed``.
        Raises CheckpointError if the hub does not answer, or refuses to.
        """
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        path = self.path(name)
        try:
            cached = try_to_load_from_cache(self.name, path, self._cache, self.revision)
            if cached is _CACHED_NO_EXIST and not self.force_download:
                return None
            return Path(
                hf_hub_download(
                    self.name,
                    path,
                    force_download=self.force_download,
                    revision=self.revision,
                    cache_dir=self._cache,
                    token=self.token,
                    local_files_only=self.local_files_only,
                )
            )
        except LocalEntryNotFoundError as error:
            if not needed and self.is_offline:
                return None
            # The hub did not answer, or refused to. The file may exist.
            raise self._explained(name, error, optional=not needed) from error
        except EntryNotFoundError:
            return None
        except Exception as error:
            raise self._explained(name, error) from error

    def names(self) -> list[str]:
        """Return the names of all files; those in the cache if the hub cannot be asked.

        Raises CheckpointError if neither knows the repository.
        """
        from huggingface_hub import HfApi, errors, snapshot_download

        inside = f"{self.subfolder}/" if self.subfolder else ""
        refused: Exception | None = None
        if not self.is_offline:
            try:
                found: Sequence[str] = HfApi().list_repo_files(
                    self.name, revision=self.revision, token=self.token
                )
            except Exception as error:
                if isinstance(error, errors.HfHubHTTPError) or not _is_network(error):
                    raise self._explained(LISTING, error) from error
                refused = error
            else:
                return _inside(inside, found)
        with suppress(errors.LocalEntryNotFoundError, errors.HFValidationError):
            folder = snapshot_download(
                self.name,
                revision=self.revision,
                cache_dir=self._cache,
                local_files_only=True,
            )
            paths = (path for path in Path(folder).rglob("*") if path.is_file())
            return _inside(inside, [path.relative_to(folder).as_posix() for path in paths])
        raise self._explained(LISTING, errors.LocalEntryNotFoundError("")) from refused

    def _explained(self, name: str, error: Exception, *, optional: bool = False) -> Exception:
        """Return the hub's exception as a sentence with a remedy; a programming error unchanged."""
        from huggingface_hub import errors

        repo, revision = self.name, self.revision
        at = f"{repo} at revision {revision!r}" if revision else repo
        if isinstance(error, errors.GatedRepoError):
            return CheckpointError(
                f"{repo} is gated: accept its terms on the hub, then log in or pass token=..."
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return CheckpointError(
                f"{repo} is neither a folder here nor a model on the hub that you may read; check "
                "the name, and pass token=... if it is private"
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
            lacking = ", or use local_files_only if it never had one" if optional else ""
            return CheckpointError(
                f"{name} of {at} is not in the local cache and the hub cannot be reached (or "
                f"offline mode is on); connect once to download it, or give a folder{lacking}"
            )
        if _is_network(error):
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return CheckpointError(
                f"could not download {name} of {at} ({reason}); try again, it goes on where it "
                "stopped"
            )
        return error


def _is_network(error: Exception) -> bool:
    """Return True for an error of the network, the file system or the HTTP client."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0].startswith("http")


def _inside(folder: str, names: Sequence[str]) -> list[str]:
    """Return the names in a folder, without the folder's, sorted."""
    return sorted(name.removeprefix(folder) for name in names if name.startswith(folder))


def folder_or_repository(name: str | os.PathLike[str], *options: Any) -> Path | Repository:
    """Return the folder ``name`` if it exists, or the repository of that name.

    ``options`` are the fields of the repository after its name. A name of one part, or one that
    begins like a path, is a folder's name even if the folder is missing. Raises CheckpointError for
    a name that cannot be looked up.
    """
    folder, text = Path(name), os.fspath(name)
    with suppress(RuntimeError):  # "~" of an unknown user
        folder = folder.expanduser()
    with looking_up(name):
        if folder.is_dir() or text.count("/") != 1 or text.startswith(("/", ".", "~")):
            return folder
    return Repository(text, *options)


@contextmanager
def looking_up(name: str | os.PathLike[str]) -> Iterator[None]:
    """Raise CheckpointError for a name that is too long, or a folder that may not be read."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{os.fspath(name)[:200]} cannot be read: {error.strerror}"
        ) from error
