"""Values of arguments, of the right type and range, or errors that name the argument."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def whole_number(value: Any) -> int | None:
    """Return ``value`` of any integer type as an int; None if it is not an integer."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def in_a_line(value: Any) -> str:
    """Return ``repr(value)`` if it is a short line, else the name of its class."""
    shown = repr(value)
    return shown if len(shown) < 80 and "\n" not in shown else f"<{type(value).__name__}>"


def callables(name: str, given: Any) -> list[Any]:
    """Return callables as a list. Raises TypeError, naming the argument, for anything else."""
    found = list(given) if isinstance(given, Iterable) else [None] if given is not None else []
    if not all(map(callable, found)):
        raise TypeError(
            f"{name} must be a list of callables, got {in_a_line(given)}: put each into the list"
        )
    return found


class Checked:
    """Reads values of the right type and range, or raises ValueError by name."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def flag(self, name: str) -> bool:
        """Return a value that is True or False; None is False."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
        return bool(value)

    def number(
        self,
        name: str,
        neutral: float,
        *,
        above: float = -math.inf,
        low: float = -math.inf,
        high: float = math.inf,
    ) -> float:
        """Return a finite number above or between bounds; None gives ``neutral``."""
        value = self.values.get(name)
        if value is None:
            return neutral
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if not (value > above and low <= value <= high):
            span = f"above {above:g}" if above > -math.inf else f"from {low:g} to {high:g}"
            hint = "; for greedy decoding use do_sample=False" if name == "temperature" else ""
            raise ValueError(f"{name} must be {span}, got {value!r}{hint}")
        return float(value)

    def count(self, name: str, *, least: int) -> int | None:
        """Return a whole number of at least ``least``, or None."""
        value = self.values.get(name)
        if value is None:
            return None
        found = whole_number(value)
        if found is None or found < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        return found

    def tokens(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Return token ids below ``vocab_size``: none, one or several."""
        value = self.values.get(name)
        if value is None:
            return ()
        found = value.tolist() if hasattr(value, "tolist") else value
        tokens = list(map(whole_number, found if isinstance(found, Sequence) else [found]))
        for token in tokens:
            if token is None or not 0 <= token < vocab_size:
                hint = "; None is for no such token" if token == -1 else ""
                raise ValueError(
                    f"{name} must be token ids from 0 to {vocab_size - 1}, got {value!r}{hint}"
                )
        return tuple(token for token in tokens if token is not None)

    def early_stopping(self) -> bool | str:
        """Return True, False or "never"."""
        value = self.values.get("early_stopping")
        if value is not None and not isinstance(value, bool) and value != "never":
            raise ValueError(f"early_stopping must be True, False or 'never', got {value!r}")
        return value or False

    def strings(self, name: str) -> tuple[str, ...]:
        """Return strings: none, one or several."""
        value = self.values.get(name)
        found = (value,) if isinstance(value, str) else tuple(value or ())
        if not all(isinstance(text, str) and text for text in found):
            raise ValueError(f"{name} must be a string or a list of strings, got {value!r}")
        return found
