"""Arguments that model cards and frameworks pass: taken, or refused by name with what to use."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast import Lfm2ForCausalLM
from lfm2_fast.hf.load_args import ACCEPTED, REFUSED


@pytest.mark.parametrize("name", ACCEPTED)
def test_arguments_that_change_nothing_are_accepted_and_noted(
    tiny: Path, name: str, caplog
) -> None:
    with caplog.at_level(logging.INFO, "lfm2_fast"):
        lfm2_fast.load(tiny, device="cpu", **{name: "something"})
    assert f"{name}='something' has no effect: {ACCEPTED[name]}" in caplog.text


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_would_change_a_result_are_refused_with_advice(name: str) -> None:
    """Before anything is looked for: this folder does not exist."""
    with pytest.raises(ValueError, match=f"{name}='something' is not supported.*: "):
        lfm2_fast.load("no/such", device="cpu", **{name: "something"})


@pytest.mark.parametrize("name", REFUSED)
def test_their_neutral_values_are_taken(tiny: Path, name: str) -> None:
    for value in (None, *REFUSED[name][0]):
        lfm2_fast.load(tiny, device="cpu", **{name: value})


EIGHT = [
    {"load_in_8bit": True},
    {"quantization_config": {"load_in_8bit": True}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    {"quantization_config": SimpleNamespace(to_dict=lambda: {"load_in_8bit": True})},
    {"quantization_config": {"quant_method": "lfm2_fast", "format": "int8"}},
]


@pytest.mark.parametrize("given", EIGHT, ids=range(len(EIGHT)))
def test_eight_bits_are_int8(tiny: Path, given: dict[str, Any]) -> None:
    model = lfm2_fast.load(tiny, device="cpu", **given)
    assert model.config.quantization == model.network.config.quantization == "int8"


@pytest.mark.parametrize("given", EIGHT[:4], ids=range(4))
def test_four_bits_are_int4(tiny: Path, given: dict[str, Any]) -> None:
    def four(values: dict[str, Any]) -> dict[str, Any]:
        return {name.replace("8bit", "4bit"): value for name, value in values.items()}

    asked = four(given)
    if isinstance(config := asked.get("quantization_config"), dict):
        asked["quantization_config"] = four(config)
    elif config is not None:
        asked["quantization_config"] = SimpleNamespace(to_dict=lambda: {"load_in_4bit": True})
    model = lfm2_fast.load(tiny, device="cpu", **asked)
    assert model.config.quantization == model.network.config.quantization == "int4"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"load_in_4bit": True, "quantization": "int8"}, "asks for 'int4', differ"),
        ({"quantization_config": {"quant_method": "gptq"}}, "method 'gptq' is not supported"),
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, "names parts of the model"),
        ({"device_map": "cpu", "device": "cpu"}, "give device or device_map"),
    ],
)
def test_other_quantization_and_devices_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lfm2_fast.load("no/such", **given)


def test_from_pretrained_is_load_as_hugging_face_spells_it(tiny: Path) -> None:
    model = Lfm2ForCausalLM.from_pretrained(
        str(tiny),
        dtype=torch.float32,
        device_map="auto",
        trust_remote_code=True,
        attn_implementation="flash_attention_2",
        low_cpu_mem_usage=True,
        use_cache=False,
        pad_token_id=5,
    )
    assert model.dtype == torch.float32 and model.hf_device_map == {"": model.device}
    assert model.config.use_cache is False and model.config.pad_token_id == 5
    plain = Lfm2ForCausalLM.from_pretrained(tiny)
    assert plain.device.type == "cpu" and not hasattr(plain, "hf_device_map")
    with pytest.raises(TypeError, match="'use_cash'"):
        Lfm2ForCausalLM.from_pretrained(tiny, use_cash=False)


def test_a_config_replaces_the_checkpoints(tiny: Path) -> None:
    config = lfm2_fast.Lfm2Config.from_pretrained(tiny)
    config.norm_eps = 0.5
    changed = lfm2_fast.load(tiny, device="cpu", config=config)
    plain = lfm2_fast.load(tiny, device="cpu")
    ids = torch.tensor([[1, 40, 41]])
    assert changed.network.config.norm_eps == 0.5
    assert not torch.equal(changed(ids).logits, plain(ids).logits)


def test_a_subfolder_and_a_variant(tiny: Path, tmp_path: Path) -> None:
    model = lfm2_fast.load(tiny, device="cpu")
    model.save_pretrained(tmp_path / "inner", variant="fp8")
    assert (tmp_path / "inner" / "model.fp8.safetensors").is_file()
    again = lfm2_fast.load(tmp_path, device="cpu", subfolder="inner", variant="fp8")
    ids = torch.tensor([[1, 40, 41]])
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(lfm2_fast.CheckpointError, match=r"neither model\.safetensors"):
        lfm2_fast.load(tmp_path / "inner", device="cpu")
    with pytest.raises(lfm2_fast.CheckpointError, match="subfolder='other'"):
        lfm2_fast.load(tmp_path, device="cpu", subfolder="other")


def test_shards_are_written_and_an_earlier_whole_file_goes(tiny: Path, tmp_path: Path) -> None:
    from transformers import Lfm2ForCausalLM as Theirs

    model = lfm2_fast.load(tiny, device="cpu")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="2MB", safe_serialization=True)
    assert not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    ids = torch.tensor([[1, 40, 41]])
    expected = Theirs.from_pretrained(tmp_path)(ids).logits
    assert (lfm2_fast.load(tmp_path, device="cpu")(ids).logits - expected).abs().max() < 0.2
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_given_weights_are_saved_in_place_of_the_models(tiny: Path, tmp_path: Path) -> None:
    model = lfm2_fast.load(tiny, device="cpu")
    zeros = {"model.embedding_norm.weight": torch.zeros_like(model.network.embedding_norm.weight)}
    model.save_pretrained(tmp_path, state_dict=zeros)
    assert not lfm2_fast.load(tmp_path, device="cpu").network.embedding_norm.weight.any()
    for given, message in (
        ({"state_dict": {"layers": torch.zeros(1)}}, "state_dict has 'layers'"),
        ({"safe_serialization": False}, "safe_serialization"),
        ({"push_to_hub": True}, "push_to_hub"),
        ({"distributed_checkpoint": True}, "distributed_checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path, **given)
    with pytest.raises(TypeError, match="'sharding'"):
        model.save_pretrained(tmp_path, sharding=True)


def test_a_broken_file_of_the_hub_can_be_fetched_again(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(lfm2_fast.CheckpointError, match="force_download=True"):
        lfm2_fast.load(broken, device="cpu")
