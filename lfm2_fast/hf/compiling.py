"""torch.compile on the model's methods: accepted, without effect, because kernels are compiled.

torch's compiler is slow to import, so it is imported only after a caller has used it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate ``function`` so that torch.compile leaves it and its callees uncompiled."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            from lfm2_fast.hf.run_uncompiled import run_uncompiled

            return run_uncompiled(function, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def is_own_method(owner: object, name: str, value: object) -> bool:
    """Return True if ``value`` is the owner's method of that name, compiled by torch or not."""
    while hasattr(value, "_torchdynamo_orig_callable"):
        value = value._torchdynamo_orig_callable
    function = getattr(value, "__func__", None)
    return function is not None and (
        getattr(value, "__self__", None) is owner and function is getattr(type(owner), name, None)
    )
