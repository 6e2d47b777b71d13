"""Tensors on a missing device: shared code of the stand-ins for GPUs and other devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map


class Refused(Exception):
    """Error for work that a device would not do. It is not a RuntimeError, which code may catch."""


class Elsewhere(torch.Tensor):
    """A tensor on the device; its numbers are those of ``numbers``, on the host.

    For C++ it is on the meta device, which has no memory to touch by mistake.
    """

    numbers: torch.Tensor

    @classmethod
    def of(cls, numbers: torch.Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device="meta",
        )
        made.numbers = numbers
        return made

    is_cpu = is_cuda = is_meta = property(lambda self: False)

    def __repr__(self, **_: Any) -> str:
        return f"{type(self).__name__}({self.numbers!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError("the device is not active in this thread")


def numbers_of(each: Any) -> Any:
    return each.numbers if isinstance(each, Elsewhere) else each


def given_back(
    result: Any, tensors: Sequence[torch.Tensor], wrap: Callable[[torch.Tensor], torch.Tensor]
) -> Any:
    """Return the result in the caller's form: a written tensor is the argument itself.

    ``tensors`` are the arguments; ``wrap`` puts what is new on its device.
    """
    known = {id(numbers_of(each)): each for each in tensors}

    def outer(each: Any) -> Any:
        if not isinstance(each, torch.Tensor):
            return each
        return known[id(each)] if id(each) in known else wrap(each)

    return tree_map(outer, result)
