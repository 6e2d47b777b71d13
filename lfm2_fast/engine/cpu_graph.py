"""CpuGraph: operations on fixed tensors, recorded once and replayed without Python between them.

It does for a CPU what a captured graph does for a GPU. A decode step's matrices are so fast there
that the model's Python would show.
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


class CpuGraph:
    """Operations of ``body`` on fixed tensors: run and recorded once, then replayed.

    Between replays the caller renews the inputs in place; all that the body made is renewed in
    place too. What Python decided while the body was recorded stays decided.
    """

    def __init__(self, body: Callable[[], None]) -> None:
        self._body: Callable[[], None] | None = body
        self._calls: list[Call] | None = None

    def replay(self) -> None:
        """Replay the recorded operations. The first call runs and records the body.

        Raises ValueError then for an operation whose result has a size, or is a Python number, that
        depends on what tensors hold: no later replay could repeat it.
        """
        if self._calls is None:
            assert self._body is not None
            calls: list[Call] = []
            with _Recorder(calls):
                self._body()
            # The body holds what made the graph, often in a circle.
            self._calls, self._body = calls, None
            return
        for operation, arguments, named in self._calls:
            operation(*arguments, **named)


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self._calls = calls

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch imports its whole compiler to keep that out of here, which nothing brings
        # in: the second token of a process would wait a second for it.
        return False

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
