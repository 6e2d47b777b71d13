"""Build and loading of the extension; its CUDA kernel, as far as no GPU is needed."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast.cache.batch import Batch
from lfm2_fast.ops import native_library
from lfm2_fast.ops import reference as ref

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
INCLUDE = Path(torch.__file__).parent / "include"
COMPILER = shlex.split(os.environ.get("CXX", "")) or ["c++"]

compiles = pytest.mark.skipif(not shutil.which(COMPILER[0]), reason="there is no C++ compiler")
# nvcc preprocesses every source by the host's compiler.
compiles_cuda = pytest.mark.skipif(
    not (shutil.which("nvcc") and shutil.which("gcc")), reason="nvcc and gcc are not on PATH"
)
x86 = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="the instruction sets are those of x86-64",
)


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **env}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without an extension, in a folder to run Python in."""
    without = shutil.ignore_patterns("*.so", "__pycache__", "tiny")
    shutil.copytree(Path(lfm2_fast.__file__).parent, tmp_path / "lfm2_fast", ignore=without)
    return tmp_path


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., ctypes.CDLL]:
    """Compiles a source whose NUMBER is that of a dtype."""
    names = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}

    def build(source: str, dtype: torch.dtype, *options: str) -> ctypes.CDLL:
        (tmp_path / "a.cpp").write_text(source, encoding="utf-8")
        options += ("-std=c++17", "-fPIC", "-shared", f"-I{CSRC}", f"-DNUMBER={names[dtype]}")
        done = run(*COMPILER, *options, "a.cpp", "-o", "a.so", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(tmp_path / "a.so"))

    return build


ASK = """
import logging, torch
logging.basicConfig(format="%(name)s %(message)s")
from lfm2_fast.ops.select import BackendError, choose, why_not
where = torch.device("cpu"), torch.float32
print(why_not("native", *where))
print(choose("auto", *where).name)
try:
    choose("native", *where)
except BackendError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("content", "said", "logged"),
    [
        (None, "installed without its C++ extension", 0),
        (b"no library", "_C.abi3.so cannot be loaded", 1),
    ],
    ids=["absent", "broken"],
)
def test_without_an_extension_the_rest_works(package, content, said, logged) -> None:
    """The reason and a remedy are available. A broken extension is logged once."""
    if content is not None:
        (package / "lfm2_fast" / "_C.abi3.so").write_bytes(content)
    done = run(sys.executable, "-c", ASK, cwd=package)
    assert done.returncode == 0, done.stderr
    reason, chosen, error = done.stdout.splitlines()
    assert said in reason and "pip install --no-build-isolation ." in reason
    assert chosen == "eager"
    assert error == f"backend='native' cannot run on cpu: {reason}"
    assert done.stderr.count("cannot be loaded") == logged


def test_an_extension_without_cuda_is_reported() -> None:
    cpu_alone = native_library.why_not(torch.device("cpu")) is None and torch.version.cuda is None
    if not cpu_alone:
        pytest.skip("needs an extension that was built without CUDA")
    assert "built without CUDA" in str(native_library.why_not(torch.device("cuda")))


LEVELS = {"x86-64": (), "x86-64-v3": ("AVX2", "AVX512"), "x86-64-v4": ("AVX512",)}


def need(level: str) -> None:
    if LEVELS[level] and torch.backends.cpu.get_cpu_capability() not in LEVELS[level]:
        pytest.skip(f"this machine is no {level}")


# Two operations without torch's headers, which take the compiler ten times as long.
OPERATIONS = """
#include "rms_norm.h"
#include "swiglu.h"

using namespace lfm2;

extern "C" void norm(NUMBER* x, NUMBER* weight, NUMBER* out, int64_t width, int64_t rows) {
  rms_norm<NUMBER>({x, width}, weight, 1e-5f, width, {out, width}, 0, rows);
}

