"""Programmatic dependent launch (PDL): a kernel may start before the previous one ends.

A kernel may start once every program of its predecessor has called ``pdl_wait`` or ended.
``pdl_wait`` returns when the predecessor has ended and all that it wrote is visible. Rules for
every kernel that is launched this way:

- Call ``pdl_wait`` once in each program, before it leaves. A wait covers one predecessor. It covers
  those further back only because that one has waited for its own.
- Above ``pdl_wait``, read only what was there before the first step: weights, norms, taps, scales,
  biases, frequencies of all tokens. Write nothing there. ``pdl_wait`` lets the successor start
  before it waits itself. So several kernels, even of several steps, may be above their waits while
  an earlier one still reads and writes.
- Put it in no loop: a pipelined loop moves the loads that follow the wait above it.
  (triton-lang/triton#11905)
- Let the programs fit on the device at once, beside those of the next kernel. The next kernel
  starts when the last of them has started.

PDL needs compute capability 9.0. Without a captured graph it costs the host more than it gains.
(CUDA Programming Guide, "Programmatic Dependent Launch")
"""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Let the next kernel start, and wait until the results of the previous ones can be read."""
    # Triton's own functions, not inline assembler: Triton treats them as reads and writes of
    # memory, so it moves no access across them.
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def pdl_options(pdl: bool) -> dict[str, Any]:
    """Return the launch options for PDL; one without the other has no effect."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
