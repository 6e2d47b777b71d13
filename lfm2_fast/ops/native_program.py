"""Programs: recorded calls of native operations, joined to one call.

Between the calls of a list, Python needs its lock. In a server another thread often has it, and the
processor waits. One call that runs them all needs the lock once, and costs less.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch

from lfm2_fast.ops.native_library import SCHEMAS

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

NAMES = {f"lfm2_fast::{schema.split('(')[0]}" for schema in SCHEMAS}
# Kinds of arguments, as in csrc/replay.cpp.
NONE, TENSOR, OPTIONAL_TENSOR, INT, OPTIONAL_INT, FLOAT, BOOL = range(7)
KINDS = {
    "Tensor": TENSOR,
    "Optional[Tensor]": OPTIONAL_TENSOR,
    "int": INT,
    "Optional[int]": OPTIONAL_INT,
    "float": FLOAT,
    "bool": BOOL,
}


def joined(calls: Sequence[Call]) -> list[Call]:
    """Return calls that do the same, in which each run of native ones on a CPU is one call."""
    found: list[Call] = []
    for native, group in groupby(calls, _is_native):
        run = list(group)
        found += [_program(run)] if native else run
    return found


def _is_native(call: Call) -> bool:
    operation, arguments, named = call
    schema = getattr(operation, "_schema", None)
    if schema is None or schema.name not in NAMES:
        return False
    tensors = [each for each in (*arguments, *named.values()) if isinstance(each, torch.Tensor)]
    return all(each.device.type == "cpu" for each in tensors)


def _program(calls: Sequence[Call]) -> Call:
    """Return one call that runs native ones in order."""
    names: dict[str, int] = {}
    tensors: dict[int, tuple[int, torch.Tensor]] = {}
    numbers: list[int] = []
    for operation, arguments, named in calls:
        schema = operation._schema  # type: ignore[attr-defined]
        name = schema.name.removeprefix("lfm2_fast::")
        numbers += [names.setdefault(name, len(names)), len(schema.arguments)]
        given = dict(zip((each.name for each in schema.arguments), arguments, strict=False)) | named
        for each in schema.arguments:
            value, kind = given[each.name], KINDS[str(each.type)]
            if value is None:
                numbers.append(NONE)
            elif isinstance(value, torch.Tensor):
                place, _ = tensors.setdefault(id(value), (len(tensors), value))
                numbers += [kind, place]
            elif kind == FLOAT:
                numbers += [kind, *struct.unpack("q", struct.pack("d", value))]
            else:
                numbers += [kind, int(value)]
    program = torch.tensor(numbers, dtype=torch.int64)
    operands = [tensor for _, tensor in tensors.values()]
    replay = torch.ops.lfm2_fast.replay_native.default
    return replay, (operands, program, ascii_tensor(" ".join(names))), {}


def ascii_tensor(text: str) -> torch.Tensor:
    """Return the characters of a text in ASCII."""
    return torch.tensor(list(text.encode("ascii")), dtype=torch.uint8)
