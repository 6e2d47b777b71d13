"""Compile the Triton kernels ahead of time, without a GPU, and print a table of their resources.

The real launchers run on CPU tensors, in the shapes of the published sizes. Triton's driver is
replaced by one that only names the target. So the compiled kernels are those of a launch. Exits
with 1 if a kernel spills registers.

    python bench/gpu/aot.py --arch 90 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget

from lfm2_fast.kernels import tiling
from lfm2_fast.kernels.advance import advance_triton
from lfm2_fast.kernels.embed import embed_triton
from lfm2_fast.kernels.embed_rope import embed_rope_triton
from lfm2_fast.kernels.flash_decode import flash_decode_triton, most_splits
from lfm2_fast.kernels.flash_prefill import flash_prefill_triton
from lfm2_fast.kernels.gated_conv import gated_conv_triton
from lfm2_fast.kernels.gated_conv_step import gated_conv_step_triton
from lfm2_fast.kernels.gemv import MOST_TOKENS
from lfm2_fast.kernels.gemv_low_rank import Change
from lfm2_fast.kernels.head_argmax import argmax_advance_triton, head_argmax_triton, head_tiling
from lfm2_fast.kernels.linear_add import linear_add_triton
from lfm2_fast.kernels.low_rank import low_rank_triton, low_shape
from lfm2_fast.kernels.norm_conv import norm_conv_triton
from lfm2_fast.kernels.norm_linear import norm_linear_triton
from lfm2_fast.kernels.norm_swiglu import norm_swiglu_triton
from lfm2_fast.kernels.qk_norm_rope import qk_norm_rope_triton
from lfm2_fast.kernels.rms_norm import add_rms_norm_triton, rms_norm_triton
from lfm2_fast.kernels.rope import rope_triton
from lfm2_fast.kernels.sample import Scratch, sample_triton
from lfm2_fast.kernels.swiglu import swiglu_triton
from lfm2_fast.kernels.widen import widen_int4_triton

# Each with the number of processors that its largest GPU in use has.
ARCHITECTURES = {80: 108, 90: 132, 100: 148, 120: 188}
DTYPES = ("bfloat16", "float16", "float32")
VOCABULARIES = (65536, 128000)


@dataclass(frozen=True)
class Size:
    """Numbers of a published model's config that decide the shapes of its kernels."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int = 8
    head_dim: int = 64
    width: int = 3
    vocabulary: int = 65536


SIZES = (
    Size("350M", 1024, 4608, 16),
    Size("700M", 1536, 6912, 24),
    Size("1.2B", 2048, 8192, 32),
    Size("2.6B", 2048, 10752, 32),
)


@dataclass
class Compiled:
    """One compiled kernel and the sizes that use it."""

    name: str
    dtype: str  # the first that uses it
    warps: int
    registers: int
    spilled: int
    stack: int
    shared: int
    sizes: list[str] = field(default_factory=list)


