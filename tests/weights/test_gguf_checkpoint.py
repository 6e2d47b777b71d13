"""GGUF files as checkpoints: config, tensors, tokenizer and commands, and files that are wrong."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lfm2_fast
from lfm2_fast.config import Config
from lfm2_fast.config_values import CheckpointError
from lfm2_fast.text.tokenizer import load_tokenizer
from lfm2_fast.weights.fusion import fusion_table
from lfm2_fast.weights.gguf_checkpoint import gguf_names
from lfm2_fast.weights.gguf_export import TYPES
from lfm2_fast.weights.hub import find_checkpoint

gguf: Any = pytest.importorskip("gguf")


def widened(path: Path) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield every tensor of a file, dequantized by the package gguf, by GGUF's name."""
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        yield tensor.name, torch.from_numpy(np.array(values, np.float32))


@pytest.mark.parametrize("type", TYPES)
def test_every_number_is_the_files(tiny: Path, gguf_of: Callable[[str], Path], type: str) -> None:
    path = gguf_of(type)
    model = lfm2_fast.load(path, device="cpu", dtype="float32")
    config = Config.from_file(tiny / "config.json")
    names = gguf_names(fusion_table(config), config.num_hidden_layers)
    theirs = dict(widened(path))
    modules = dict(model.network.named_modules())
    for name, fused in fusion_table(config).items():
        module = modules[name.rpartition(".")[0]]
        ours = module.dequantized(torch.float32) if fused.is_matrix else module.weight
        wanted = torch.cat([theirs[names[part.name]] for part in fused.parts])
        assert torch.equal(ours, wanted), name
    quantized = type.startswith("q")
    assert model.network.config.quantization == ("mixed" if quantized else None)
    assert model.get_memory_footprint() < path.stat().st_size * (1.6 if quantized else 2.1)


def test_a_quantized_file_generates(q4_0: Path) -> None:
    model = lfm2_fast.load(q4_0, device="cpu")
    ids = torch.tensor([[1, 425, 381, 834]])
    # Enough steps that one is recorded, and replayed, where the native bodies run.
    assert model.generate(ids, max_new_tokens=6, eos_token_id=[]).shape == (1, 10)


def test_config_is_the_checkpoints(tiny: Path, q4_0: Path) -> None:
    wanted = Config.from_file(tiny / "config.json").to_dict()
    found = lfm2_fast.load(q4_0, device="cpu").network.config.to_dict()
    found.pop("quantization_config")
    assert found == wanted


def test_tokenizer_is_the_checkpoints(tiny: Path, q4_0: Path) -> None:
    ours, theirs = load_tokenizer(str(q4_0)), load_tokenizer(str(tiny))
    texts = (tiny / "heldout.txt").read_text("utf-8").split("\n")
    texts += ["<|im_start|>user\nhi<|im_end|>", "  a\t\n\n", "é 日本語 🎉 'S 'll 12345", ""]
    assert all(ours(text).input_ids == theirs(text).input_ids for text in texts)
    assert ours.chat_template == theirs.chat_template


def test_folder_named_file_and_blob(tiny: Path, q4_0: Path, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 425, 381, 834]])
    wanted = lfm2_fast.load(q4_0, device="cpu")(ids).logits
    (tmp_path / "one").mkdir()
    shutil.copy(q4_0, tmp_path / "one")
    shutil.copy(q4_0, tmp_path / "blob")
    for where, options in (
        (tmp_path / "one", {}),
        (tmp_path / "one", {"gguf_file": q4_0.name}),
        (tmp_path / "blob", {}),
    ):
        assert torch.equal(lfm2_fast.load(where, device="cpu", **options)(ids).logits, wanted)
    others = ("other.gguf", "mmproj-F16.gguf", "UD-Q4_K_M.gguf", "x-IQ4_K_M.gguf")
    for name in others:
        shutil.copy(q4_0, tmp_path / "one" / name)
    with pytest.raises(CheckpointError, match="has 4 GGUF files: name one of UD-Q4_K_M.gguf, oth"):
        lfm2_fast.load(tmp_path / "one")
    with pytest.raises(CheckpointError, match="no file 'x.gguf'; check gguf_file"):
        lfm2_fast.load(tmp_path / "one", gguf_file="x.gguf")
    assert find_checkpoint(f"{tmp_path}/one:q4_k_m").name == "UD-Q4_K_M.gguf"
    with pytest.raises(CheckpointError, match="no GGUF file of type 'Q8_0'; it has UD-Q4_K_M.gguf"):
        lfm2_fast.load(f"{tmp_path}/one:Q8_0")
    with pytest.raises(CheckpointError, match="gguf_file='a.gguf' a file: give one of them"):
        lfm2_fast.load("org/model:Q4_0", gguf_file="a.gguf")


def test_quantization_is_refused_or_done(q4_0: Path, gguf_of: Callable[[str], Path]) -> None:
    with pytest.raises(
        ValueError, match="'int8': .* is already quantized .*leave quantization out"
    ):
        lfm2_fast.load(q4_0, quantization="int8")
    made = lfm2_fast.load(gguf_of("f32"), device="cpu", quantization="int8")
    assert made.network.config.quantization == "int8"


def test_a_note_tells_what_is_kept_and_what_converted(
    q4_0: Path, gguf_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lfm2_fast.weights")
    lfm2_fast.load(q4_0, device="cpu")
    assert caplog.messages[-1].endswith("tiny-Q4_0.gguf: 34 Q4_0, 1 Q8_0 kept exactly")
    lfm2_fast.load(gguf_of("f16"), device="cpu", dtype="bfloat16")
    assert caplog.messages[-1].endswith("tiny-F16.gguf: 35 F16 converted to bfloat16")
    lfm2_fast.load(gguf_of("f16"), device="cpu", quantization="int4")
    assert caplog.messages[-1].endswith(": 1 F16 converted to int8; 34 F16 converted to int4")
    assert {record.levelno for record in caplog.records} == {logging.INFO}


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    for name, words in (("llama", "architecture 'llama'"), ("lfm2moe", "LFM2-MoE")):
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", name)
        writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(CheckpointError, match=words):
            lfm2_fast.load(tmp_path / "x.gguf")


def test_missing_part_of_a_split_file(q4_0: Path, tmp_path: Path) -> None:
    path = tmp_path / "x-00001-of-00002.gguf"
    shutil.copy(q4_0, path)
    with pytest.raises(CheckpointError, match="x-00002-of-00002.gguf is missing"):
        lfm2_fast.load(path)
