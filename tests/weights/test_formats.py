"""Matrices in 8-bit integers: what they lose, and that they come back from disk as they were."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lfm2_fast
from lfm2_fast.weights.formats import INT8

PROMPT = torch.arange(20, 60)[None]


def quantized(folder: Path, **options) -> lfm2_fast.Lfm2ForCausalLM:
    return lfm2_fast.load(folder, device="cpu", quantization="int8", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_are_the_nearest(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(300, 40) * torch.logspace(-30, 30, 300)[:, None]).to(dtype)
    weight[5] = 0
    numbers, scale = INT8.quantize(weight)
    assert numbers.dtype == torch.int8 and scale.dtype == torch.float32
    assert int(numbers.min()) == -127 and int(numbers.max()) == 127
    back = INT8.dequantize((numbers, scale), torch.float64)
    assert ((back - weight.double()).abs() <= 0.5001 * scale.double()[:, None]).all()
    assert (back[5] == 0).all() and scale[5] == 0


def test_small_numbers_keep_their_size() -> None:
    """Those of which float32 has 1/127 as a normal number; smaller ones never overflow."""
    weight = torch.tensor([1e-34, 2e-36, 2e-43, 1e-45])[:, None]
    numbers, scale = INT8.quantize(weight)
    assert numbers[:2].tolist() == [[127], [127]]
    back = numbers.double() * scale.double()[:, None]
    assert torch.allclose(back[:2], weight[:2].double(), rtol=1e-6, atol=0)
    assert ((back - weight.double()).abs() <= 0.5001 * scale.double()[:, None]).all()


def test_every_matrix_and_nothing_else(random_checkpoint) -> None:
    folder = random_checkpoint(conv_bias=True, tie_word_embeddings=False)
    state = quantized(folder).state_dict()
    plain = lfm2_fast.load(folder, device="cpu").state_dict()
    for name, tensor in plain.items():
        matrix = tensor.dim() == 2 and not name.endswith("conv.conv.weight")
        assert state[name].dtype == (torch.int8 if matrix else tensor.dtype), name
        assert (f"{name}_scale" in state) == matrix
    for kind in ("in_proj", "qkv_proj", "out_proj", "gate_up_proj", "down_proj", "embed_tokens"):
        assert any(f"{kind}.weight_scale" in name for name in state)
    assert state["network.lm_head.weight"].dtype == torch.int8


@pytest.mark.parametrize("changed", [{}, {"tie_word_embeddings": False, "conv_bias": True}])
def test_saved_is_loaded_without_being_told(random_checkpoint, tmp_path, changed) -> None:
    model = quantized(random_checkpoint(**changed), dtype="bfloat16")
    model.save_pretrained(tmp_path)
    for told in ({}, {"quantization": "int8"}):
        again = lfm2_fast.load(tmp_path, device="cpu", **told)
        assert again.network.config == replace(model.network.config, dtype="bfloat16")
        assert again.dtype == torch.bfloat16
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    assert again.config.quantization == "int8"


def test_other_programs_do_not_take_integers_for_weights(tiny, tmp_path) -> None:
    from transformers import Lfm2ForCausalLM

    quantized(tiny).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"no file named .*model\.safetensors"):
        Lfm2ForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"quant_method": "lfm2_fast", "format": "int3"},
            "format .int3., which lfm2_fast does not read",
        ),
        ("int8", "must be an object"),
        (None, r"holds neither model\.safetensors"),
    ],
)
def test_a_config_that_says_otherwise(tiny, tmp_path, change, message) -> None:
    quantized(tiny).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = change
    path.write_text(json.dumps(config))
    with pytest.raises(lfm2_fast.CheckpointError, match=message):
        lfm2_fast.load(tmp_path, device="cpu")


def test_an_unknown_quantization_is_named(tiny) -> None:
    with pytest.raises(ValueError, match="quantization='int4'.*use 'int8'"):
        lfm2_fast.load(tiny, device="cpu", quantization="int4")


def test_the_model_moves_and_keeps_its_scales(tiny) -> None:
    model = quantized(tiny, dtype="bfloat16")
    scale = model.network.lm_head.weight_scale.clone()
    model.to(torch.float32)
    assert model.dtype == torch.float32
    assert model.network.embed_tokens.weight.dtype == torch.int8
    assert torch.equal(model.network.embed_tokens.weight_scale, scale)
    assert model.network.lm_head.weight_scale is model.network.embed_tokens.weight_scale
    assert model(PROMPT).logits.dtype == torch.float32


@pytest.mark.slow
def test_weights_take_half_of_bfloat16(true_350m) -> None:
    def size(model: lfm2_fast.Lfm2ForCausalLM) -> int:
        kept = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
        return sum(kept.values())

    plain = size(lfm2_fast.load(true_350m, device="cpu", dtype="bfloat16"))
    assert size(quantized(true_350m, dtype="bfloat16")) < 0.505 * plain


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_bodies_keep_close_to_the_widened_matrix(random_checkpoint, backend) -> None:
    """Prefill and steps, whichever product serves them, against float64 of the same numbers."""
    folder = random_checkpoint()
    exact = quantized(folder, dtype="float64", backend="eager")
    model = quantized(folder, dtype="float32", backend=backend)
    wanted = exact(PROMPT).logits
    cache = model.new_cache(1)
    first = model(PROMPT[:, :36], past_key_values=cache).logits
    rest = [model(PROMPT[:, i : i + 1], past_key_values=cache).logits for i in range(36, 40)]
    found = torch.cat([first, *rest], 1).double()
    error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    # Rounding the tokens of each of a layer's four products to 8 bits costs about a percent each.
    assert error.max() < (1e-4 if model.ops.name == "eager" else 0.12), error.max()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_copied_model_runs_as_the_model(tiny, copied, quantization) -> None:
    """A format is chosen by identity, which a copy must keep."""
    model = lfm2_fast.load(tiny, device="cpu", quantization=quantization)
    for ids in (PROMPT, PROMPT[:, :1]):
        assert torch.equal(copied(model)(ids).logits, model(ids).logits)
