"""Every published spelling of config.json, and errors that name the file and the value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lfm2_fast import CheckpointError, Config
from lfm2_fast.config import ORIGINAL, SHARE
from lfm2_fast.weights.fusion import fusion_table, num_parameters

DATA = Path(__file__).parent / "data"

# Parameter counts as the model cards give them.
PUBLISHED = {
    "LFM2-350M": (354_483_968, 4608, (2, 5, 8, 10, 12, 14)),
    "LFM2-700M": (742_489_344, 6912, (2, 5, 8, 10, 12, 14)),
    "LFM2-1.2B": (1_170_340_608, 8192, (2, 5, 8, 10, 12, 14)),
    "LFM2-2.6B": (2_569_272_320, 10752, (2, 5, 9, 13, 17, 21, 24, 27)),
}

YARN = {"rope_type": "yarn", "factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.5] * 32}


def published(name: str = "LFM2-350M", **changed: Any) -> dict[str, Any]:
    """A published config with values changed; None takes a key away."""
    raw = {**json.loads((DATA / f"{name}.json").read_text()), **changed}
    return {key: value for key, value in raw.items() if value is not None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_come_out_exactly(name: str) -> None:
    parameters, inner, attention = PUBLISHED[name]
    config = Config.from_file(DATA / f"{name}.json")
    assert num_parameters(config) == parameters
    assert config.intermediate_size == inner
    layers = enumerate(config.layer_types)
    assert tuple(i for i, kind in layers if kind == "full_attention") == attention
    assert config.head_dim == 64 and config.eos_token_id == 7 and config.dtype == "bfloat16"
    parts = [part for fused in fusion_table(config).values() for part in fused.parts]
    assert sum(torch.Size(part.shape).numel() for part in parts) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_hugging_face_builds_the_same_model(name: str) -> None:
    """Names and shapes of every tensor, from the published config and from ours saved again."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Config.from_file(DATA / f"{name}.json")
    for raw in (published(name), config.to_dict()):
        with torch.device("meta"):
            theirs = Lfm2ForCausalLM(Lfm2Config(**raw))
        shapes = {key: tuple(p.shape) for key, p in theirs.named_parameters()}
        table = fusion_table(config).values()
        assert shapes == {p.name: p.shape for fused in table for p in fused.parts}
        assert theirs.model.rotary_emb.config.rope_parameters["rope_theta"] == config.rope_theta
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changed", "field", "expected"),
    [
        ({"full_attn_idxs": [0]}, "layer_types", ("full_attention", *["conv"] * 15)),
        ({"full_attn_idxs": None}, "layer_types", ("full_attention",) * 16),
        ({"layer_types": ["conv"] * 16}, "layer_types", ("conv",) * 16),
        ({"rope_theta": 5e5}, "rope_theta", 5e5),
        ({"rope_theta": None}, "rope_theta", 1e6),
        ({"rope_parameters": {"rope_theta": 3e4, "rope_type": "default"}}, "rope_theta", 3e4),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7e4}, "rope_theta", 7e4),
        ({"block_ff_dim": None, "intermediate_size": 6656}, "intermediate_size", 4608),
        ({"intermediate_size": 999}, "intermediate_size", 4608),
        ({"block_auto_adjust_ff_dim": False}, "intermediate_size", 6656),
        ({"block_ffn_dim_multiplier": 1.5}, "intermediate_size", 6656),
        ({"block_multiple_of": 100}, "intermediate_size", 4500),
        ({"tie_embedding": False}, "tie_word_embeddings", False),
        ({"tie_embedding": False, "tie_word_embeddings": True}, "tie_word_embeddings", False),
        ({"tie_word_embeddings": False}, "tie_word_embeddings", False),
        ({"conv_L_cache": 7}, "conv_L_cache", 7),
        ({"conv_bias": True}, "conv_bias", True),
        ({"vocab_size": 128_000}, "vocab_size", 128_000),
        ({"eos_token_id": [7, 2]}, "eos_token_id", (7, 2)),
        ({"head_dim": 32}, "head_dim", 32),
        ({"torch_dtype": None, "dtype": "float16"}, "dtype", "float16"),
    ],
)  # fmt: skip
def test_spellings(changed: dict[str, Any], field: str, expected: Any) -> None:
    config = Config.from_dict(published(**changed))
    assert getattr(config, field) == expected
    if field == "dtype":
        return
    from transformers import Lfm2Config, Lfm2ForCausalLM

    with torch.device("meta"):
        theirs = Lfm2ForCausalLM(Lfm2Config(**published(**changed)))
    assert theirs.num_parameters() == num_parameters(config)
    shapes = {p.name: p.shape for fused in fusion_table(config).values() for p in fused.parts}
    assert {key: tuple(p.shape) for key, p in theirs.named_parameters()} == shapes


