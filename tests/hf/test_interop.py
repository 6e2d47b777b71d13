"""Models of transformers in memory, and its Auto classes."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast import Config
from lfm2_fast.weights.fusion import checkpoint_bytes, fusion_table

ROOT = Path(__file__).resolve().parents[2]

IDS = torch.randint(8, 307, (2, 9), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def theirs(random_checkpoint) -> Any:
    from transformers import Lfm2ForCausalLM

    folder = random_checkpoint(conv_bias=True)
    return Lfm2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def copied_bytes(config: Config, quantization: str | None) -> int:
    """Bytes that ``from_transformers`` copies for a model in bfloat16: fused or quantized."""
    return sum(
        (fused.dtype or torch.bfloat16).itemsize * math.prod(fused.shape)
        for fused in fusion_table(replace(config, quantization=quantization)).values()
        if fused.dtype is not None or len(fused.parts) > 1
    )


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() < 2e-5 * theirs.abs().max())


@torch.no_grad()
def test_a_model_in_memory_as_it_is_now(theirs) -> None:
    """The model has edited weights, a resized vocabulary, an untied head. It is not on the disk."""
    theirs.model.layers[0].feed_forward.w1.weight.mul_(0.5)
    theirs.resize_token_embeddings(320)
    theirs.generation_config.max_new_tokens = 3
    ours = lfm2_fast.from_transformers(theirs)
    assert same(ours(IDS).logits, theirs(IDS).logits)
    assert ours.config.vocab_size == ours(IDS).logits.shape[-1] == 320
    assert ours.generate(IDS).shape == (2, 12)
    theirs.lm_head.weight = torch.nn.Parameter(-theirs.lm_head.weight)
    assert same(lfm2_fast.from_transformers(theirs)(IDS).logits, theirs(IDS).logits)
    base = lfm2_fast.from_transformers(theirs.model)
    assert isinstance(base, lfm2_fast.Lfm2Model)
    assert same(base(IDS).last_hidden_state, theirs.model(IDS).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_rope_scaling_comes_along(random_checkpoint, kind: str) -> None:
    from transformers import Lfm2ForCausalLM

    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    folder = random_checkpoint(max_position_embeddings=5, rope_parameters=rope)
    theirs = Lfm2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = lfm2_fast.from_transformers(theirs)
    assert same(ours(IDS).logits, theirs(IDS).logits)
    assert ours.config.rope_parameters["factor"] == 4.0 and ours.max_length == 20
    base = lfm2_fast.from_transformers(theirs.model)
    assert same(base(IDS).last_hidden_state, theirs.model(IDS).last_hidden_state)
    frequencies = ours.network.rope_frequencies
    frequencies.follows_length, frequencies.scale = False, 1.0
    assert not same(ours(IDS).logits, theirs(IDS).logits)


def test_memory_is_shared_but_for_fused_tensors(theirs) -> None:
    ours = lfm2_fast.from_transformers(theirs)
    held = {p.data_ptr() for p in theirs.parameters()}
    copied = {
        name for name, tensor in ours.network.state_dict().items() if tensor.data_ptr() not in held
    }
    table = fusion_table(ours.network.config)
    assert copied == {name for name, fused in table.items() if len(fused.parts) > 1}


@torch.no_grad()
def test_their_model_stays_what_it_is(theirs) -> None:
    """Their model runs as before and may be deleted. Edits of shared tensors show in both."""
    before, state = theirs(IDS).logits, {k: v.clone() for k, v in theirs.state_dict().items()}
    ours = lfm2_fast.from_transformers(theirs)
    assert torch.equal(theirs(IDS).logits, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in theirs.state_dict().items())
    layer = theirs.model.layers[1]
    layer.feed_forward.w2.weight.mul_(1.5)
    assert same(ours(IDS).logits, theirs(IDS).logits) and not same(theirs(IDS).logits, before)
    layer.self_attn.q_proj.weight.neg_()
    assert not same(ours(IDS).logits, theirs(IDS).logits)
    again = lfm2_fast.from_transformers(theirs)
    expected = theirs(IDS).logits
    assert same(again(IDS).logits, expected)
    for name in [name for name, _ in theirs.named_parameters()]:
        # As ``theirs.to(...)`` does, and as its end would: its parameters get other memory.
        theirs.get_parameter(name).data = torch.zeros(0)
    assert same(again(IDS).logits, expected)


MEMORY = """
import gc, json, sys
import torch
import lfm2_fast
from transformers import Lfm2Config, Lfm2ForCausalLM

def memory(field):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))

def convert(config, quantization):
    with torch.device("meta"):
        theirs = Lfm2ForCausalLM(Lfm2Config(**config)).to(torch.bfloat16)
    theirs.to_empty(device="cpu").tie_weights()
    for parameter in theirs.parameters():
        parameter.detach().fill_(0.01)
    gc.collect()
    before, highest = memory("VmRSS"), memory("VmHWM")
    ours = lfm2_fast.from_transformers(theirs, quantization=quantization)
    peak, held = memory("VmHWM") - max(before, highest), memory("VmRSS") - before
    weights = theirs.get_memory_footprint()
    del theirs
    gc.collect()
    return before, highest, peak, held, memory("VmRSS") - before + weights, ours

