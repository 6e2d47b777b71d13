"""Facts of ``info`` about a checkpoint, compared with the loaded model; their output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lfm2_fast
from lfm2_fast.cli import environment


@pytest.mark.parametrize("kind", ["conv", "full_attention"])
def test_models_with_one_kind_of_layer_are_described(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    raw = json.loads((tiny / "config.json").read_text())
    changed = {**raw, "layer_types": [kind] * raw["num_hidden_layers"]}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    environment.show(environment.checkpoint_facts(str(tmp_path)))
    name = "cache_bytes_per_token" if kind == "conv" else "conv_bytes_per_sequence"
    assert f"model.{name}: 0 bytes\n" in capsys.readouterr().out


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("changed", [{}, {"tie_word_embeddings": False, "conv_bias": True}])
def test_weight_bytes_are_those_that_loading_takes(
    random_checkpoint, tmp_path: Path, changed: dict, quantization: str | None
) -> None:
    folder = random_checkpoint(**changed)
    model = lfm2_fast.load(folder, device="cpu", dtype="bfloat16", quantization=quantization)
    model.save_pretrained(tmp_path)
    told = environment.checkpoint_facts(str(tmp_path))["model"]
    held = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert told["weight_bytes"] == sum(held.values())
    assert (told["dtype"], told["quantization"]) == ("bfloat16", quantization)
    stored = next(tmp_path.glob("*.safetensors")).stat().st_size
    assert 0 < stored - told["weight_bytes"] < 20_000, "but for the file's header"


def test_the_context_is_what_rope_scaling_makes_of_it(tiny: Path, tmp_path: Path) -> None:
    raw = json.loads((tiny / "config.json").read_text())
    changed = {**raw, "rope_scaling": {"type": "dynamic", "factor": 3.0}}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    facts = environment.checkpoint_facts(str(tmp_path))["model"]
    assert facts["context"] == 3 * raw["max_position_embeddings"]


def test_operations_are_listed_and_nothing_else() -> None:
    """Fused operations are missing from a backend that composes them from the others."""
    listed = environment.machine_facts("cpu", "eager")["operations"]
    small = {"rope", "linear", "embed", "rms_norm", "swiglu", "gated_conv", "qk_norm_rope"}
    assert listed.keys() == small | {
        "attention", "add_low_rank", "keep_streams", "advance", "sample",
    }  # fmt: skip
    assert set(listed.values()) == {"eager"}


def test_without_a_dtype_no_bytes_are_shown(tiny: Path, tmp_path: Path) -> None:
    raw = json.loads((tiny / "config.json").read_text())
    told = {key: value for key, value in raw.items() if key not in ("dtype", "torch_dtype")}
    (tmp_path / "config.json").write_text(json.dumps(told))
    facts = environment.checkpoint_facts(str(tmp_path))["model"]
    assert facts["dtype"] is None and "weight_bytes" not in facts
    assert environment.readable("dtype", facts["dtype"]) == "-"


@pytest.mark.parametrize(
    ("value", "said"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (2.5e9, "2.5 GB")]
)
def test_bytes_have_units(value: float, said: str) -> None:
    assert environment.readable("bytes", value) == said
