"""Tape: operations on fixed tensors, recorded once and replayed without the Python between them.

What a captured graph is to a GPU, this is to a CPU, where a step's matrices are so fast that the
model's Python shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

# What they make has no content that a replay would have to renew.
_EMPTY = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)


class Tape:
    """``record`` a function that works on fixed tensors; ``replay`` does again what it did.

    Inputs are renewed in place by the caller; the function's result, and all that was made on the
    way, is renewed in place by ``replay``. What Python decided while it was recorded stays decided.
    """

    def __init__(self) -> None:
        self._calls: list[Call] = []

    def record(self, function: Callable[[], Any]) -> Any:
        """Run ``function`` once, and give what it gives.

        Raises ValueError for an operation whose result has a size, or is a Python number, that
        depends on what tensors hold: a replay could not repeat it.
        """
        self._calls = []
        with _Recorder(self._calls):
            return function()

    def replay(self) -> None:
        """Run the recorded operations again, on what the same tensors hold now."""
        for operation, arguments, named in self._calls:
            operation(*arguments, **named)


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        made = func(*args, **named)
        if func in _EMPTY:
            return made
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        if tags & set(func.tags):
            raise ValueError(f"{func} waits for what tensors hold, which cannot be replayed")
        aliases = [result.alias_info for result in func._schema.returns]
        if func._schema.is_mutable:
            self._calls.append((func, args, named))
        elif isinstance(made, torch.Tensor | tuple | list) and None in aliases:
            self._calls.append((_renew, (made, func, args, named), {}))
        return made


def _renew(
    made: Any, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """Put what ``func`` gives now into the tensors that it made when it was recorded."""
    again = func(*args, **named)
    pairs = [(made, again)] if isinstance(made, torch.Tensor) else zip(made, again, strict=True)
    for old, new in pairs:
        old.copy_(new)
