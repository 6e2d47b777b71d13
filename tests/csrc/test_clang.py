"""The sources under clang, for x86-64 and AArch64: no warning, and nothing that only GCC knows."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parents[2] / "csrc"
INCLUDE = Path(torch.__file__).parent / "include"
SOURCES = sorted(CSRC.glob("*.cpp"))
# Only `make test-arm` builds and runs it.
BODIES = CSRC.parent / "tests" / "arm" / "bodies.cpp"
# Of these torch's headers take most of the time.
WITH_TORCH = [path for path in SOURCES if "#include <torch/" in path.read_text(encoding="utf-8")]
NIGHTLY = pytest.mark.nightly
TARGETS = (
    "x86_64-linux-gnu",
    pytest.param("x86_64-linux-gnu -march=x86-64-v3", marks=NIGHTLY),
    pytest.param("aarch64-linux-gnu", marks=NIGHTLY),
    "aarch64-linux-gnu -march=armv8.6-a",
    # Apple's processor and library: SDOT, and neither SMMLA nor BFDOT.
    pytest.param("aarch64-linux-gnu -mcpu=apple-m1 -stdlib=libc++", marks=NIGHTLY),
)

pytestmark = pytest.mark.skipif(not shutil.which("clang++"), reason="there is no clang++")


def compile_by_clang(target: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    strict = ("-Wall", "-Wextra", "-Werror", "-fsyntax-only")
    options = ("-std=c++17", "-O1", "-fopenmp-simd", "-DTORCH_TARGET_VERSION=0x020a000000000000")
    headers = ("-isystem", INCLUDE, "-isystem", INCLUDE / "torch/csrc/api/include", "-I", CSRC)
    command = ["clang++", f"--target={target.split()[0]}", *target.split()[1:], *strict, *options]
    return subprocess.run([*command, *headers, *arguments], text=True, capture_output=True)


@pytest.mark.parametrize(
    "with_torch", [False, pytest.param(True, marks=NIGHTLY)], ids=["kernels", "torch"]
)
@pytest.mark.parametrize("target", TARGETS)
def test_clang_takes_every_source(target: str, with_torch: bool, tmp_path: Path) -> None:
    (tmp_path / "libraries.cpp").write_text("#include <vector>\n#include <stdint.h>\n", "utf-8")
    if compile_by_clang(target, tmp_path / "libraries.cpp").returncode:
        pytest.skip(f"no C++ headers for {target}: g++-aarch64-linux-gnu or libc++-dev has them")
    sources = WITH_TORCH if with_torch else [*sorted(set(SOURCES) - set(WITH_TORCH)), BODIES]
    done = compile_by_clang(target, *sources)
    assert done.returncode == 0, done.stderr