config, quantization = json.loads(sys.argv[1])
small = {"vocab_size": 64, "intermediate_size": 64, "hidden_size": 64, "num_attention_heads": 8}
convert({**config, **small}, quantization)  # imports what the first call does
*numbers, ours = convert(config, quantization)
print(json.dumps([*numbers, ours.get_memory_footprint()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("quantization", [pytest.param(None, marks=pytest.mark.nightly), "int8"])
def test_the_peak_of_memory_is_their_model_and_the_copies(quantization: str | None) -> None:
    """Beside their model, the peak grows by the copies and less than 16 MB.

    Every tensor over 64 kB has its own memory here, which is freed with the tensor.
    """
    config = {
        "vocab_size": 16384,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    }
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, json.dumps([config, quantization])],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    before, highest, peak, held, after, ours = json.loads(done.stdout)
    slack = 16 << 20
    assert highest < before + slack, "the peak of making their model would hide that of the call"
    copied = copied_bytes(lfm2_fast.Lfm2Config(**config).to_internal(), quantization)
    assert copied > 4 * slack
    assert copied - slack < held <= peak < copied + slack
    assert ours - slack < after < ours + slack, "deleting their model does not free what was copied"


def test_the_page_tells_the_bytes_of_the_published_sizes() -> None:
    page = (ROOT / "docs" / "usage" / "huggingface.md").read_text(encoding="utf-8")
    for start, quantization in (("q, k and v", None), ("`quantization=", "int8")):
        cells = re.search(rf"^\| {start}[^|]*\| (.*) \|$", page, re.MULTILINE)
        assert cells is not None
        for size, cell in zip(["350M", "700M", "1.2B", "2.6B"], cells[1].split(" | "), strict=True):
            config = Config.from_file(ROOT / "tests" / "data" / f"LFM2-{size}.json")
            copied = copied_bytes(config, quantization)
            whole = checkpoint_bytes(config, torch.bfloat16)
            assert cell == f"{copied / 1e6:,.0f} MB, {100 * copied / whole:.0f} %"


def test_in_eight_bits(theirs) -> None:
    ours = lfm2_fast.from_transformers(theirs, quantization="int8")
    assert ours.config.quantization == "int8"
    with torch.no_grad():
        expected = theirs(IDS).logits
    error = (ours(IDS).logits - expected).norm() / expected.norm()
    assert 0 < error < 0.2


def test_another_model_in_memory_is_named(theirs) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 9}
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        lfm2_fast.from_transformers(LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=2)))
    with pytest.raises(ValueError, match="quantization='int9' is not supported; use 'int8'"):
        lfm2_fast.from_transformers(theirs, quantization="int9")
    theirs.hf_quantizer = object()
    with pytest.raises(ValueError, match="is quantized: load it without quantization_config"):
        lfm2_fast.from_transformers(theirs)
    theirs.hf_quantizer = None
    theirs.model.layers[0].lora_A = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="merge_and_unload"):
        lfm2_fast.from_transformers(theirs)


def test_auto_classes_give_ours_and_theirs_again(tiny: Path, registered, tmp_path) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert type(model) is lfm2_fast.Lfm2ForCausalLM
    assert type(AutoModel.from_pretrained(tiny)) is lfm2_fast.Lfm2Model
    config = AutoConfig.from_pretrained(tiny)
    assert type(AutoModelForCausalLM.from_config(config)) is lfm2_fast.Lfm2ForCausalLM
    eight = AutoModelForCausalLM.from_pretrained(tiny, quantization_config={"load_in_8bit": True})
    eight.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.quantization == "int8" and torch.equal(again(IDS).logits, eight(IDS).logits)
    lfm2_fast.register()
    lfm2_fast.unregister()
    lfm2_fast.unregister()
    again = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert type(again).__module__.startswith("transformers.")
    with torch.no_grad():
        assert same(model(IDS % 300).logits, again(IDS % 300).logits)


def test_tokens_are_added(tiny: Path) -> None:
    from transformers import Lfm2ForCausalLM as Theirs

    ours = lfm2_fast.load(tiny, device="cpu", dtype="float32")
    before = ours(IDS % 300).logits
    size = ours.config.vocab_size
    embedding = ours.resize_token_embeddings(size + 3, pad_to_multiple_of=64)
    assert embedding.weight.shape[0] == ours.config.vocab_size == -(-(size + 3) // 64) * 64
    after = ours(IDS % 300).logits
    assert torch.equal(after[..., :size], before)
    theirs = Theirs.from_pretrained(tiny, dtype=torch.float32)
    theirs.resize_token_embeddings(size + 3, pad_to_multiple_of=64)
    assert theirs.config.vocab_size == ours.config.vocab_size
    assert ours.generate(IDS % 300, max_new_tokens=2).shape == (2, 11)
