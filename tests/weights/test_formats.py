"""Matrices in 8 and 4 bits: what they lose, and that they come back from disk as they were."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lfm2_fast
from lfm2_fast.weights.formats import DENSE, INT4, INT8, Projection
from lfm2_fast.weights.fusion import EMBEDDING, HEAD, interleave, widen_for

PROMPT = torch.arange(20, 60)[None]


# Sizes of which groups can be made.
EVEN = {"hidden_size": 96, "intermediate_size": 160}


def quantized(folder: Path, **options) -> lfm2_fast.Lfm2ForCausalLM:
    return lfm2_fast.load(folder, device="cpu", **{"quantization": "int8", **options})


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
    """Numbers keep their size if their 127th part is normal in float32. Smaller ones never
    overflow.
    """
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


def test_int4_is_the_bodys(random_checkpoint) -> None:
    """Embedding and head are int8, and so are matrices whose rows are not whole groups."""
    folder = random_checkpoint(**EVEN, conv_bias=True, tie_word_embeddings=False)
    kinds = {
        name: part.format
        for name, part in quantized(folder, quantization="int4").network.named_modules()
        if isinstance(part, Projection)
    }
    assert kinds.pop("embed_tokens") is kinds.pop("lm_head") is INT8
    assert len(kinds) == 2 * 4 + 3 * 4 and all(kind is INT4 for kind in kinds.values())
    odd = quantized(random_checkpoint(), quantization="int4").network.layers[0].feed_forward
    assert odd.gate_up_proj.format is INT4 and odd.down_proj.format is INT8


def test_int4_numbers_are_the_nearest() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 96) * torch.logspace(-4, 3, 40)[:, None]
    weight[5, 32:64] = 0
    numbers, scale = parts = INT4.quantize(weight)
    assert numbers.shape == (40, 48) and scale.shape == (40, 3) and scale.dtype == torch.float16
    back = INT4.dequantize(parts, torch.float64)
    steps = scale.double().abs().repeat_interleave(32, 1)
    # The largest is met; what has its other sign may be a step away, 8 having no number.
    error = (back - weight.double()).abs()
    assert (error <= steps * 1.01).all() and (error <= steps * 0.51).double().mean() > 0.97
    assert (back[5, 32:64] == 0).all()


def test_int4_of_what_float16_cannot_scale() -> None:
    weight = torch.tensor([1e30, -3e38, float("nan"), 1e-30])[:, None].repeat(1, 32)
    back = INT4.dequantize(INT4.quantize(weight), torch.float32)
    assert back[:2].isfinite().all() and (back[0] > 5e5).all() and (back[1] < -5e5).all()
    assert back[2].isnan().all() and (back[3] == 0).all()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("changed", [EVEN, {"tie_word_embeddings": False, "conv_bias": True}])
def test_saved_is_loaded_without_being_told(
    random_checkpoint, tmp_path, changed, quantization
) -> None:
    model = quantized(random_checkpoint(**changed), dtype="bfloat16", quantization=quantization)
    model.save_pretrained(tmp_path)
    assert (tmp_path / f"model.{quantization}.safetensors").is_file()
    for told in ({}, {"quantization": quantization}):
        again = lfm2_fast.load(tmp_path, device="cpu", **told)
        assert again.network.config == replace(model.network.config, dtype="bfloat16")
        assert again.dtype == torch.bfloat16
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    assert again.config.quantization == quantization


def test_mixed_formats_are_saved_and_loaded(random_checkpoint, tmp_path) -> None:
    """Each matrix in a format of its own, as a GGUF file may have them."""
    dense = lfm2_fast.load(random_checkpoint(**EVEN), device="cpu", dtype="float32")
    config, weights = dense.network.config, dict(dense.network.state_dict())
    weights.pop(HEAD)
    named = {EMBEDDING: INT8, "layers.1.self_attn.qkv_proj.weight": INT4}
    mixed = replace(
        config, quantization="mixed", formats=tuple((n, f.name) for n, f in named.items())
    )
    for name, format in named.items():
        parts = format.quantize(weights[name])
        weights |= {name + s: part for s, part in zip(format.suffixes, parts, strict=True)}
    interleave(mixed, weights)
    model = lfm2_fast.Lfm2ForCausalLM(mixed, weights)
    assert model.network.layers[1].self_attn.qkv_proj.format is INT4
    assert model.network.layers[0].conv.in_proj.format is DENSE
    model.save_pretrained(tmp_path)
    again = lfm2_fast.load(tmp_path, device="cpu")
    assert again.network.config.formats == mixed.formats
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)


def test_a_gpu_gets_formats_that_it_has_code_for(random_checkpoint, caplog, monkeypatch) -> None:
    """Matrices of other formats become dense, with the same values, and a note says so."""
    model = quantized(random_checkpoint(**EVEN), quantization="int4", backend="eager")
    config, weights = model.network.config, dict(model.network.state_dict())
    weights = {name: part for name, part in weights.items() if not name.startswith("lm_head")}
    narrow = dict(weights)
    assert widen_for(torch.device("cpu"), config, weights) is config
    assert widen_for(torch.device("meta"), config, weights) is config
    assert weights.keys() == narrow.keys()
    assert not caplog.text
    monkeypatch.setattr(INT4, "on_gpu", False)
    wide = widen_for(torch.device("meta"), config, weights)
    assert "no code for int4 yet: 20 matrices are held in torch.float32" in caplog.text
    assert dict(wide.formats) == {HEAD: "int8", EMBEDDING: "int8"}
    other = lfm2_fast.Lfm2ForCausalLM(wide, weights, backend="eager")
    assert other.network.layers[0].conv.in_proj.format is DENSE
    assert torch.equal(other(PROMPT).logits, model(PROMPT).logits)


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
    for name in ("int3", "q4_k"):
        with pytest.raises(ValueError, match=f"quantization='{name}'.*use 'int8', 'int4' or None"):
            lfm2_fast.load(tiny, device="cpu", quantization=name)


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
def test_weights_take_half_of_bfloat16(random_checkpoint) -> None:
    """The 350M's widths, and its embedding's share of the weights, with a quarter of both."""
    wide = {"hidden_size": 1024, "intermediate_size": 4608, "num_attention_heads": 16}
    layers = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    folder = random_checkpoint(**wide, **layers, num_key_value_heads=8, vocab_size=16384)

    def size(model: lfm2_fast.Lfm2ForCausalLM) -> int:
        kept = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
        return sum(kept.values())

    plain = size(lfm2_fast.load(folder, device="cpu", dtype="bfloat16"))
    assert size(quantized(folder, dtype="bfloat16")) < 0.505 * plain
    assert size(quantized(folder, dtype="bfloat16", quantization="int4")) < 0.35 * plain


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_bodies_keep_close_to_the_widened_matrix(random_checkpoint, backend, quantization) -> None:
    """Prefill and steps, with any product, against float64 of the same numbers."""
    folder = random_checkpoint(**(EVEN if quantization == "int4" else {}))
    exact = quantized(folder, dtype="float64", backend="eager", quantization=quantization)
    model = quantized(folder, dtype="float32", backend=backend, quantization=quantization)
    wanted = exact(PROMPT).logits
    cache = model.new_cache(1)
    first = model(PROMPT[:, :36], past_key_values=cache).logits
    rest = [model(PROMPT[:, i : i + 1], past_key_values=cache).logits for i in range(36, 40)]
    found = torch.cat([first, *rest], 1).double()
    error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    # Rounding the tokens of each of a layer's four products to 8 bits costs about a percent each.
    assert error.max() < (1e-4 if model.ops.name == "eager" else 0.12), error.max()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_a_copied_model_runs_as_the_model(tiny, copied, quantization) -> None:
    """A format is chosen by identity, which a copy must keep."""
    model = lfm2_fast.load(tiny, device="cpu", quantization=quantization)
    for ids in (PROMPT, PROMPT[:, :1]):
        assert torch.equal(copied(model)(ids).logits, model(ids).logits)
