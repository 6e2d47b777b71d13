"""Low-rank changes of adapters, added to products: their meaning, and bodies in plain PyTorch."""

from __future__ import annotations

import torch

from lfm2_fast.weights.adapter_stack import AdapterStack

# Most tokens for which each token's own matrices are gathered, which take memory.
GATHERED = 32


def low_rank_ref(
    x: torch.Tensor,
    product: torch.Tensor,
    entries: torch.Tensor,
    stack: AdapterStack,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return ``product [T, N]`` of tokens ``x [T, K]`` with the changes of ``entries [T]``.

    ``product + gain * (product - bias) + up.T @ (down @ x) + shift``, of each token's entry and
    each part of the rows. A token of entry 0 keeps its product.
    """
    low = torch.einsum("tprk,tk->tpr", stack.down.index_select(0, entries), x)
    up = stack.up.index_select(0, entries).split(stack.parts, 2)
    made = [torch.einsum("tr,trn->tn", low[:, part], own) for part, own in enumerate(up)]
    return _added(product, torch.cat(made, 1), entries, stack, bias)


def low_rank(
    x: torch.Tensor,
    product: torch.Tensor,
    entries: torch.Tensor,
    stack: AdapterStack,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return ``low_rank_ref``, for many tokens without a copy of the matrices for each.

    Every token is multiplied by all entries, and those of others are left out in between. On a GPU
    nothing waits for what ``entries`` hold. On a CPU the entries are those that some token has.
    """
    if len(x) <= GATHERED:
        return low_rank_ref(x, product, entries, stack, bias)
    used = _used(entries, stack)
    down, count = stack.down.index_select(0, used), len(used)
    low = (x @ down.reshape(-1, x.shape[1]).T).view(len(x), count, len(stack.parts), -1)
    low = low.where((entries[:, None] == used)[:, :, None, None], 0)
    up = stack.up.index_select(0, used).split(stack.parts, 2)
    made = [low[:, :, part].flatten(1) @ own.flatten(0, 1) for part, own in enumerate(up)]
    return _added(product, torch.cat(made, 1), entries, stack, bias)


def low_rank_rows(
    tokens: torch.Tensor, rows: torch.Tensor, entries: torch.Tensor, stack: AdapterStack
) -> torch.Tensor:
    """Return an embedding's ``rows [T, H]`` of ``tokens [T]`` with the changes of ``entries``."""
    size, rank = stack.down.shape[1:]
    low = stack.down.view(-1, rank).index_select(0, entries * size + tokens)
    if len(tokens) <= GATHERED:
        delta = torch.einsum("tr,trn->tn", low, stack.up.index_select(0, entries))
    else:
        used = _used(entries, stack)
        low = low[:, None].where((entries[:, None] == used)[:, :, None], 0)
        delta = low.flatten(1) @ stack.up.index_select(0, used).flatten(0, 1)
    return _added(rows, delta, entries, stack, None)


def _used(entries: torch.Tensor, stack: AdapterStack) -> torch.Tensor:
    """Return the entries that tokens may have: on a CPU those that they have."""
    if entries.device.type == "cpu":
        return entries.unique()
    return torch.arange(stack.entries, device=entries.device)


def _added(
    product: torch.Tensor,
    delta: torch.Tensor,
    entries: torch.Tensor,
    stack: AdapterStack,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return ``product`` with a change's product, its gain and its shift."""
    plain = product if bias is None else product - bias
    gain, shift = (each.index_select(0, entries) for each in (stack.gain, stack.shift))
    return product + (gain * plain + delta + shift)