extern "C" void gate(NUMBER* gate_up, NUMBER* out, int64_t width, int64_t rows) {
  swiglu<NUMBER>({gate_up, 2 * width}, width, {out, width}, 0, rows);
}
"""


@compiles
@x86
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_operations_for_each_instruction_set(level, dtype, compiled, within_budget) -> None:
    """Each clone that the loader chooses from, built as the only one."""
    need(level)
    library = compiled(OPERATIONS, dtype, "-O3", f"-march={level}", "-DLFM2_NO_CLONES")
    torch.manual_seed(0)
    rows, width = 3, 37
    x, gate_up = torch.randn(rows, width).to(dtype), (4 * torch.randn(rows, 2 * width)).to(dtype)
    weight = torch.randn(width).to(dtype)

    def computed(function: Any, *given: torch.Tensor) -> torch.Tensor:
        out = torch.full((rows, width), float("nan"), dtype=dtype)
        at = [ctypes.c_void_p(each.data_ptr()) for each in (*given, out)]
        function(*at, ctypes.c_int64(width), ctypes.c_int64(rows))
        return out

    for function, given, meaning in (
        (library.norm, (x, weight), lambda x, weight: ref.rms_norm_ref(x, weight, 1e-5)),
        (library.gate, (gate_up,), ref.swiglu_ref),
    ):
        exact = meaning(*(each.double() for each in given))
        within_budget(computed(function, *given), exact, meaning(*given))


@compiles
@x86
@pytest.mark.nightly
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_alone(level: str, tmp_path: Path) -> None:
    """The whole extension, built for one alone, passes the bodies' tests."""
    need(level)
    flags = f"-march={level} -DLFM2_NO_CLONES"
    places = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    build = (sys.executable, "setup.py", "-q", "build", *places)
    done = run(*build, cwd=ROOT, CFLAGS=flags, LFM2_FAST_BUILD_EXT="1")
    assert done.returncode == 0, done.stderr
    names = ("csrc/test_cpu", "csrc/test_checks", "csrc/test_linear", "csrc/test_sampling")
    files = [ROOT / "tests" / f"{name}.py" for name in (*names, "ops/test_native_ops")]
    tests = (*files, "-k", "not threads and not schemas and not processor")
    # The package is the one that was built, not the checkout's.
    options = ("-q", "-c", ROOT / "pyproject.toml", "-o", "pythonpath=", "-p", "no:cacheprovider")
    done = run(sys.executable, "-m", "pytest", *options, *tests, cwd=tmp_path / "lib")
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout and "skipped" not in done.stdout


@x86
@pytest.mark.skipif(native_library.why_not(torch.device("cpu")) is not None, reason="no extension")
def test_the_extension_holds_every_instruction_set() -> None:
    (library,) = Path(lfm2_fast.__file__).parent.glob("_C*.so")
    assert {b".arch_x86_64_v3", b".arch_x86_64_v4", b".default"} <= set(
        re.findall(rb"flash_decode\w*(\.\w+)", library.read_bytes())
    )


