"""Products on older processors, where PyTorch multiplies differently.

oneDNN reads ``ONEDNN_MAX_CPU_ISA`` once, so every case has its own process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="the instruction sets are those of x86-64",
)

TESTS = (
    "csrc/test_linear.py::test_many_tokens_are_right",
    "ops/test_native_ops.py::test_models_equal_eager",
    "weights/test_formats.py::test_bodies_keep_close_to_the_widened_matrix",
)
ON_TRAINED_WEIGHTS = (
    "cli/test_evaluation.py::test_eight_bits_lose_little",
    "hf/test_causal_lm.py::test_bf16_is_no_further_from_fp32_than_hugging_faces",
    "hf/test_causal_lm.py::test_held_out_loss_is_hugging_faces",
)
NIGHTLY = pytest.mark.nightly
PROCESSORS = ["AVX2", pytest.param("AVX512_CORE", marks=NIGHTLY)]


def python(most: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": most}
    command = (sys.executable, *arguments)
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("tests", [TESTS, pytest.param(ON_TRAINED_WEIGHTS, marks=NIGHTLY)])
@pytest.mark.parametrize("most", PROCESSORS)
def test_an_older_processor_multiplies_rightly(most: str, tests: tuple[str, ...]) -> None:
    """Without bfloat16's products and, in both cases, with 8-bit ones that overflow."""
    if most == "AVX512_CORE" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        pytest.skip("this machine has no more than AVX2, which is the other case")
    names = (str(ROOT / "tests" / test) for test in tests)
    done = python(most, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not nightly", *names)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("most", PROCESSORS)
def test_info_says_what_is_multiplied(most: str) -> None:
    """Products of 8-bit integers are listed if they are exact and fast: on x86-64 with VNNI."""
    code = """
import platform
import torch
from lfm2_fast.__main__ import main
signs = torch.randint(2, (2, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
a, b = (127 * signs).to(torch.int8)
exact = bool((torch._int_mm(a, b) == a.double() @ b.double()).all())
vnni = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
print(exact and (vnni or platform.machine() != "x86_64"))
main(["info", "--json"])
"""
    usable, _, told = python(most, "-c", code).stdout.partition("\n")
    products = json.loads(told)["device"]["products"].split()
    assert "float32" in products
    assert str("int8" in products) == usable
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert "int8" not in products
    assert most != "AVX2" or "bfloat16" not in products