class Target:
    """Driver with only the methods that Triton calls to compile."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(
    arch: int, only: Collection[str] = (), maxnreg: int | None = None, *, recompile: bool = True
) -> Iterator[list[tuple[str, Any, str]]]:
    """Compile launches for ``arch`` and run nothing; give each one's name, kernel and ptxas log.

    If ``only`` names kernels, others are left out. Kernels in Triton's cache are compiled again
    only with ``recompile``; otherwise they have no log.
    """
    launches: list[tuple[str, Any, str]] = []
    run, chip = triton.runtime.jit.JITFunction.run, tiling.chip

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name = self.fn.__name__.strip("_").removesuffix("_kernel")
        if only and name not in only:
            return
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kwargs["maxnreg"] = maxnreg or kwargs.get("maxnreg")
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append((name, kernel, log.getvalue()))

    triton.runtime.driver.set_active(Target(arch))
    triton.knobs.compilation.always_compile = recompile
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.runtime.jit.JITFunction.run = compile_only
    tiling.chip = lambda device: (f"sm_{arch}", ARCHITECTURES[arch])
    try:
        yield launches
    finally:
        triton.runtime.jit.JITFunction.run, tiling.chip = run, chip


def launch_all(
    size: Size,
    dtype: torch.dtype,
    *,
    sequences: int = 2,
    tokens: int = 6,
    page_size: int = 64,
    pdl: bool = False,
) -> None:
    """Launch every kernel in each of its shapes, for ``tokens`` of all ``sequences``."""
    hidden = size.hidden

    def some(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    bcx, weight, norm = some(tokens, 3 * hidden), some(hidden, size.width), some(hidden)
    window, x, out = some(sequences, size.width, hidden), some(tokens, hidden), some(tokens, hidden)
    positions, slots = some(tokens, dtype=torch.int64), some(sequences, dtype=torch.int64)
    cu_seqlens = some(sequences + 1, dtype=torch.int32)
    lengths = some(sequences, dtype=torch.int32)
    gated_conv_triton(bcx, weight, None, window, cu_seqlens, slots, lengths, out)
    gated_conv_step_triton(
        bcx[:sequences], weight, None, window, positions[:sequences], slots, out[:sequences]
    )
    rms_norm_triton(x, norm, 1e-5, out)
    add_rms_norm_triton(x, out, norm, 1e-5, out, some(tokens, hidden))
    swiglu_triton(some(tokens, 2 * size.inner), some(tokens, size.inner))

    half, heads, kv_heads = size.head_dim // 2, size.heads, size.kv_heads
    for parts in ((heads * size.head_dim, *[kv_heads * size.head_dim] * 2), (hidden,)):
        rows, rank = sum(parts), 16
        stack = (some(4, len(parts), rank, hidden), some(4, rank, rows), some(4, rows))
        low = some(*low_shape(tokens, hidden, rank * len(parts)), dtype=torch.float32)
        product = some(tokens, rows)
        # After a norm, or before the addition to the residual stream.
        beside = {"norm": norm} if len(parts) > 1 else {"residual": product}
        given = (*stack, stack[2], parts, None, product, low)
        low_rank_triton(x, positions, *given, **beside, pdl=pdl)
    cos, sin = (some(tokens, half, dtype=torch.float32) for _ in range(2))
    rope_triton(positions, some(half, dtype=torch.float32), cos, sin)
    launch_attention(size, (positions, slots, cu_seqlens, lengths, cos, sin), dtype, page_size, pdl)


def launch_attention(
    size: Size,
    batch: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
    page_size: int,
    pdl: bool,
) -> None:
    """Launch the kernels that read and write pages, with one page a slot and with several."""
    positions, slots, cu_seqlens, lengths, cos, sin = batch
    tokens, sequences = len(positions), len(slots)
    heads, kv_heads = size.heads, size.kv_heads

    def some(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    norms, eps = (some(size.head_dim), some(size.head_dim)), 1e-5
    qkv = some(tokens, (heads + 2 * kv_heads) * size.head_dim)
    q, out = some(tokens, heads, size.head_dim), some(tokens, heads * size.head_dim)
    for pages_per_slot in (1, 3):
        table = some(sequences, pages_per_slot, dtype=torch.int32)
        k, v = (
            some(sequences * pages_per_slot, kv_heads, page_size, size.head_dim) for _ in range(2)
        )
        for write_from in (None, lengths):
            places = (positions, cu_seqlens, slots, write_from, table)
            qk_norm_rope_triton(qkv, *norms, eps, cos, sin, *places, q, k, v)
        for most_tokens in (3, 16, 2048):
            flash_prefill_triton(q, k, v, table, cu_seqlens, slots, lengths, out, most_tokens)
        splits = most_splits(pages_per_slot * page_size)
        means = some(
            sequences, kv_heads, splits, heads // kv_heads, size.head_dim, dtype=torch.float32
        )
        for verified in (False, True):
            flash_decode_triton(
                qkv[:sequences],
                *norms,
                eps,
                cos[:sequences],
                sin[:sequences],
                slots,
                lengths,
                table,
                k,
                v,
                out[:sequences],
                means,
                means[..., 0].contiguous(),
                some(sequences, kv_heads, dtype=torch.int32),
                verified=verified,
                pdl=pdl,
            )


def launch_few(
    size: Size,
    dtype: torch.dtype,
    *,
    tokens: int = 2,
    bias: bool = False,
    bits: int = 16,
    pdl: bool = False,
) -> None:
    """Launch every kernel of few tokens in each of its shapes.

    ``bias`` adds a bias where one is possible; ``bits`` 8 and 4 are int8 and int4.
    """
    hidden, attended, eps = size.hidden, size.heads * size.head_dim, 1e-5

    def some(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def rows_bias(rows: int) -> torch.Tensor | None:
        return some(rows) if bias else None

    def weight(rows: int, columns: int, bits: int = bits) -> tuple[torch.Tensor, Any, Any]:
        if bits == 4:
            matrix = some(rows, columns // 2, dtype=torch.uint8)
            return matrix, rows_bias(rows), some(rows, columns // 32, dtype=torch.float16)
        matrix = some(rows, columns, dtype=torch.int8 if bits == 8 else dtype)
        return matrix, rows_bias(rows), some(rows, dtype=torch.float32) if bits == 8 else None

    x, norm = some(tokens, hidden), (some(hidden), eps)
    qkv = attended + 2 * size.kv_heads * size.head_dim
    for rows in (qkv, size.vocabulary):
        norm_linear_triton(x, *norm, *weight(rows, hidden), some(tokens, rows), pdl=pdl)
    for columns in (attended, size.inner):
        linear_add_triton(some(tokens, columns), *weight(hidden, columns), x, x, pdl=pdl)
    swiglu = some(tokens, size.inner)
    norm_swiglu_triton(x, *norm, *weight(2 * size.inner, hidden), swiglu, pdl=pdl)
    places = (some(tokens, dtype=torch.int64) for _ in range(2))
    window = some(tokens, size.width + 1, hidden)
    conv = (some(hidden, size.width), rows_bias(hidden), window, *places)
    for verified in (False, True):
        in_proj = weight(3 * hidden, hidden)
        norm_conv_triton(x, *norm, *in_proj, *conv, x, verified=verified, pdl=pdl)
    table, _, scale = weight(size.vocabulary, hidden, max(bits, 8))
    whole, half = some(tokens, dtype=torch.int64), size.head_dim // 2
    angles = (some(tokens, half, dtype=torch.float32) for _ in range(2))
    inv_freq = some(half, dtype=torch.float32)
    embed_triton(whole, table, scale, x)
    embed_rope_triton(whole, table, scale, x, whole, inv_freq, *angles, pdl=pdl)
    if bits == 8:
        embed_triton(None, table, scale, some(size.vocabulary, hidden))
    head = weight(size.vocabulary, hidden)
    if bits == 4:
        widen_int4_triton(head[0], head[2], some(size.vocabulary, hidden))
    best = some(head_tiling(head[0]).programs, MOST_TOKENS, dtype=torch.int64)
    head_argmax_triton(x, *norm, *head, best, pdl=pdl)
    argmax_advance_triton(best, whole[:, None], 1, *step_inputs(whole), pdl=pdl)


def launch_adapted(
    size: Size, dtype: torch.dtype, *, bits: int = 16, tokens: int = 2, pdl: bool = False
) -> None:
    """Launch the kernels of few tokens that add an adapter's change, of rank 16."""
    hidden, attended, eps = size.hidden, size.heads * size.head_dim, 1e-5

    def some(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def weight(rows: int, columns: int) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        if bits == 4:
            scale = some(rows, columns // 32, dtype=torch.float16)
            return some(rows, columns // 2, dtype=torch.uint8), None, scale
        matrix = some(rows, columns, dtype=torch.int8 if bits == 8 else dtype)
        return matrix, None, some(rows, dtype=torch.float32) if bits == 8 else None

    def change(columns: int, *parts: int) -> dict[str, Change]:
        ranks, rows = 16 * len(parts), sum(parts)
        low = some(*low_shape(tokens, columns, ranks), dtype=torch.float32)
        numbers = some(4, 16, rows), some(4, rows), some(4, rows)
        entries = some(tokens, dtype=torch.int64)
        return {"change": Change(entries, low, *numbers, None, parts)}

    x, norm = some(tokens, hidden), (some(hidden), eps)
    parts = attended, *[size.kv_heads * size.head_dim] * 2
    qkv = weight(sum(parts), hidden)
    out = some(tokens, sum(parts))
    norm_linear_triton(x, *norm, *qkv, out, **change(hidden, *parts), pdl=pdl)
    for columns in (attended, size.inner):
        y = some(tokens, columns)
        linear_add_triton(y, *weight(hidden, columns), x, x, **change(columns, hidden), pdl=pdl)
    gate_up = weight(2 * size.inner, hidden), some(tokens, size.inner)
    both = change(hidden, size.inner, size.inner)
    norm_swiglu_triton(x, *norm, *gate_up[0], gate_up[1], **both, pdl=pdl)
    places = (some(tokens, dtype=torch.int64) for _ in range(2))
    window = some(tokens, size.width + 1, hidden)
    conv = some(hidden, size.width), None, window, *places, x
    in_proj = weight(3 * hidden, hidden)
    norm_conv_triton(x, *norm, *in_proj, *conv, **change(hidden, 3 * hidden), pdl=pdl)


def step_inputs(whole: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Inputs of a step, and the tokens that it writes."""
    return whole, whole, whole, whole.int(), whole.bool(), whole


def launch_size(size: Size, dtype: torch.dtype, *, pdl: bool) -> None:
    """Launch all kernels of a published size; biases only at the first one."""
    launch_all(size, dtype, pdl=pdl)
    for bias in (False, True) if size is SIZES[0] else (False,):
        launch_few(size, dtype, bias=bias, pdl=pdl)
    for bits in (8, 4):
        launch_few(size, dtype, bits=bits, pdl=pdl)
    for bits in (16, 8, 4):
        launch_adapted(size, dtype, bits=bits, pdl=pdl)


def launch_sample(
    vocab: int, dtype: torch.dtype, *, sequences: int = 2, pdl: bool = False, most: bool = False
) -> None:
    """Launch the choice of tokens: greedy, sampled, and sampled after a top-k and top-p cut.

    ``most`` launches only the choice that needs every kernel.
    """
    logits = torch.zeros(sequences, vocab, dtype=dtype)
    whole = torch.zeros(sequences, dtype=torch.int64)
    advance_triton(whole, whole[:, None], 1, *step_inputs(whole), pdl=pdl)
    filters = (whole.double(), whole.bool(), whole.double(), whole, whole.double(), whole.double())
    choices = itertools.product(
        (None, logits.bool()), ((False, False), (True, False), (True, True))
    )
    for seen, (draws, cuts) in list(choices)[-1 if most else 0 :]:
        scratch = Scratch.empty(logits, draws=draws, cuts=cuts)
        places = (whole, whole, whole, whole, scratch)
        sample_triton(logits, seen, *filters, *places, draws=draws, cuts=cuts, pdl=pdl)


def compile_all(
    arch: int,
    dtypes: Iterable[str],
    only: Collection[str] = (),
    maxnreg: int | None = None,
    sizes: Iterable[Size] = SIZES,
    *,
    recompile: bool = True,
) -> list[Compiled]:
    """Return every kernel that the sizes and vocabularies use, each once.

    Without ``recompile``, kernels in Triton's cache are only assembled again, from their PTX.
    """
    found: dict[str, Compiled] = {}
    used_by = {size.name: functools.partial(launch_size, size) for size in sizes}
    used_by |= {f"V={vocab}": functools.partial(launch_sample, vocab) for vocab in VOCABULARIES}
    for dtype, (user, launch) in itertools.product(dtypes, used_by.items()):
        with compiling(arch, only, maxnreg, recompile=recompile) as launches:
            launch(getattr(torch, dtype), pdl=arch >= 90)
        for name, kernel, log in launches:
            if kernel.hash not in found:
                log = log or log_of_ptx(kernel)
                found[kernel.hash] = Compiled(
                    name=name,
                    dtype=dtype,
                    warps=kernel.metadata.num_warps,
                    registers=_number(r"Used (\d+) registers", log),
                    spilled=_number(r"(\d+) bytes spill stores", log),
                    stack=_number(r"(\d+) bytes stack frame", log),
                    shared=kernel.metadata.shared,
                )
            if user not in found[kernel.hash].sizes:
                found[kernel.hash].sizes.append(user)
    return sorted(found.values(), key=lambda kernel: kernel.name)


def log_of_ptx(kernel: Any) -> str:
    """Return what ptxas prints of a kernel whose PTX is in Triton's cache."""
    target = re.search(r"\.target (\w+)", kernel.asm["ptx"])
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"], encoding="utf-8")
        tools = triton.knobs.nvidia
        # Triton's own choice: Blackwell has an assembler of its own.
        is_blackwell = int(target[1].strip("sm_a")) >= 100
        tool = tools.ptxas_blackwell if is_blackwell else tools.ptxas
        command = [tool.path, "-lineinfo", "-v", f"--gpu-name={target[1]}"]
        command += [str(source), "-o", str(source.with_suffix(".cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _number(pattern: str, log: str) -> int:
    match = re.search(pattern, log)
    assert match, f"no {pattern!r} in what ptxas printed:\n{log}"
    return int(match[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, metavar="SM")
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--only", nargs="+", default=(), metavar="KERNEL")
    names = [size.name for size in SIZES]
    parser.add_argument("--size", nargs="+", default=names, choices=names)
    parser.add_argument("--maxnreg", type=int, help="registers a thread may have, to see spills")
    parser.add_argument(
        "--cached", action="store_true", help="keep the PTX of kernels in Triton's cache"
    )
    args = parser.parse_args()

    print(f"triton {triton.__version__}; bytes: spilled and stack a thread, shared a program")
    print(
        f"{'kernel':16} {'sm':>3} {'dtype':8} {'warps':>5} {'regs':>5} {'spilled':>7} {'stack':>5} "
        f"{'shared':>6}  sizes"
    )
    spilling, sizes = 0, [size for size in SIZES if size.name in args.size]
    for arch in args.arch:
        only, recompile = args.only, not args.cached
        for k in compile_all(arch, args.dtype, only, args.maxnreg, sizes, recompile=recompile):
            print(
                f"{k.name:16} {arch:3} {k.dtype:8} {k.warps:5} {k.registers:5} {k.spilled:7} "
                f"{k.stack:5} {k.shared:6}  {' '.join(k.sizes)}"
            )
            spilling += k.spilled > 0
    if spilling:
        sys.exit(f"{spilling} kernels spill registers")


if __name__ == "__main__":
    main()
