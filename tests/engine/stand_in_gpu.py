"""Stand-in for a GPU, which refuses some of the work that a GPU would refuse.

While ``StandInGpu`` is active torch has a device ``cuda:0``. The numbers of its tensors are on the
host: PyTorch's operations run there, and Triton's kernels in its interpreter. As on a GPU,

- an operation on tensors of both devices fails, and so does a kernel with tensors of the host;
- a graph repeats its launches with the tensors and numbers of the capture, so later decisions of
  the host change nothing;
- during a capture, waits for the device and copies of memory that is not pinned are refused;
- memory of a graph that no tensor holds is lost after each replay, since other graphs have it;
- reads of the host wait: ``waits`` lists the times, by the operations in ``READS``;
- a thread has a handle of cuBLAS after it has multiplied or asked for one. Without it a product
  in a capture fails. ``in_thread`` lets the tensors work in another thread;
- an operation in ``failing`` fails while it is captured. A capture whose body fails is invalid: its
  end fails too, and leaves the allocator recording.

Unlike on a GPU, captured work runs during the capture, and its first replay does nothing. Parallel
work runs one after another, so races do not show. torch's facts about the device change in the
whole process.
"""

from __future__ import annotations

import contextlib
import gc
import threading
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
from tests.engine.elsewhere import Elsewhere, Refused, given_back, numbers_of

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


PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


class OnGpu(Elsewhere):
    """A tensor on the GPU."""

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)

    def get_device(self) -> int:
        return 0


class Graph:
    """``torch.cuda.CUDAGraph``. The capture has run its work, so the first replay is done."""

    gpu: StandInGpu

    def __init__(self) -> None:
        self.invalid = False
        self.work: list[Callable[[], Any]] = []
        self.made: list[torch.Tensor] = []
        self.replays = 0

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        gpu = self.gpu
        assert gpu.stream is not gpu.default_stream, "the default stream captures nothing"
        assert gpu.recording is None, "the allocator believes that a capture is under way"
        assert not gc.isenabled(), "a collection may run in the capture"
        gpu.capturing, gpu.recording = self, pool

    def capture_end(self) -> None:
        self.gpu.capturing = None
        if self.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.gpu.recording = None

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
    """The device. ``waits`` lists the waits of the host, ``replays`` counts the replays."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.replays = 0
        self.capturing: Graph | None = None
        self.recording: Any = None
        self.default_stream = self.stream = self._new_stream()
        self.handles: set[int] = set()
        self.failing: tuple[Any, ...] = ()
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
        if ours and func in PRODUCTS:
            self._use_handle()
        if self.capturing is not None and func in self.failing:
            self.invalidate(f"{func} is not permitted when stream is capturing")
        args, kwargs = tree_map(numbers_of, (tuple(args), kwargs))
        result = func(*args, **kwargs)
        if self.capturing is not None and (ours or wraps):
            self._record(func, args, kwargs, result, tensors)
        if pinned:
            self.pinned.append(result)
        return given_back(result, tensors, self._wrapped if wraps else lambda each: each)

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

    def _use_handle(self) -> None:
        """Make this thread's handle of cuBLAS, unless it has one."""
        if threading.get_ident() not in self.handles and self.capturing is not None:
            self.invalidate("CUBLAS_STATUS_NOT_INITIALIZED when calling cublasCreate")
        self.handles.add(threading.get_ident())

    def invalidate(self, why: str) -> None:
        """Fail in a capture, which is lost."""
        assert self.capturing is not None
        self.capturing.invalid = True
        raise RuntimeError(why)

    def end_allocation(self, device: int, pool: Any) -> None:
        """``torch._C._cuda_endAllocateToPool``."""
        if self.recording != pool:
            raise RuntimeError("not currently recording to the pool")
        self.recording = None

    def _new_stream(self) -> Any:
        return SimpleNamespace(synchronize=lambda: self.wait("a stream"))

    @contextlib.contextmanager
    def in_thread(self) -> Iterator[None]:
        """Let this thread, which did not enter the device, use it while no other does."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)
            self.handles.discard(threading.get_ident())

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
        """Refuse tensors of both devices. The host's may be indices or single numbers."""
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

        A copy reads the host's memory again. A number on the host has its present value.
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

    def _wrapped(self, tensor: torch.Tensor) -> OnGpu:
        made = OnGpu.of(tensor)
        self.tensors.add(made)
        return made

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
        told = SimpleNamespace(name="stand-in", multi_processor_count=0, total_memory=2**37)
        for name, value in {
            "_lazy_init": nothing,
            "is_available": lambda: True,
            "device": contextlib.nullcontext,
            "device_of": contextlib.nullcontext,
            "current_stream": lambda *args: self.stream,
            "current_device": lambda: 0,
            "current_blas_handle": self._use_handle,
            "get_device_capability": lambda *args: (9, 0),
            "get_device_properties": lambda *args: told,
            "stream": lambda stream: OnStream(self, stream),
            "graph_pool_handle": object,
            "empty_cache": nothing,
            "synchronize": lambda *args: self.wait("synchronize"),
            "CUDAGraph": type("CUDAGraph", (Graph,), {"gpu": self}),
            "Event": lambda **kwargs: event,
            "Stream": lambda **kwargs: self._new_stream(),
        }.items():
            patch.setattr(torch.cuda, name, value)
        # A build of torch without CUDA lacks them.
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocation)
        patch.setattr(torch._C, "_cuda_releasePool", nothing)
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


class OnStream:
    """``torch.cuda.stream``: not a generator, which would end by itself without a reference."""

    def __init__(self, gpu: StandInGpu, stream: Any) -> None:
        self.gpu, self.stream = gpu, stream

    def __enter__(self) -> None:
        self.before, self.gpu.stream = self.gpu.stream, self.stream

    def __exit__(self, *error: Any) -> None:
        self.gpu.stream = self.before


def is_tensor(each: Any) -> bool:
    return isinstance(each, torch.Tensor)


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def here(device: Any) -> bool:
    """Return True if ``device`` is the GPU. C++ sees its tensors on the meta device."""
    kind = torch.device(device).type
    return kind == "cuda" or (kind == "meta" and torch.get_default_device().type != "meta")
