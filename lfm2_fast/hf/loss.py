"""Loss that ``forward`` gives with labels, and its backward pass, which is refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lfm2_fast.hf.pretrained import INFERENCE


def loss_function(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """Return the cross-entropy in nats of ``labels [B, T]`` shifted by one, from float32 logits.

    As Hugging Face's loss for causal models: the mean over labels that are not ``ignore_index``, or
    the sum over ``num_items_in_batch``. ``shift_labels [B, T]`` stand for labels that are shifted
    already. ``vocab_size`` is the logits' own. Raises ValueError for labels of another shape than
    the logits'.
    """
    given = labels if shift_labels is None else shift_labels
    if given is None or given.shape != logits.shape[:2]:
        raise ValueError(
            f"labels has shape {None if given is None else tuple(given.shape)}, the logits "
            f"{tuple(logits.shape[:2])}; with labels, leave logits_to_keep out"
        )
    if shift_labels is None:
        given = F.pad(given, (0, 1), value=ignore_index)[:, 1:]
    targets = given.to(logits.device).flatten()
    how = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), targets, ignore_index=ignore_index, reduction=how
    )
    if num_items_in_batch is None:
        return loss
    return loss / torch.as_tensor(num_items_in_batch, device=loss.device)


class _NoBackward(torch.autograd.Function):
    """Identity, whose backward pass raises an error: training is not supported."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(f"backward() is not supported: {INFERENCE}")


def refuse_backward(loss: torch.Tensor) -> torch.Tensor:
    """Return ``loss`` whose ``backward()`` raises RuntimeError, saying what to do."""
    return _NoBackward.apply(loss, torch.zeros((), requires_grad=True))
