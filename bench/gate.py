"""Checks before every figure: only correct code is timed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

PROMPT, STEPS = list(range(2, 34)), 4


def distance(found: np.ndarray, exact: np.ndarray) -> float:
    """Distance of logits ``[steps, vocabulary]`` from the reference's, relative to their size."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def rounding(exact: np.ndarray, plain: np.ndarray) -> float:
    """Largest allowed error of bfloat16 logits: twice that of ``plain``, plain PyTorch's."""
    return 2 * distance(plain, exact)


def wrong_logits(found: np.ndarray, exact: np.ndarray, allowed: float) -> str | None:
    """Return why logits are not those of the reference in float32, by relative error, or None."""
    error = distance(found, exact)
    if error <= allowed:
        return None
    return (
        f"its logits are wrong: they differ by {error:.3g} of their size, {allowed:.3g} is allowed"
    )


def wrong_operation(out: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> str | None:
    """Return why a result is not the operation's, or None.

    ``exact`` is the reference in float64, ``plain`` the reference in the same dtype. The error may
    be twice that of ``plain``, plus one rounding step: the rule of the tests.
    """
    wide = exact.double()
    error = (out.double() - wide).abs().max()
    step = torch.finfo(out.dtype).eps * wide.abs().max()
    allowed = 2 * (plain.double() - wide).abs().max() + step
    if bool(error <= allowed):  # not for NaN
        return None
    return f"it is wrong: off by {float(error):.3g}, {float(allowed):.3g} is allowed"


def logits(model: Any, tokens: list[int] = PROMPT, steps: int = STEPS) -> np.ndarray:
    """Return our model's logits for ``wrong_logits``; see ``engines.Engine.logits``."""
    cache = model.new_cache(1, len(tokens) + steps)
    rows = []
    for _ in range(steps):
        out = model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1).logits
        rows.append(out[0, -1].float().cpu().numpy())
        tokens = [1]
    return np.stack(rows)
