"""Call that torch.compile does not compile. Importing this module imports torch's compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@torch.compiler.disable(reason="lfm2_fast runs its own kernels: leave fullgraph=True out")
def run_uncompiled(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run ``function`` uncompiled inside of compiled code, and return its result."""
    return function(*args, **kwargs)