@compiles
@x86
@pytest.mark.parametrize("source", sorted(CSRC.glob("*_avx*.cpp")), ids=lambda path: path.stem)
def test_newer_instructions_stay_in_their_file(source: Path, tmp_path: Path) -> None:
    """The file has one function. The linker could use another one on every machine."""
    options = ("-std=c++17", "-O1", "-fopenmp-simd", "-fPIC")
    done = run(*COMPILER, *options, "-c", source, "-o", tmp_path / "a.o", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    listed = run("nm", "-C", "--defined-only", "--extern-only", tmp_path / "a.o", cwd=ROOT).stdout
    found = [line.split(maxsplit=2)[1:] for line in listed.splitlines()]
    assert [kind for kind, _ in found] == ["T"] * len(found)
    assert all(name.startswith(f"lfm2::{source.stem}(") for _, name in found)


@compiles
@x86
def test_eight_bit_numbers_are_widened_as_vectors(tmp_path: Path) -> None:
    """Widening one by one would take ten times as long."""
    (tmp_path / "a.cpp").write_text(
        '#include "simd.h"\nusing namespace lfm2;\n'
        "void widen(const int8_t* from, Lanes& a, Lanes& b) { load(from, a, b); }\n",
        encoding="utf-8",
    )
    options = ("-std=c++17", "-O3", "-march=x86-64-v3", f"-I{CSRC}", "-S")
    done = run(*COMPILER, *options, "a.cpp", "-o", "a.s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "a.s").read_text(encoding="utf-8")
    assert len(re.findall(r"^\tv?cvtdq2ps\s.*ymm", text, re.MULTILINE)) == 2
    assert len(re.findall(r"^\t[a-z]", text, re.MULTILINE)) < 20


@compiles
def test_code_that_is_not_compiled_is_not_referred_to(tmp_path: Path) -> None:
    """With another compiler, files of newer instructions are empty."""
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    places = (f"-I{INCLUDE}", f"-I{INCLUDE}/torch/csrc/api/include")
    options = ("-std=c++20", "-O0", "-DLFM2_NO_CLONES", "-fPIC", target, *places)
    for name in ("cpu.cpp", "flash_prefill.cpp", "linear.cpp"):
        done = run(*COMPILER, *options, "-c", CSRC / name, "-o", tmp_path / "a.o", cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert "avx512" not in run("nm", "-C", tmp_path / "a.o", cwd=ROOT).stdout


@compiles_cuda
@pytest.mark.parametrize(
    ("arch", "what"),
    [
        ("sm_90", "-cubin"),  # the host's code is checked, but none is made
        pytest.param("sm_90", "-c", marks=pytest.mark.nightly),
        pytest.param("sm_80", "-c", marks=pytest.mark.nightly),
    ],
)
def test_cuda_sources_compile(arch: str, what: str, tmp_path: Path) -> None:
    """Without spills, for GPUs that are not here."""
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    options = ("-std=c++17", "-O3", "-DUSE_CUDA", target, f"-I{INCLUDE}", f"-arch={arch}")
    options += ("-Xptxas", "-v", what)
    done = run("nvcc", *options, CSRC / "cuda.cu", "-o", tmp_path / "a.o", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores", done.stderr)
    assert len(spills) >= 42 and set(spills) == {"0"}


@compiles_cuda
@pytest.mark.parametrize(("number", "each"), [("bf16", 8), ("fp16", 8), ("float", 4)])
def test_cuda_kernel_moves_16_bytes_at_a_time(number: str, each: int, tmp_path: Path) -> None:
    kind = number if number == "float" else f"lfm2::{number}"
    (tmp_path / "a.cu").write_text(
        '#include "gated_conv_step.cuh"\n'
        f"template __global__ void lfm2::gated_conv_step_kernel<{kind}, {each}, 3>"
        f"(lfm2::GatedConvStep<{kind}>);\n",
        encoding="utf-8",
    )
    options = ("-std=c++17", "-O3", f"-I{CSRC}", "-arch=sm_90", "-ptx")
    done = run("nvcc", *options, "a.cu", "-o", "a.ptx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "a.ptx").read_text(encoding="utf-8")
    loads, stores = (re.findall(rf"{way}\.global\.(\S+)", text) for way in ("ld", "st"))
    # Beside the slot and the position: 2 old rows, 3 of taps, the bias, B, C and x.
    assert sum(load.startswith("v4.") for load in loads) == 9 and len(loads) == 11
    assert len(stores) == 2 and all(store.startswith("v4.") for store in stores)


EMULATION = """
#define __global__
#define __device__
struct Place { unsigned x, y; };
static Place blockIdx, blockDim, threadIdx;
#include "gated_conv_step.cuh"

using namespace lfm2;

template <int kEach, int kWidth>
void every_thread(const GatedConvStep<NUMBER>& conv, unsigned sequences) {
  blockDim = {8, 1};
  const unsigned blocks = (conv.hidden + 8 * kEach - 1) / (8 * kEach);
  for (blockIdx.y = 0; blockIdx.y < sequences; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x)
        gated_conv_step_kernel<NUMBER, kEach, kWidth>(conv);
}

template <int kEach>
void emulate(const GatedConvStep<NUMBER>& conv, int width, unsigned sequences) {
  if (width == 2) every_thread<kEach, 2>(conv, sequences);
  if (width == 3) every_thread<kEach, 3>(conv, sequences);
  if (width == 8) every_thread<kEach, 8>(conv, sequences);
}

extern "C" void step(NUMBER* bcx, NUMBER* weight, NUMBER* bias, NUMBER* window, int ring,
                     int hidden, int width, int64_t* slots, int64_t* positions, NUMBER* out,
                     int sequences, bool whole) {
  const GatedConvStep<NUMBER> conv{{bcx, 3 * hidden}, weight, bias, window, ring * hidden,
                                   hidden, ring, hidden, slots, positions, {out, hidden}};
  whole ? emulate<16 / sizeof(NUMBER)>(conv, width, sequences) : emulate<1>(conv, width, sequences);
}
"""


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_kernel_computes_what_the_reference_does(
    dtype, compiled, same_bits, within_budget
) -> None:
    """The kernel's threads run one after another on the CPU."""
    library, count = compiled(EMULATION, dtype, "-O1"), 6
    starts, slots = [9, 0, 127_000, 1, 7, 2], [4, 0, 6, 1, 8, 2]
    batch = Batch.prepare([1] * count, starts, slots, "cpu")
    for width in (2, 3, 8):
        for hidden, whole in ((96, True), (96, False), (37, False)):
            for bias in (None, torch.randn(hidden).to(dtype)):
                torch.manual_seed(width)
                bcx = torch.randn(count, 3 * hidden).to(dtype)
                weight = torch.randn(hidden, width).to(dtype)
                window = torch.full((9, width + 1, hidden), float("nan"), dtype=dtype)
                for slot, start in zip(
                    batch.required_host.slots, batch.required_host.starts, strict=True
                ):
                    for position in range(max(0, start - width + 1), start):
                        window[slot, position % (width + 1)] = torch.randn(hidden).to(dtype)

                def expected(kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
                    moved = window.to(kind, copy=True)  # noqa: B023
                    weights = weight.to(kind), bias if bias is None else bias.to(kind)  # noqa: B023
                    rows = bcx.to(kind)  # noqa: B023
                    return ref.gated_conv_step_ref(rows, *weights, moved, batch), moved

                exact, _ = expected(torch.float64)
                plain, moved = expected(dtype)
                out = torch.full_like(plain, float("nan"))
                at = [
                    ctypes.c_void_p(None if t is None else t.data_ptr())
                    for t in (bcx, weight, bias, window, batch.slots, batch.positions, out)
                ]
                library.step(*at[:4], width + 1, hidden, width, *at[4:], count, whole)
                assert same_bits(window, moved)
                within_budget(out, exact, plain)
