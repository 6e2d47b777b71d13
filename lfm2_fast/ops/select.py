"""Choice of an implementation: by device, and by what is importable."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from lfm2_fast.ops.base import Ops

BACKENDS = ("auto", "eager", "triton", "native")


class BackendError(RuntimeError):
    """Error of a requested backend that cannot run here."""


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> Ops:
    """Return the operations of ``backend``, for a model of ``dtype`` on ``device``.

    "eager" is plain PyTorch and runs on every device. "triton" runs on GPUs. "native" is C++ for
    CPUs; on a GPU it has the convolution of a decode step only. "auto" takes the fastest that can
    run. Raises BackendError for a name that is unknown or cannot run here.
    """
    if backend not in BACKENDS:
        raise BackendError(
            f"backend={backend!r} is not in this version of lfm2_fast; "
            f"choose one of {', '.join(map(repr, BACKENDS))}"
        )
    if backend == "auto":
        best = {"cuda": "triton", "cpu": "native"}.get(device.type, "eager")
        backend = "eager" if why_not(best, device, dtype) else best
    elif lacking := why_not(backend, device, dtype):
        raise BackendError(f"backend={backend!r} cannot run on {device}: {lacking}")
    if backend == "triton":
        from lfm2_fast.ops.triton_ops import TritonOps

        return TritonOps(dependent=has_dependent_launch(device))
    if backend == "native":
        from lfm2_fast.ops.native_ops import NativeOps, NativeStepOps

        return NativeOps() if device.type == "cpu" else NativeStepOps()
    return Ops()


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why ``backend`` cannot run ``dtype`` on ``device``, with a remedy, or None."""
    if backend == "eager":
        return None
    if dtype == torch.float64:
        return "it has no float64; choose backend='eager'"
    if backend == "triton":
        return why_not_triton(device)
    from lfm2_fast.ops import native_library

    return native_library.why_not(device)


def why_not_triton(device: torch.device) -> str | None:
    """Return why Triton's kernels cannot run on ``device``, with a remedy, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed; pip install triton"
    if device.type == "cuda":
        if torch.version.hip:
            return "the kernels are written for NVIDIA's GPUs; choose backend='eager'"
        if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
            return "Triton needs compute capability 8.0 or higher; choose backend='eager'"
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "1":
        return None
    return (
        "Triton runs on GPUs, and on the CPU in its interpreter alone, for tests: start Python "
        "with TRITON_INTERPRET=1, or choose backend='eager'"
    )


def has_dependent_launch(device: torch.device) -> bool:
    """Return True if ``device`` can start a kernel while another one runs: Hopper and later."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
