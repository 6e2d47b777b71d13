"""PyTorch's hooks on the modules of a network: those that are called, and an error for others.

The network calls only its layers. All other modules only hold weights, which the fused operations
read. So a hook on one of those would never be called.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules import module as torch_module


class HookError(RuntimeError):
    """Error of a hook, or of a caller's module, that would never be called."""


def is_hooked(module: nn.Module) -> bool:
    """Return True if a call of ``module`` runs a caller's Python.

    That is a forward hook, a forward pre-hook, or a ``forward`` that was set on this module.
    """
    own = module.__dict__
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


def check_hooks(
    network: nn.Module,
    layers: nn.ModuleList,
    layer: type,
    types: frozenset[type],
    names: frozenset[str],
) -> None:
    """Check ``network`` for hooks and modules that PyTorch would call and the network does not.

    ``layers`` are called: those of the type ``layer`` may have forward hooks, and a caller's own
    module may replace them. ``types`` and ``names`` are those of all modules at construction. The
    caller calls its own modules under other names. Raises HookError, which names the module, for a
    forward hook or a ``forward`` elsewhere, and for a replaced module that holds weights. It also
    raises for any backward hook or global hook.
    """
    check_global_hooks()
    modules = [network]
    for module in modules:
        own = module.__dict__
        known = type(module) in types or isinstance(module, layer)
        # This runs once a call on a few hundred modules, so unchanged ones are skipped first.
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
            or not known
        ):
            path = next(name for name, each in network.named_modules() if each is module)
            if not known and path.rpartition(".")[2] not in names:
                continue
            _refuse_uncalled(module, path or "the network", known, isinstance(module, layer))
        if module is layers:
            modules.extend(_layers_within(layers, layer))
        elif own["_modules"]:
            modules.extend(own["_modules"].values())


def check_global_hooks() -> None:
    """Raise HookError if a hook is registered for all modules of the process."""
    for name in ("forward_pre_hook", "forward_hook", "backward_pre_hook", "backward_hook"):
        if getattr(torch_module, f"_global_{name}s"):
            full = "full_" if name.startswith("backward") else ""
            raise HookError(
                f"a hook for all modules (register_module_{full}{name}) would be called for the "
                "layers alone, since the other modules only hold weights; remove it, and hook "
                "layers"
            )


def checked_stream(x: object, like: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the residual stream ``x`` that a caller's hook may have replaced, contiguous.

    It must be ``[tokens, H]``, with dtype and device of ``like [H]``. Raises TypeError or
    ValueError.
    """
    wanted = f"a tensor of shape {(tokens, len(like))} and {like.dtype} on {like.device}"
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"a layer's hook or module gave {type(x).__name__}; it must give {wanted}")
    if (x.shape, x.dtype, x.device) != ((tokens, len(like)), like.dtype, like.device):
        raise ValueError(
            f"a layer's hook or module gave shape {tuple(x.shape)} and {x.dtype} on {x.device}; it "
            f"must give {wanted}"
        )
    return x.contiguous()


def _refuse_uncalled(module: nn.Module, path: str, known: bool, is_layer: bool) -> None:
    """Raise HookError unless ``module`` is a layer with only forward hooks."""
    if module._backward_hooks or module._backward_pre_hooks:
        raise HookError(f"{path} has a backward hook: nothing runs backward; remove it")
    if is_layer:
        return
    if not known:
        what = f"is a caller's {type(module).__name__}"
    else:
        what = "has a forward of its own" if "forward" in module.__dict__ else "has a forward hook"
    raise HookError(
        f"{path} {what}, which would never be called: only layers are called, and fused operations "
        "read the other modules' weights; hook a layer, ask for hidden states, or use "
        "transformers' class"
    )


def _layers_within(layers: nn.ModuleList, layer: type) -> Iterator[nn.Module]:
    """Yield the layers. For a caller's module in place of one, yield the layers inside of it."""
    for each in layers:
        if isinstance(each, layer):
            yield each
        else:
            yield from (inner for inner in each.modules() if isinstance(inner, layer))
