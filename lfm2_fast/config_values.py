"""Values of a checkpoint's JSON files, or errors that say what is wrong with them, and where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any

# Advice for a file that is broken.
FETCH_AGAIN = "replace it; force_download=True (--force-download) fetches it from the hub again"


class CheckpointError(ValueError):
    """Error of a checkpoint that cannot be used: what is wrong, where, and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``. Raises CheckpointError if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist; a checkpoint folder holds config.json and model.safetensors"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; {FETCH_AGAIN}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(found).__name__}")
    return found


class Reader:
    """Reads a config's values under any of several names, with errors that say where."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source

    def error(self, message: str) -> CheckpointError:
        """Return the error of ``message``, which names the source."""
        return CheckpointError(f"{self.source}: {message}")

    def value(self, *names: str, default: Any = None) -> Any:
        """Return the first value that is not null."""
        for name in names:
            if self.raw.get(name) is not None:
                return self.raw[name]
        return default

    def count(self, *names: str, default: int | None = None) -> int:
        """Return a positive whole number."""
        found = self.value(*names, default=default)
        if found is None:
            raise self.error(f"{names[0]} is missing")
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise self.error(f"{names[0]} must be a positive whole number, not {found!r}")
        return found

    def number(self, *names: str, default: float | None = None) -> float:
        """Return a positive number."""
        found = self.value(*names, default=default)
        if found is None:
            raise self.error(f"{names[0]} is missing")
        if not _is_positive(found):
            raise self.error(f"{names[0]} must be a positive number, not {found!r}")
        return float(found)

    def flag(self, *names: str, default: bool) -> bool:
        """Return true or false."""
        found = self.value(*names, default=default)
        if not isinstance(found, bool):
            raise self.error(f"{names[0]} must be true or false, not {found!r}")
        return found

    def items(self, name: str) -> list[Any] | None:
        """Return a list, or None."""
        found = self.value(name)
        if found is not None and not isinstance(found, list):
            raise self.error(f"{name} must be a list, not {found!r}")
        return found

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """Return ``count`` positive numbers."""
        found = self.items(name)
        if found is None:
            raise self.error(f"{name} is missing")
        if len(found) != count or not all(map(_is_positive, found)):
            raise self.error(f"{name} must be {count} positive numbers, not {found!r}")
        return tuple(map(float, found))

    def token(self, name: str) -> int | None:
        """Return a token id, or None."""
        found = self.value(name)
        if found is not None and (not isinstance(found, int) or isinstance(found, bool)):
            raise self.error(f"{name} must be a token id, not {found!r}")
        return found


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < inf
