"""Native operations: their schemas, and the library of C++ and CUDA code, if it was built.

Every operation fills ``out``, or other tensors that its schema marks as written, and returns
nothing. Shapes: T tokens of B sequences packed end to end, H hidden, W conv width, D head size, V
vocabulary. The code is in csrc/, for the CPU and, if it was built with CUDA, for GPUs.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

SCHEMAS = (
    # x [T, H], weight [H], out [T, H]
    "rms_norm_native(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()",
    # total = x + delta, may be the same tensor as either; out is its norm
    "add_rms_norm_native(Tensor x, Tensor delta, Tensor weight, float eps, Tensor(a!) total, "
    "Tensor(b!) out) -> ()",
    # tokens [T] int64, weight [V, K], out [T, K]. With scales [V] float32 the weight is int8. If
    # scales have two axes, both are parts of a format in groups, here and below.
    "embed_native(Tensor tokens, Tensor weight, Tensor? scales, Tensor(a!) out) -> ()",
    # gate_up [T, 2F], out [T, F]
    "swiglu_native(Tensor gate_up, Tensor(a!) out) -> ()",
    # bcx [T, 3H], weight [H, W], bias [H], window [slots, ring, H], positions and slots [T] int64,
    # out [T, H]
    "gated_conv_step_native(Tensor bcx, Tensor weight, Tensor? bias, Tensor(a!) window, "
    "Tensor positions, Tensor slots, Tensor(b!) out) -> ()",
    # as before, with cu_seqlens [B + 1] int32, slots [B] int64 and lengths [B] int32
    "gated_conv_native(Tensor bcx, Tensor weight, Tensor? bias, Tensor(a!) window, "
    "Tensor cu_seqlens, Tensor slots, Tensor lengths, Tensor(b!) out) -> ()",
    # positions [T] int64, inv_freq [D / 2] or [T, D / 2] float32, cos and sin [T, 1, D]
    "rope_native(Tensor positions, Tensor inv_freq, Tensor(a!) cos, Tensor(b!) sin) -> ()",
    # qkv [T, (heads + 2 * kv_heads) * D], weights [D], pages [pages, kv_heads, page_size, D],
    # table [slots, pages per slot] int32, q [T, heads, D]; positions from write_from [B] int32 on
    # are written to the pages
    "qk_norm_rope_native(Tensor qkv, Tensor q_weight, Tensor k_weight, float eps, Tensor cos, "
    "Tensor sin, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor table, "
    "Tensor cu_seqlens, Tensor slots, Tensor lengths, Tensor? write_from, Tensor(c!) q) -> ()",
    # q [B, heads, D], one token per sequence; out [B, heads * D]
    "flash_decode_native(Tensor q, Tensor k_pages, Tensor v_pages, Tensor table, Tensor slots, "
    "Tensor lengths, Tensor(a!) out) -> ()",
    # q [T, heads, D], D even, out [T, heads * D]
    "flash_prefill_native(Tensor q, Tensor k_pages, Tensor v_pages, Tensor table, "
    "Tensor cu_seqlens, Tensor slots, Tensor lengths, Tensor(a!) out) -> ()",
    # x [T, K], norm [K], weight [N, K], bias [N], out [T, N]. With scales [N] float32, the weight
    # is int8 and every token is rounded to int8 too, here and below.
    "norm_linear_native(Tensor x, Tensor norm, float eps, Tensor weight, Tensor? scales, "
    "Tensor? bias, Tensor(a!) out) -> ()",
    # y [T, K], residual and out [T, N], which may be the same tensor
    "linear_add_native(Tensor y, Tensor weight, Tensor? scales, Tensor? bias, Tensor residual, "
    "Tensor(a!) out) -> ()",
    # weight [2F, K], scales [2F], out [T, F]
    "norm_swiglu_native(Tensor x, Tensor norm, float eps, Tensor weight, Tensor? scales, "
    "Tensor(a!) out) -> ()",
    # x [T, K], entries [T] int64, down [A, P, R, K], up [A, R, N], gain and shift [A, N], ends [P]
    # int64, bias [N], out [T, N], which has the products before
    "low_rank_native(Tensor x, Tensor entries, Tensor down, Tensor up, Tensor gain, Tensor shift, "
    "Tensor ends, Tensor? bias, Tensor(a!) out) -> ()",
    # x [T, H], slots and positions [T] int64, ring [slots, size, N], written from number `first` on
    "keep_stream_native(Tensor x, Tensor slots, Tensor positions, int first, "
    "Tensor(a!) ring) -> ()",
    # x [T, K], out [T, K] int8, scales [T] float32
    "quantize_native(Tensor x, Tensor(a!) out, Tensor(b!) scales) -> ()",
    # products [T, N] int32, token_scales [T] and row_scales [N] float32, bias [N], out [T, N]
    "finish_products_native(Tensor products, Tensor token_scales, Tensor row_scales, Tensor? bias, "
    "Tensor(a!) out) -> ()",
    # logits [B, V], out [B] int64, -1 if the best logit is NaN or infinite
    "best_tokens_native(Tensor logits, Tensor(a!) out) -> ()",
    # logits [B, V], seen [B, V] bool, penalty [B] float64, out [B, V] float32
    "penalize_native(Tensor logits, Tensor seen, Tensor penalty, Tensor(a!) out) -> ()",
    # logits [B, V], top_k [B] int64, the others [B] float64, out [B, V] float32
    "warp_native(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
    "Tensor(a!) out) -> ()",
    # scores [B, V] float32, the others [B] int64, out -1 if softmax is undefined
    "draw_native(Tensor scores, Tensor seeds, Tensor rows, Tensor positions, Tensor(a!) out) -> ()",
    # chosen, tokens, slots, positions and written [B] int64, eos [B, E] int64, lengths [B] int32,
    # finished [B] bool
    "advance_native(Tensor chosen, Tensor eos, int? dummy_slot, Tensor(a!) tokens, "
    "Tensor(b!) slots, Tensor(c!) positions, Tensor(d!) lengths, Tensor(e!) finished, "
    "Tensor(f!) written) -> ()",
)

# True if the code was compiled only for x86-64 processors without AVX2.
LACKS_AVX2 = "lacks_avx2_native() -> bool"

# Runs a program of the operations above, with the tensors and names that it has by number.
REPLAY = "replay_native(Tensor(a!)[] tensors, Tensor program, Tensor names) -> ()"

# Requires the extension, so that a failed build shows its reason.
REBUILD = "LFM2_FAST_BUILD_EXT=1 pip install --no-build-isolation ."

_library = torch.library.Library("lfm2_fast", "FRAGMENT")


def _nothing(*args: object) -> None:
    """Do nothing: every operation's result for tensors without data."""


