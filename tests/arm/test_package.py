"""The package on AArch64: the extension loads, and texts are those of plain PyTorch.

`make test-arm` runs this under emulation; elsewhere it is skipped.
"""

from __future__ import annotations

import platform
from functools import partial
from pathlib import Path

import pytest
import torch

import lfm2_fast
from lfm2_fast.ops.select import why_not

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("aarch64", "arm64"), reason="this is no AArch64"
)


def test_the_extension_loads() -> None:
    assert why_not("native", torch.device("cpu"), torch.float32) is None


def test_it_writes_what_plain_pytorch_writes(tiny: Path) -> None:
    prompt = torch.arange(20, 60)[None]
    texts = []
    for backend in ("native", "eager"):
        model = lfm2_fast.load(tiny, device="cpu", backend=backend, dtype="float32")
        texts.append(model.generate(prompt, max_new_tokens=8, do_sample=False))
    assert texts[0].shape == (1, 48)
    assert torch.equal(*texts)


def test_logits_are_as_close_as_plain_pytorchs(tiny, as_close_to_fp32) -> None:
    load = partial(lfm2_fast.load, tiny, device="cpu")
    exact = load(backend="eager", dtype="float32")
    eager, native = (load(backend=each, dtype="bfloat16") for each in ("eager", "native"))
    # One text of 40 tokens has a distance that is off by 8 % of its own, by chance.
    as_close_to_fp32(exact, eager, native, [torch.arange(20, 980).view(24, 40)])
