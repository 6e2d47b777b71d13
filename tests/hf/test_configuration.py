"""Lfm2Config: every spelling, set and saved, to and from transformers' own."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch

import lfm2_fast
from lfm2_fast import Lfm2Config

DATA = Path(__file__).parents[1] / "data"
SIZES = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "full_attn_idxs": [1]}


def test_defaults_are_transformers() -> None:
    from transformers import Lfm2Config as Theirs

    ours, theirs = Lfm2Config(), Theirs()
    for name in vars(ours):
        if name not in ("name_or_path", "architectures"):
            assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("name", ["LFM2-350M", "LFM2-700M", "LFM2-1.2B", "LFM2-2.6B"])
def test_published_configs_go_to_transformers_and_back(name: str) -> None:
    from transformers import Lfm2Config as Theirs

    ours = Lfm2Config.from_pretrained(DATA / f"{name}.json")
    theirs = ours.to_transformers()
    assert isinstance(theirs, Theirs)
    assert Lfm2Config.of(theirs).to_internal() == ours.to_internal()
    read = Theirs.from_json_file(DATA / f"{name}.json")
    for field in ("hidden_size", "intermediate_size", "layer_types", "tie_word_embeddings"):
        assert getattr(theirs, field) == getattr(read, field) == getattr(ours, field)


def test_older_spellings() -> None:
    config = Lfm2Config(
        **SIZES, **HEADS, block_ff_dim=128, tie_embedding=False, torch_dtype="float16"
    )
    assert config.intermediate_size == config.block_ff_dim == 128
    assert config.tie_word_embeddings is config.tie_embedding is False
    assert config.dtype == config.torch_dtype == "float16"
    assert config.layer_types == ["conv", "full_attention"] and config.head_dim == 16
    with pytest.raises(AttributeError, match="'hidden_sice'"):
        _ = config.hidden_sice


def test_fields_can_be_set_and_are_kept(tiny: Path, tmp_path: Path) -> None:
    model = lfm2_fast.load(tiny, device="cpu")
    for name, value in (("pad_token_id", 7), ("use_cache", False), ("eos_token_id", [2, 7])):
        setattr(model.config, name, value)
    model.config.update({"my_note": "kept"})
    assert model.config.my_note == "kept" and model.config.get_text_config() is model.config
    model.save_pretrained(tmp_path)
    again = lfm2_fast.load(tmp_path, device="cpu").config
    assert (again.pad_token_id, again.use_cache, again.eos_token_id) == (7, False, [2, 7])
    copied = pickle.loads(pickle.dumps(copy.deepcopy(again)))
    assert copied == again and json.loads(again.to_json_string())["eos_token_id"] == [2, 7]
    again.save_pretrained(tmp_path / "config")
    assert Lfm2Config.from_pretrained(tmp_path / "config" / "config.json").eos_token_id == [2, 7]


YARN = {"rope_type": "yarn", "rope_theta": 3e4, "factor": 4.0}
LONG = {
    "rope_type": "longrope", "rope_theta": 3e4, "short_factor": [1.0] * 8,
    "long_factor": [2.0 + i for i in range(8)], "factor": 4.0,
    "original_max_position_embeddings": 50,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 3e4, "factor": 2.0}


@pytest.mark.parametrize(
    "given",
    [
        {"rope_parameters": DYNAMIC},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 3e4},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_theta": 3e4},
        {"rope_scaling": DYNAMIC, "rope_parameters": YARN},
        {"rope_scaling": None, "rope_parameters": DYNAMIC, "rope_theta": 5e5},
    ],
)
def test_rope_scaling_is_read_in_every_spelling(given: dict) -> None:
    from transformers import Lfm2Config as Theirs

    ours, theirs = Lfm2Config(**SIZES, **HEADS, **given), Theirs(**SIZES, **HEADS, **given)
    assert ours.rope_parameters == ours.rope_scaling == DYNAMIC and ours.rope_theta == 3e4
    assert {k: v for k, v in theirs.rope_parameters.items() if k != "type"} == DYNAMIC
    assert Lfm2Config.of(theirs).to_internal() == ours.to_internal()
    assert ours.to_transformers().rope_parameters == DYNAMIC
    assert Lfm2Config.of(ours.to_internal()).rope_parameters == DYNAMIC


def test_rope_scaling_can_be_set(tmp_path: Path) -> None:
    """The last setting counts. Without a base, the old base stays."""
    config = Lfm2Config(**SIZES, **HEADS, rope_parameters=YARN)
    config.rope_scaling = {"type": "linear", "factor": 8.0}
    linear = {"rope_type": "linear", "rope_theta": 3e4, "factor": 8.0}
    assert config.rope_parameters == linear == config.to_dict()["rope_parameters"]
    config.rope_theta = 5e4
    assert config.rope_parameters == {**linear, "rope_theta": 5e4}
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    assert config.rope_scaling == {**DYNAMIC, "rope_theta": 5e4}
    config.update({"rope_scaling": None})
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e4}
    for name in ("rope_parameters", "rope_scaling"):
        values = Lfm2Config(**SIZES, **HEADS, rope_scaling=YARN).to_dict()
        changed = Lfm2Config.from_dict(values, **{name: LONG})
        assert changed.rope_parameters == LONG
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "lfm2", **SIZES, **HEADS, "rope_scaling": YARN})
        )
        found = Lfm2Config.from_pretrained(tmp_path, **{name: {"type": "linear", "factor": 8.0}})
        assert found.rope_parameters == linear
    with pytest.raises(lfm2_fast.CheckpointError, match="factor is missing"):
        Lfm2Config(**SIZES, rope_scaling={"type": "linear"})
    with pytest.raises(lfm2_fast.CheckpointError, match="must be an object, not 'linear'"):
        Lfm2Config(**SIZES, rope_scaling="linear")


@pytest.mark.parametrize("rope", [YARN, LONG, DYNAMIC], ids=lambda rope: rope["rope_type"])
def test_scaled_models_are_saved_for_transformers_and_loaded_again(rope, tmp_path: Path) -> None:
    from transformers import Lfm2Config as TheirConfig
    from transformers import Lfm2ForCausalLM as Theirs

    config = Lfm2Config(**SIZES, **HEADS, max_position_embeddings=50, rope_parameters=rope)
    config.save_pretrained(tmp_path / "config")
    assert Lfm2Config.from_pretrained(tmp_path / "config") == config
    whole = {"original_max_position_embeddings": 50, **rope} if rope is not DYNAMIC else rope
    assert TheirConfig.from_pretrained(tmp_path / "config").rope_parameters == whole
    model = lfm2_fast.Lfm2ForCausalLM(config, backend="eager")
    model.save_pretrained(tmp_path / "model")
    theirs = Theirs.from_pretrained(tmp_path / "model").eval()
    assert theirs.config.rope_parameters == whole
    loaded = lfm2_fast.load(tmp_path / "model", device="cpu", backend="eager")
    assert loaded.config.rope_parameters == whole
    ids = torch.randint(2, 100, (1, 60), generator=torch.Generator().manual_seed(1))
    ours = model(ids).logits
    assert torch.equal(loaded(ids).logits, ours)
    with torch.no_grad():
        assert (theirs(ids).logits - ours).abs().max() < 2e-5 * ours.abs().max()


def test_every_config_makes_a_model() -> None:
    ours = Lfm2Config(**SIZES, **HEADS)
    for config in (ours, ours.to_internal(), ours.to_transformers(), ours.to_dict()):
        torch.manual_seed(0)
        model = lfm2_fast.Lfm2ForCausalLM(config, backend="eager")
        assert model(torch.tensor([[1, 2]])).logits.isfinite().all()
        lfm2_fast.Cache(model.config, 1, 8, device="cpu", dtype=model.dtype)
    with pytest.raises(TypeError, match="not int"):
        lfm2_fast.Lfm2ForCausalLM(7)
    with pytest.raises(lfm2_fast.CheckpointError, match="hidden_size"):
        Lfm2Config(hidden_size=-1)


def test_from_config_has_random_weights() -> None:
    models = [
        lfm2_fast.Lfm2ForCausalLM.from_config(Lfm2Config(**SIZES, **HEADS), dtype="bfloat16")
        for _ in range(2)
    ]
    weights = [model.network.embed_tokens.weight for model in models]
    assert models[0].dtype == torch.bfloat16 and not torch.equal(*weights)
    assert weights[0].float().std() == pytest.approx(0.02, rel=0.1)
    assert (models[0].network.embedding_norm.weight == 1).all()
