"""Dependent launches: kernels that begin before the one before them has ended.

Launched so, a kernel may begin once every program of its predecessor has called ``after`` or ended,
and ``after`` returns when the predecessor's end has made all that it wrote visible. What every
kernel keeps to that may be launched so:

- Each program calls ``after`` once, before it leaves. A wait is for one predecessor, and covers
  those further back only because that one has waited for its own.
- ``after`` lets the successor begin before it waits itself, so several links of the chain, even
  of several steps, may stand above it while an earlier one still writes. Above it only what was
  there before the first step is read: weights, norms, taps, scales, biases, frequencies. Nothing
  is written there, since an earlier kernel may yet read what would be overwritten.
- It stands in no loop: a pipelined one takes the loads that come after the wait up before it.
  (triton-lang/triton#11905)
- The programs should fit on the device at once, beside those of the next kernel: it begins when the
  last of them has.

It needs compute capability 9.0, and costs a host that launches one by one more than it gives. (CUDA
Programming Guide, "Programmatic Dependent Launch")
"""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def after(PDL: tl.constexpr):
    """Let the next kernel start, and wait until what the previous ones wrote can be read."""
    # Triton's, not assembler of ours: these count as reading and writing memory, so no access is
    # moved across them.
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def dependent(pdl: bool) -> dict[str, Any]:
    """What a launch is told besides its arguments; one alone, without the other, is in vain."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
