"""A call that torch.compile leaves alone. Importing this module imports torch's compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@torch.compiler.disable(reason="lfm2_fast runs its own kernels: leave fullgraph=True out")
def run_uncompiled(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return what ``function`` returns, run as it is in the middle of compiled code."""
    return function(*args, **kwargs)
