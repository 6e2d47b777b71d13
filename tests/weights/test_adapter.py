"""Adapters of PEFT, merged while a checkpoint loads: equal to PEFT on transformers' class."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lfm2_fast
from bench.cpu.adapters import write_adapter
from lfm2_fast.text.tokenizer import load_tokenizer
from lfm2_fast.weights.adapter import PREFIX, read_adapter
from tests.adapters import ALL, IDS, make_adapter

UNTIED, TABLES = {"tie_word_embeddings": False}, ["embed_tokens", "lm_head"]
BIASED, IN_CONV = {"conv_bias": True}, r".*\.conv\..*_proj"
# What the base's config has, and what LoraConfig is given.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{name: ({}, {"target_modules": [name]}) for name in (*ALL, *TABLES)},
    "all-linear": ({}, {"target_modules": "all-linear"}),
    "a regex": ({}, {"target_modules": r".*layers\.[13]\..*proj"}),
    "layers": ({}, {"layers_to_transform": [1, 2], "exclude_modules": ["w2"]}),
    "patterns": (
        {},
        {"rank_pattern": {"q_proj": 2, r"layers\.2\.conv\.in_proj": 7}, "alpha_pattern": {"w1": 9}},
    ),
    "rsLoRA": ({}, {"use_rslora": True}),
    "DoRA": (BIASED, {"use_dora": True}),
    "DoRA of both tables": (UNTIED, {"use_dora": True, "target_modules": TABLES}),
    "DoRA of a tied table": ({}, {"use_dora": True, "target_modules": TABLES[:1]}),
    "both tables": ({}, {"target_modules": [*TABLES, "q_proj"]}),
    "untied tables": (UNTIED, {"target_modules": TABLES}),
    "whole modules": (
        {},
        {"target_modules": ["w1"], "modules_to_save": ["lm_head", "embedding_norm", "self_attn"]},
    ),
    "whole embedding": ({}, {"target_modules": ["w1"], "modules_to_save": ["embed_tokens"]}),
    "all biases": (BIASED, {"bias": "all"}),
    "own biases": (BIASED, {"bias": "lora_only"}),
    "bias of the change": (BIASED, {"lora_bias": True, "target_modules": IN_CONV}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_merged_as_peft_runs_it(
    name: str, random_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    changed, options = OPTIONS[name]
    base = random_checkpoint(**changed)
    made = make_adapter(base, tmp_path, also=("bias",) if "biases" in name else (), **options)
    model = lfm2_fast.load(base, device="cpu", dtype="float32", adapter=tmp_path, backend="eager")
    made.check(model(IDS).logits)


def test_a_folder_that_is_an_adapter(tiny: Path, tmp_path: Path) -> None:
    """The adapter's base and its tokenizer are found. Quantization comes after merging."""
    made = make_adapter(tiny, tmp_path, modules_to_save=["embedding_norm"])
    model = lfm2_fast.load(tmp_path, device="cpu", dtype="float32", quantization="int8")
    merged = lfm2_fast.load(tiny, device="cpu", dtype="float32", adapter=str(tmp_path))
    made.check(merged(IDS).logits)
    folder = tmp_path / "merged"
    merged.save_pretrained(folder)
    again = lfm2_fast.load(folder, device="cpu", dtype="float32", quantization="int8")
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    assert load_tokenizer(str(tmp_path)).vocab_size == load_tokenizer(str(tiny)).vocab_size
    with pytest.raises(ValueError, match="leave adapter=.* out"):
        lfm2_fast.load(tmp_path, device="cpu", adapter=tiny)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def field(name: str, value: object) -> Callable[[Path], object]:
    return lambda at: change_config(at, **{name: value})


def without(start: str) -> Callable[[Path], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(start)]:
            del tensors[key]

    return lambda at: change_tensors(at, change)


