"""CpuGraph: operations on fixed tensors, recorded once and replayed without Python between them.

It is the CPU's counterpart of a captured CUDA graph. Without it, the model's Python would take a
noticeable part of a decode step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lfm2_fast.ops.native_program import Call, joined

# The results of these operations have no content, so a replay need not run them.
_EMPTY = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)


class CpuGraph:
    """Operations of ``body`` on fixed tensors: run and recorded once, then replayed.

    Between replays the caller changes the inputs in place. A replay changes the body's results in
    place too. Branches that Python took during the recording stay fixed. ``recorded`` lists the
    operations one by one; a replay runs adjacent native ones as one call.
    """

    def __init__(self, body: Callable[[], None]) -> None:
        self._body: Callable[[], None] | None = body
        self.recorded: list[Call] | None = None
        self._calls: list[Call] = []

    def replay(self) -> None:
        """Replay the recorded operations. The first call runs and records the body.

        The first call raises ValueError if the size of a result, or a Python number, depends on the
        content of tensors: a replay could not repeat it.
        """
        if self.recorded is None:
            assert self._body is not None
            calls: list[Call] = []
            with _Recorder(calls):
                self._body()
            # The body refers to the objects that made the graph, often in a circle.
            self.recorded, self._calls, self._body = calls, joined(calls), None
            return
        for operation, arguments, named in self._calls:
            operation(*arguments, **named)


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self._calls = calls

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch imports its whole compiler here, only to exclude it. That would delay the
        # second token of a process by a second.
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
            raise ValueError(f"{func} depends on the content of tensors, which cannot be replayed")
        aliases = [result.alias_info for result in func._schema.returns]
        if func._schema.is_mutable:
            self._calls.append((func, args, named))
        elif isinstance(made, torch.Tensor | tuple | list) and None in aliases:
            self._calls.append((_renew, (made, func, args, named), {}))
        return made


def _renew(
    made: Any, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """Call ``func`` again and copy its results into the tensors of the recording."""
    again = func(*args, **named)
    pairs = [(made, again)] if isinstance(made, torch.Tensor) else zip(made, again, strict=True)
    for old, new in pairs:
        old.copy_(new)