@pytest.mark.parametrize(
    "changed",
    [
        {"architectures": None},
        {"architectures": ["Lfm2Model"]},
        {"architectures": ["LFM2ForCausalLM"]},
        {"auto_map": {"AutoConfig": "code.Other", "AutoModelForCausalLM": "code.Lfm2ForCausalLM"}},
    ],
)
def test_classes_of_the_same_weights_are_taken(changed: dict[str, Any]) -> None:
    assert Config.from_dict(published(**changed)) == Config.from_dict(published())


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}


@pytest.mark.parametrize(
    "changed",
    [
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": {"rope_type": "dynamic", "type": "linear", "factor": 2.5}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "rope_theta": 3e4}},
        {"rope_parameters": YARN},
        {"rope_parameters": {**YARN, ORIGINAL: 4096, "attention_factor": 1.2, "truncate": False}},
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 40}},
        {"rope_parameters": {**YARN, SHARE: 1.0}, ORIGINAL: 512},
        {"rope_parameters": {**LONG, ORIGINAL: 4096}},
        {"rope_parameters": {**LONG, "factor": 3.0, "rope_theta": 3e4}},
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, **LLAMA3}},
        {"rope_parameters": {"rope_type": "proportional"}, SHARE: 0.25},
        {"rope_parameters": YARN, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {**YARN, "rope_theta": 3e4}, "rope_scaling": {}},
        {"rope_parameters": {**YARN, "rope_theta": 3e4}, "rope_scaling": None},
    ],
)
def test_scaling_is_read_as_hugging_face_reads_it(changed: dict[str, Any]) -> None:
    """Scaling is in either spelling, or in both, and then the older one counts. Transformers reads
    the saved config.
    """
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2RotaryEmbedding

    raw = published(**changed)
    config = Config.from_dict(raw)
    # The class looks at what a config.json may have outside of rope_parameters.
    theirs = Lfm2RotaryEmbedding(Lfm2Config(**raw)).config.rope_parameters
    assert config.rope_parameters == {
        k: v for k, v in theirs.items() if k not in ("type", SHARE)
    } | ({SHARE: 0.25} if SHARE in changed else {})
    assert hash(config) == hash(Config.from_dict(raw))
    saved = config.to_dict()
    assert Config.from_dict(saved) == config
    again = Lfm2RotaryEmbedding(Lfm2Config(**saved)).config.rope_parameters
    assert again == config.rope_parameters
    older = {**saved, "rope_parameters": None}
    assert Config.from_dict(older) == config


def test_a_null_is_read_as_hugging_face_reads_it() -> None:
    """A null factor of yarn is the ratio of the contexts, and a null truncate is false."""
    rope = {"rope_type": "yarn", "factor": None, ORIGINAL: 1000, "truncate": None, "mscale": None}
    config = Config.from_dict(published(rope_parameters=rope))
    wanted = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 128.0, ORIGINAL: 1000}
    assert config.rope_parameters == {**wanted, "truncate": False}


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({}, 128_000),
        ({"rope_type": "linear", "factor": 2.5}, 320_000),
        ({"rope_type": "dynamic", "factor": 0.5}, 128_000),
        ({**YARN, ORIGINAL: 32_000}, 128_000),
        ({**YARN, ORIGINAL: 64_000}, 256_000),
        ({**LONG, ORIGINAL: 4096}, 128_000),
    ],
)
def test_scaling_stretches_the_context(rope: dict[str, Any], length: int) -> None:
    config = Config.from_dict(published(rope_parameters=rope))
    assert (config.context_length, config.max_position_embeddings) == (length, 128_000)


