"""Hooks on the public classes: errors for those that would never be called."""

from __future__ import annotations

from torch import nn

from lfm2_fast.models.hooks import HookError, check_global_hooks, is_hooked


def check_called(model: nn.Module) -> None:
    """Raise HookError for hooks that ``forward`` does not call. PyTorch calls the others."""
    check_global_hooks()
    if model._backward_hooks or model._backward_pre_hooks:
        raise HookError("the model has a backward hook: nothing runs backward")
    base = model.__dict__.get("_base")
    if base is not None and (is_hooked(base) or base._backward_hooks or base._backward_pre_hooks):
        raise HookError(
            "model.model has a hook or a forward of its own, which only calls of model.model "
            "itself run; remove it, and hook model.model.layers[i] or ask for hidden states"
        )


def check_generates(model: nn.Module) -> None:
    """Raise HookError for hooks that ``generate`` does not call."""
    check_called(model)
    if is_hooked(model):
        raise HookError(
            "the model has a forward hook or a forward of its own, which generate() would never "
            "call: its steps go through the layers alone; remove it, and hook "
            "model.model.layers[i] or pass a logits_processor"
        )