_found: dict[str, Any] = {}
for _schema in SCHEMAS:
    _library.define(_schema)
    _name = _schema.split("(")[0]
    torch.library.register_fake(f"lfm2_fast::{_name}", _nothing, lib=_library)
    _found[_name.removesuffix("_native")] = getattr(torch.ops.lfm2_fast, _name).default
# Operations by name. They are looked up once, because that takes as long as a small operation.
native = SimpleNamespace(**_found)
_library.define(LACKS_AVX2)
_library.define(REPLAY)


def _load() -> str | None:
    """Load the library. Return None, or the reason why there is none."""
    found = sorted(Path(__file__).parents[1].glob("_C*.so"))
    if not found:
        return (
            "lfm2_fast was installed without its C++ extension; with torch, setuptools 77, ninja "
            f"and a C++ compiler installed, `{REBUILD}` in its sources builds it"
        )
    try:
        torch.ops.load_library(found[0])
    except (ImportError, OSError) as error:
        reason = f"{found[0].name} cannot be loaded ({error}); `{REBUILD}` builds it again"
        logging.getLogger(__name__).warning("%s", reason)
        return reason
    keys = dict.fromkeys((*SCHEMAS, REPLAY), "CPU")
    keys[LACKS_AVX2] = "CompositeExplicitAutograd"
    if not all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"lfm2_fast::{schema.split('(')[0]}", key)
        for schema, key in keys.items()
    ):
        reason = f"{found[0].name} is of an older version; `{REBUILD}` builds it again"
        logging.getLogger(__name__).warning("%s", reason)
        return reason
    return None


_why_not = _load()


def why_not(device: torch.device) -> str | None:
    """Return why ``device`` has no native code here, with a remedy; None if it has."""
    if _why_not is not None:
        return _why_not
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    if key is None:
        return f"there is no native code for {device.type}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("lfm2_fast::gated_conv_step_native", key):
        return (
            "the C++ extension was built without CUDA; with a CUDA toolkit of torch's version "
            f"({torch.version.cuda}) installed, `{REBUILD}` builds it with"
        )
    return None


def why_slow(device: torch.device) -> str | None:
    """Return why the native code is slow on ``device``, with a remedy; None if it is fast."""
    if device.type != "cpu" or _why_not is not None or not torch.ops.lfm2_fast.lacks_avx2_native():
        return None
    return (
        "the C++ extension was built for the oldest x86-64 processors, by another compiler than "
        f"GCC 12 or newer; `CXX=g++-12 {REBUILD}` or, for this machine alone, "
        f"`CFLAGS=-march=native {REBUILD}` builds it again"
    )
