"""Models of transformers in memory, and its Auto classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast

IDS = torch.randint(8, 307, (2, 9), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def theirs(random_checkpoint) -> Any:
    from transformers import Lfm2ForCausalLM

    folder = random_checkpoint(conv_bias=True)
    return Lfm2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() < 2e-5 * theirs.abs().max())


@torch.no_grad()
def test_a_model_in_memory_as_it_is_now(theirs) -> None:
    """Weights edited, a vocabulary resized, a head untied: what is on no disk."""
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
    ours.network.rope_frequencies.kind, ours.network.rope_frequencies.scale = "default", 1.0
    assert not same(ours(IDS).logits, theirs(IDS).logits)


def test_memory_is_shared_but_for_fused_tensors(theirs) -> None:
    """The most that is held besides theirs is what is fused."""
    ours = lfm2_fast.from_transformers(theirs)
    held = {p.data_ptr() for p in theirs.parameters()}
    copied = {
        name for name, tensor in ours.network.state_dict().items() if tensor.data_ptr() not in held
    }
    assert copied and all("qkv_proj" in name or "gate_up_proj" in name for name in copied)


def test_in_eight_bits(theirs) -> None:
    ours = lfm2_fast.from_transformers(theirs, quantization="int8")
    assert ours.config.quantization == "int8"
    with torch.no_grad():
        expected = theirs(IDS).logits
    error = (ours(IDS).logits - expected).norm() / expected.norm()
    assert 0 < error < 0.2


def test_what_is_no_lfm2_in_memory_is_named(theirs) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 9}
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        lfm2_fast.from_transformers(LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=2)))
    theirs.model.layers[0].lora_A = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="merge_and_unload"):
        lfm2_fast.from_transformers(theirs)


@pytest.fixture
def registered() -> Iterator[None]:
    lfm2_fast.register()
    yield
    lfm2_fast.unregister()


def test_auto_classes_give_ours_and_theirs_again(tiny: Path, registered) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert type(model) is lfm2_fast.Lfm2ForCausalLM
    assert type(AutoModel.from_pretrained(tiny)) is lfm2_fast.Lfm2Model
    config = AutoConfig.from_pretrained(tiny)
    assert type(AutoModelForCausalLM.from_config(config)) is lfm2_fast.Lfm2ForCausalLM
    lfm2_fast.register()
    lfm2_fast.unregister()
    lfm2_fast.unregister()
    again = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert type(again).__module__.startswith("transformers.")
    with torch.no_grad():
        assert same(model(IDS % 300).logits, again(IDS % 300).logits)


def test_the_pipeline_loads_ours(tiny: Path, registered) -> None:
    from transformers import pipeline

    made = pipeline("text-generation", model=str(tiny), dtype=torch.float32)
    assert type(made.model) is lfm2_fast.Lfm2ForCausalLM
    (answer,) = made("The database server", max_new_tokens=5, do_sample=False)
    lfm2_fast.unregister()
    plain = pipeline("text-generation", model=str(tiny), dtype=torch.float32)
    assert [answer] == plain("The database server", max_new_tokens=5, do_sample=False)


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
