"""Stand-in for an accelerator that is not CUDA: an NPU, an Intel or an Apple GPU.

While ``StandInDevice`` is active, torch has one device of its kind. The numbers of its tensors are
on the host, where PyTorch's operations run. It refuses

- tensors of float64, which Apple's GPUs and many of Intel's do not have;
- an operation on tensors of both devices, except a single number or indices of the host;
- every call of ``torch.cuda``, as if torch was built without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.engine.elsewhere import Elsewhere, Refused, given_back, numbers_of

aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
BY_INDEX = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
# Functions of torch.cuda that work without CUDA too, and which torch itself calls.
ASKED = {"is_available", "is_initialized", "is_current_stream_capturing", "manual_seed_all"}


class OnDevice(Elsewhere):
    """Tensor on the device."""

    place: torch.device

    device = property(lambda self: self.place)


class StandInDevice(TorchDispatchMode):
    """The device, of a ``kind`` like "mps"."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.place = torch.device(kind, 0)
        self.patch = pytest.MonkeyPatch()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        wraps = any(isinstance(each, OnDevice) for each in tensors)
        if wraps and func not in COPIES:
            self._check(func, tensors)
        if kwargs.get("device") is not None:
            # C++ sees the device's tensors on the meta device.
            wraps = torch.device(kwargs["device"]).type in (self.place.type, "meta")
            kwargs["device"] = torch.device("cpu") if wraps else kwargs["device"]
        if func is aten.copy_.default:
            wraps = isinstance(args[0], OnDevice)
        if kwargs.pop("pin_memory", False):
            raise Refused("memory is pinned for CUDA alone")
        args, kwargs = tree_map(numbers_of, (tuple(args), kwargs))
        result = func(*args, **kwargs)
        return given_back(result, tensors, self._wrapped if wraps else lambda each: each)

    def _wrapped(self, tensor: torch.Tensor) -> OnDevice:
        if tensor.dtype == torch.float64:
            raise Refused(f"{self.place} has no float64")
        made = OnDevice.of(tensor)
        made.place = self.place
        return made

    def _check(self, func: Any, tensors: list[torch.Tensor]) -> None:
        strangers = [each for each in tensors if not isinstance(each, OnDevice)]
        if func in BY_INDEX:
            return
        if torch.Tag.pointwise in func.tags or func is aten.fill_.Tensor:
            strangers = [each for each in strangers if each.dim()]
        if strangers:
            raise Refused(f"{func} takes tensors of both devices")

    def __enter__(self) -> StandInDevice:
        _device_constructors()  # filled once, with torch's own functions
        self.lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        kind = self.place.type
        for name, value in vars(torch.cuda).items():
            if callable(value) and not name.startswith("_") and name not in ASKED:
                self.patch.setattr(torch.cuda, name, _refused(f"torch.cuda.{name}"))
        self.patch.setattr(torch.cuda, "is_available", lambda: False)
        if hasattr(torch, kind) and hasattr(getattr(torch, kind), "_lazy_init"):
            self.patch.setattr(getattr(torch, kind), "_lazy_init", lambda: None)
        self.patch.setattr(torch.accelerator, "current_accelerator", lambda **_: self.place)
        self.patch.setattr(torch.accelerator, "device_count", lambda: 1)
        self.patch.setattr(torch.accelerator, "synchronize", lambda *_: None)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self.patch.undo()
            torch._C._set_only_lift_cpu_tensors(self.lifted)


def _refused(name: str) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise Refused(f"{name} is called, and there is no CUDA")

    return call
