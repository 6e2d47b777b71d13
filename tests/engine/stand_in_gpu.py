"""A GPU that stands in for a real one, and refuses some of what that would refuse.

While ``StandInGpu`` is active torch has a device ``cuda:0``. The numbers of its tensors lie on the
host: PyTorch's operations run there, and Triton's kernels in its interpreter. As on a GPU

- an operation on tensors of both devices fails, and so does a kernel that is handed the host's;
- a graph is what was launched while it was captured, on the tensors and with the numbers of that
  moment, so that what the host decides later changes nothing; what waits for the device, and copies
  of memory that is not pinned, are refused meanwhile;
- what a graph made and nobody holds is lost after each replay, since other graphs have the memory;
- what the host reads it waits for: ``waits`` lists the times, by the operations in ``READS``.

Unlike on a GPU what is captured runs then already, and its first replay does nothing more; and what
would run at the same time runs one after another, so races are not seen. Its tensors work in the
thread that entered it alone; what torch says of a device it says in the whole process.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lfm2_fast.kernels.tiling import chip

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
TRANSFERS = (aten.copy_.default, aten._to_copy.default)
BY_INDEX = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
# What a host has to know before it goes on: a number, or how many there are.
READS = (
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.bincount.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
)


class Refused(RuntimeError):
    """What a GPU would not do."""


class OnGpu(torch.Tensor):
    """A tensor on the GPU; its numbers are those of ``numbers``, on the host.

    For C++ it is on the meta device, which has no memory to touch by mistake.
    """

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> OnGpu:
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

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.numbers!r})"

    def get_device(self) -> int:
        return 0

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError("there is no GPU in this thread")


class Graph:
    """``torch.cuda.CUDAGraph``. To be captured its work had to run: the first replay is done."""

    gpu: StandInGpu

    def __init__(self) -> None:
        self.work: list[Callable[[], Any]] = []
        self.made: list[torch.Tensor] = []
        self.replays = 0

    def replay(self) -> None:
        self.gpu.replays += 1
        self.replays += 1
        if self.replays > 1:
            for again in self.work:
                again()
        held = {storage(each.numbers) for each in self.gpu.tensors}
        for made in self.made:
            if storage(made) not in held:
                made.fill_(float("nan") if made.is_floating_point() else 99)


class StandInGpu(TorchDispatchMode):
    """The device. ``waits`` says for what the host has waited, ``replays`` how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.replays = 0
        self.capturing: Graph | None = None
        self.tensors: weakref.WeakSet[OnGpu] = weakref.WeakSet()
        self.pinned: list[torch.Tensor] = []
        self.patch = pytest.MonkeyPatch()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if any(each.is_meta for each in tensors) and any(each.is_cuda for each in tensors):
            raise NotImplementedError("indices in a list never come to modes: make a tensor of it")
        ours = any(isinstance(each, OnGpu) for each in tensors)
        if ours and torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func} changes a tensor's shape in place")
        wraps = ours
        if kwargs.get("device") is not None:
            wraps = here(kwargs["device"])
            kwargs["device"] = torch.device("cpu") if wraps else kwargs["device"]
        pinned = kwargs.pop("pin_memory", False)
        if func in TRANSFERS:
            self._transfer(func, args, kwargs, wraps)
        elif ours:
            self._check(func, args, tensors)
        args, kwargs = tree_map(numbers_of, (tuple(args), kwargs))
        result = func(*args, **kwargs)
        if self.capturing is not None and (ours or wraps):
            self._record(func, args, kwargs, result, tensors)
        if pinned:
            self.pinned.append(result)
        return self._given_back(func, args, kwargs, result, wraps, tensors)

    def launch(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Launch a kernel of Triton's; the interpreter knows of no dependent launches."""
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, torch.Tensor) and not isinstance(each, OnGpu):
                raise Refused(f"a kernel is handed a tensor on {each.device}")
        args, kwargs = tree_map(numbers_of, (args, kwargs))
        if kwargs.pop("launch_pdl", False):
            kwargs["PDL"] = False

        def again() -> Any:
            with torch._C._DisableTorchDispatch():
                return run(*args, **kwargs)

        if self.capturing is not None:
            self.capturing.work.append(again)
        return again()

    def wait(self, what: str) -> None:
        """Note that the host waits for the device."""
        if self.capturing is not None:
            raise Refused(f"{what} waits for the device while work is captured")
        self.waits.append(what)

    def _transfer(self, func: Any, args: tuple[Any, ...], kwargs: Any, wraps: bool) -> None:
        """A copy, which may be one between the devices."""
        if func is aten.copy_.default:
            to, source = args[:2]
            wraps = isinstance(to, OnGpu)
            host, waits = (source if wraps else to), not (len(args) > 2 and args[2])
        else:
            source = args[0]
            host, waits = source if wraps else None, not kwargs.get("non_blocking")
        if wraps == isinstance(source, OnGpu):
            return
        pinned = host is not None and storage(host) in map(storage, self.pinned)
        if self.capturing is not None and not pinned:
            raise Refused(f"{func} copies memory that is not pinned while work is captured")
        if waits:
            self.wait(str(func))

    def _check(self, func: Any, args: tuple[Any, ...], tensors: list[torch.Tensor]) -> None:
        """Refuse tensors of both devices; the host's may be indices, and single numbers."""
        strangers = [each for each in tensors if not isinstance(each, OnGpu)]
        if torch.Tag.pointwise in func.tags or func in (aten.fill_.Tensor, *BY_INDEX):
            strangers = [each for each in strangers if each.dim()]
        if func in BY_INDEX and isinstance(args[0], OnGpu):
            indices = [each for each in args[1] if each is not None]
            strangers = [each for each in strangers if not any(each is index for index in indices)]
            if any(index.dtype == torch.bool or not isinstance(index, OnGpu) for index in indices):
                self.wait(f"{func} by a mask or by indices on the host")
        if strangers:
            shapes = [(tuple(each.shape), str(each.device)) for each in tensors]
            raise Refused(f"{func} takes tensors of both devices: {shapes}")
        if func in READS:
            self.wait(str(func))

    def _record(
        self, func: Any, args: Any, kwargs: Any, result: Any, tensors: list[torch.Tensor]
    ) -> None:
        """Do it again in every replay, and have what it makes where it was made.

        A copy reads the host's memory anew; a number of the host's is that of now.
        """
        assert self.capturing is not None
        if func not in TRANSFERS:
            host = {id(each) for each in tensors if not isinstance(each, OnGpu)}
            args, kwargs = tree_map(
                lambda each: each.clone() if id(each) in host else each, (args, kwargs)
            )
        given = {storage(each) for each in tree_leaves((args, kwargs)) if is_tensor(each)}
        fresh = [
            (place, each)
            for place, each in enumerate(tree_leaves(result))
            if is_tensor(each) and storage(each) not in given
        ]
        self.capturing.made += [each for _, each in fresh]

        def again() -> None:
            made = tree_leaves(func(*args, **kwargs))
            for place, each in fresh:
                each.copy_(made[place])

        self.capturing.work.append(again)

    def _given_back(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Any,
        result: Any,
        wraps: bool,
        tensors: list[torch.Tensor],
    ) -> Any:
        """The result as the caller knows it: what was written is the tensor that was handed in."""
        known = {id(numbers_of(each)): each for each in tensors}

        def outer(each: Any) -> Any:
            if not is_tensor(each):
                return each
            if id(each) in known:
                return known[id(each)]
            if not wraps:
                return each
            made = OnGpu(each)
            self.tensors.add(made)
            return made

        return tree_map(outer, result)

    @contextlib.contextmanager
    def _capture(self, graph: Graph, **_: Any) -> Iterator[None]:
        """``torch.cuda.graph``."""
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None

    def __enter__(self) -> StandInGpu:
        # Both are filled once: with torch.tensor as it is, and without a device that goes again.
        _device_constructors()
        chip.cache_clear()
        self.lifted = torch._C._only_lift_cpu_tensors()
        # torch.tensor(..., device=...) makes it on the host, and then moves it where modes see it.
        torch._C._set_only_lift_cpu_tensors(True)
        self._patch(self.patch)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self.patch.undo()
            torch._C._set_only_lift_cpu_tensors(self.lifted)
            chip.cache_clear()

    def _patch(self, patch: pytest.MonkeyPatch) -> None:
        """Have torch and Triton say that the device is there."""
        from triton.runtime.interpreter import GridExecutor

        def nothing(*args: Any, **kwargs: Any) -> None: ...

        event = SimpleNamespace(
            record=nothing,
            synchronize=lambda: self.wait("an event"),
            query=lambda: True,
            elapsed_time=lambda other: 1.0,
        )
        stream = SimpleNamespace(synchronize=lambda: self.wait("a stream"))
        told = SimpleNamespace(name="stand-in", multi_processor_count=0, total_memory=2**37)
        for name, value in {
            "_lazy_init": nothing,
            "is_available": lambda: True,
            "device": contextlib.nullcontext,
            "device_of": contextlib.nullcontext,
            "current_stream": lambda *args: stream,
            "get_device_capability": lambda *args: (9, 0),
            "get_device_properties": lambda *args: told,
            "graph": self._capture,
            "graph_pool_handle": lambda: (0, 1),
            "synchronize": lambda *args: self.wait("synchronize"),
            "CUDAGraph": type("CUDAGraph", (Graph,), {"gpu": self}),
            "Event": lambda **kwargs: event,
            "Stream": lambda **kwargs: stream,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.accelerator, "current_accelerator", lambda **kwargs: GPU)
        patch.setattr(torch.accelerator, "device_count", lambda: 1)
        tensor, run = torch.tensor, GridExecutor.__call__

        def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            found = tensor(*args, **kwargs)
            if pin_memory:
                self.pinned.append(found)
            return found

        # Memory can be pinned only where there is a device to pin it for.
        patch.setattr(torch, "tensor", made)
        patch.setattr(
            GridExecutor,
            "__call__",
            lambda executor, *args, **kwargs: self.launch(
                lambda *args, **kwargs: run(executor, *args, **kwargs), args, kwargs
            ),
        )


def numbers_of(each: Any) -> Any:
    return each.numbers if isinstance(each, OnGpu) else each


def is_tensor(each: Any) -> bool:
    return isinstance(each, torch.Tensor)


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def here(device: Any) -> bool:
    """Whether ``device`` is the GPU; C++ takes its tensors for the meta device's."""
    kind = torch.device(device).type
    return kind == "cuda" or (kind == "meta" and torch.get_default_device().type != "meta")