def test_a_null_multiplier_skips_the_rounding() -> None:
    raw = {**published(), "block_ffn_dim_multiplier": None, "block_ff_dim": 6655}
    assert Config.from_dict(raw).intermediate_size == int(2 * 6655 / 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "llama"}, "not an LFM2 checkpoint, its config has model_type 'llama'"),
        ({"model_type": None}, "not an LFM2 checkpoint, its config has no model_type"),
        ({"model_type": "lfm2_moe"}, "LFM2-MoE checkpoint, which lfm2_fast does not support yet"),
        ({"model_type": "lfm2_vl"}, "LFM2-VL checkpoint, which lfm2_fast does not support yet"),
        ({"architectures": ["Lfm2BidirectionalModel"]}, "a checkpoint of Lfm2BidirectionalModel"),
        ({"architectures": ["Lfm2ForSequenceClassification"]}, "which computes something else"),
        ({"auto_map": {"AutoModel": "code.Lfm2Encoder"}}, "a checkpoint of code.Lfm2Encoder"),
        ({"architectures": "Lfm2ForCausalLM"}, "architectures must be a list"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantized \(fp8\)"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": -3}, "vocab_size must be a positive whole number, not -3"),
        ({"num_hidden_layers": "16"}, "num_hidden_layers must be a positive whole number"),
        ({"conv_bias": 1}, "conv_bias must be true or false, not 1"),
        ({"norm_eps": "tiny"}, "norm_eps must be a positive number"),
        ({"hidden_size": 1000}, "hidden_size=1000 is not a multiple of 16 heads"),
        ({"num_key_value_heads": 5}, "num_attention_heads=16 is not a multiple"),
        ({"head_dim": 63}, "head_dim=63 is odd"),
        ({"full_attn_idxs": [2, 16]}, "full_attn_idxs names layer 16 of 16 layers"),
        ({"full_attn_idxs": 2}, "full_attn_idxs must be a list, not 2"),
        ({"layer_types": 5}, "layer_types must be a list, not 5"),
        ({"model_type": ["lfm2"]}, r"its config has model_type \['lfm2'\]"),
        ({"block_ffn_dim_multiplier": float("inf")}, "must be a positive number, not inf"),
        ({"layer_types": ["conv"]}, "layer_types names 1 layers, num_hidden_layers is 16"),
        ({"layer_types": ["conv"] * 15 + ["mamba"]}, r"layer_types\[15\] is 'mamba'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: factor is missing"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor must be a positive number"),
        ({"rope_scaling": {"type": "mrope"}}, "'mrope' is not supported; .* knows default, linear"),
        ({"rope_scaling": {"type": ["linear"]}}, r"rope_type \['linear'\] is not supported"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_parameters": {**YARN, "truncate": 1}}, "truncate must be true or false, not 1"),
        ({"rope_parameters": {**YARN, ORIGINAL: 2.5}}, f"{ORIGINAL} must be a positive whole"),
        ({"rope_parameters": {**LONG, "long_factor": None}}, "long_factor is missing"),
        ({"rope_parameters": {**LONG, "long_factor": [1.0] * 31}}, "long_factor must be 32 pos"),
        ({"rope_parameters": {**LONG, "short_factor": [0] * 32}}, "short_factor must be 32 pos"),
        ({"rope_parameters": {**LONG, "short_factor": 2}}, "short_factor must be a list, not 2"),
        ({"rope_parameters": {**YARN, SHARE: 0.5}}, f"{SHARE}=0.5 is not supported with .*'yarn'"),
        ({"rope_parameters": {**YARN, "rope_theta": -1}}, "rope_theta must be a positive number"),
        ({"rope_parameters": {"rope_type": "proportional", SHARE: 1.5}}, f"{SHARE}=1.5 is not"),
        ({"rope_parameters": {"full_attention": YARN}}, "give one object with a rope_type"),
        ({"rope_parameters": "default"}, "rope_parameters must be an object"),
        ({"eos_token_id": "7"}, "eos_token_id must be a token id, not '7'"),
        ({"torch_dtype": "int9"}, "torch_dtype 'int9'"),
    ],
)
def test_bad_configs_are_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published(**changed)))
    with pytest.raises(CheckpointError, match=message) as caught:
        Config.from_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("{", "is not valid JSON"), ("[]", "must hold a JSON object")],
)
def test_broken_files_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Config.from_file(path)
    assert str(path) in str(caught.value)