def renamed(old: str, new: str) -> Callable[[Path], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return lambda at: change_tensors(at, change)


def test_nothing_is_passed_over(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Each fault is named before a weight of the base is read."""
    made = make_adapter(tiny, tmp_path / "made").folder
    monkeypatch.setattr("lfm2_fast.weights.checkpoint.load_weights", None)
    tensors, q = made / "adapter_model.safetensors", "base_model.model.model.layers.2.self_attn.q"
    faults: list[tuple[str, Callable[[Path], object]]] = [
        ("peft_type='IA3'", field("peft_type", "IA3")),
        ("trainable_token_indices=.* the result", field("trainable_token_indices", [3])),
        ("layer_replication", field("layer_replication", [[0, 2]])),
        ("a_new_field=1", field("a_new_field", 1)),
        ("init_lora_weights='pissa'", field("init_lora_weights", "pissa")),
        ("no LoRA config", field("r", "many")),
        ("no LoRA config", field("target_modules", "(q_proj")),
        ("r must be at least 1", field("r", 0)),
        (r"has shape \[\d+, 4\], but \[\d+, 5|has shape \[4, \d+\], but \[5", field("r", 5)),
        ("lacks the magnitude tensor", field("use_dora", True)),
        (r"would not be applied: .*no target", field("target_modules", ["w1"])),
        (r"conv.in_proj\S* would not be applied", field("exclude_modules", ["in_proj"])),
        ("would not be applied: model.layers.0", field("layers_to_transform", 1)),
        ("lacks the tensors of .*q_proj", without(q)),
        ("lacks the up tensor of .*q_proj", without(f"{q}_proj.lora_B")),
        ("other.lora_.* would not be applied: .*not adapted", renamed("q_proj", "other")),
        ("would not be applied: the model has no", renamed("lora_A", "lora_C")),
        ("truncated", lambda at: (at / tensors.name).write_bytes(b"0" * 99)),
        ("has no adapter_model", lambda at: (at / tensors.name).unlink()),
        ("has no adapter_config", lambda at: (at / "adapter_config.json").unlink()),
    ]
    for number, (message, spoil) in enumerate(faults):
        folder = tmp_path / str(number)
        shutil.copytree(made, folder)
        spoil(folder)
        with pytest.raises(lfm2_fast.CheckpointError, match=message):
            lfm2_fast.load(tiny, device="cpu", adapter=folder)


def test_names_of_a_base_without_a_head(tiny: Path, tmp_path: Path) -> None:
    """Patterns are those of the names that the adapter's base had, with PEFT's prefix or none."""
    config = lfm2_fast.Config.from_file(tiny / "config.json")
    folder = write_adapter(tmp_path / "adapter", config, 4, 0)
    change_config(folder, alpha_pattern={r"^layers\.0\..*": 12}, lora_alpha=4)
    for prefix in (PREFIX, ""):

        def rename(tensors: dict[str, torch.Tensor], prefix: str = prefix) -> None:
            for key in list(tensors):
                tensors[prefix + key.removeprefix(PREFIX).removeprefix("model.")] = tensors.pop(key)

        change_tensors(folder, rename)
        found = read_adapter(folder, config).low_rank
        scales = {module: change.scale for module, change in found.items()}
        assert scales == {m: 3.0 if m.startswith("model.layers.0.") else 1.0 for m in scales}
        assert len(set(scales.values())) == 2


def test_no_merging_where_there_is_no_place_for_it(tiny: Path, tmp_path: Path) -> None:
    folder = make_adapter(tiny, tmp_path / "adapter", lora_bias=True).folder
    lfm2_fast.load(tiny, device="cpu", quantization="int8").save_pretrained(tmp_path / "int8")
    with pytest.raises(lfm2_fast.CheckpointError, match="format 'int8'.*load_adapter"):
        lfm2_fast.load(tmp_path / "int8", device="cpu", adapter=folder)
    with pytest.raises(lfm2_fast.CheckpointError, match="lora_bias=True adds a bias to model"):
        lfm2_fast.load(tiny, device="cpu", adapter=folder)
