"""GGUF files as checkpoints: config, tensors, tokenizer and commands, and files that are wrong."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lfm2_fast
from lfm2_fast.config import CheckpointError, Config
from lfm2_fast.text.tokenizer import load_tokenizer
from lfm2_fast.weights.fusion import fusion_table
from lfm2_fast.weights.gguf_checkpoint import gguf_names
from lfm2_fast.weights.gguf_file import read_gguf

gguf: Any = pytest.importorskip("gguf")


def write(
    tiny: Path, path: Path, type: str = "Q4_0", changed: dict[str, Any] | None = None
) -> Path:
    """Write the tiny checkpoint as llama.cpp's converter does, matrices in ``type``."""
    config = Config.from_file(tiny / "config.json")
    tokenizer = json.loads((tiny / "tokenizer.json").read_text("utf-8"))
    special = {each["id"] for each in tokenizer["added_tokens"]}
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {each["content"]: each["id"] for each in tokenizer["added_tokens"]}
    writer = gguf.GGUFWriter(path, (changed or {}).get("architecture", "lfm2"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count((changed or {}).get("layers", config.num_hidden_layers))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    kinds = config.layer_types
    writer.add_head_count_kv([0 if k == "conv" else config.num_key_value_heads for k in kinds])
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_shortconv_l_cache(config.conv_L_cache)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("lfm2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3 if i in special else 1 for i in range(config.vocab_size)])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_add_bos_token(True)
    writer.add_chat_template((tiny / "chat_template.jinja").read_text("utf-8"))
    names = gguf_names(fusion_table(config), config.num_hidden_layers)
    for ours, tensor in load_file(tiny / "model.safetensors").items():
        wide = tensor.float().numpy()
        if tensor.dim() == 2:
            kind = gguf.GGMLQuantizationType[type]
            writer.add_tensor(names[ours], gguf.quants.quantize(wide, kind), raw_dtype=kind)
        else:
            writer.add_tensor(names[ours], wide.squeeze(1) if wide.ndim == 3 else wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def q4_0(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tiny, tmp_path_factory.mktemp("gguf") / "tiny-Q4_0.gguf")


def widened(path: Path) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield every tensor of a file, dequantized by the package gguf, by GGUF's name."""
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        yield tensor.name, torch.from_numpy(np.array(values, np.float32))


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_every_number_is_the_files(tiny: Path, tmp_path: Path, type: str) -> None:
    path = write(tiny, tmp_path / "x.gguf", type)
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
    quantized = type.startswith("Q")
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
    shutil.copy(q4_0, tmp_path / "one" / "other.gguf")
    with pytest.raises(CheckpointError, match="has 2 GGUF files: name one of other.gguf, tiny-Q4"):
        lfm2_fast.load(tmp_path / "one")
    with pytest.raises(CheckpointError, match="no file 'x.gguf'; check gguf_file"):
        lfm2_fast.load(tmp_path / "one", gguf_file="x.gguf")


def test_quantization_is_refused_or_done(tiny: Path, q4_0: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'int8': .* is quantized itself .*leave quantization out"):
        lfm2_fast.load(q4_0, quantization="int8")
    dense = write(tiny, tmp_path / "x.gguf", "F32")
    made = lfm2_fast.load(dense, device="cpu", quantization="int8")
    assert made.network.config.quantization == "int8"


def test_another_architecture_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    for name, words in (("llama", "architecture 'llama'"), ("lfm2moe", "LFM2-MoE")):
        with pytest.raises(CheckpointError, match=words):
            lfm2_fast.load(write(tiny, tmp_path / "x.gguf", changed={"architecture": name}))


def test_missing_part_of_a_split_file(q4_0: Path, tmp_path: Path) -> None:
    path = tmp_path / "x-00001-of-00002.gguf"
    shutil.copy(q4_0, path)
    with pytest.raises(CheckpointError, match="x-00002-of-00002.gguf is missing"):
        lfm2_fast.load(path)


def hostile(path: Path, whole: bytes, seed: int) -> None:
    """Write a file that is truncated, or whose header has bytes and lengths of another's."""
    draw = random.Random(seed)
    made = bytearray(whole)
    header = len(whole) // 40
    kind = seed % 4
    if kind == 0:
        del made[draw.randrange(len(made)) :]
    elif kind == 1:
        for _ in range(draw.randrange(1, 9)):
            made[draw.randrange(header)] = draw.randrange(256)
    elif kind == 2:
        at = draw.randrange(header)
        made[at : at + 8] = draw.choice([b"\xff" * 8, b"\0" * 8, (1 << 40).to_bytes(8, "little")])
    else:
        at = draw.randrange(8, 400)
        made[at : at + 8] = draw.randrange(1 << 64).to_bytes(8, "little")
    path.write_bytes(made)


def check_hostile(q4_0: Path, path: Path, count: int) -> None:
    whole, refused = q4_0.read_bytes(), 0
    for seed in range(count):
        hostile(path, whole, seed)
        try:
            lfm2_fast.load(path, device="cpu")
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
    # Others hit a text of the tokenizer, and load.
    assert refused > count * 0.4


def test_hostile_files_are_refused(q4_0: Path, tmp_path: Path) -> None:
    check_hostile(q4_0, tmp_path / "x.gguf", 200)


@pytest.mark.nightly
def test_ten_thousand_hostile_files_are_refused(q4_0: Path, tmp_path: Path) -> None:
    check_hostile(q4_0, tmp_path / "x.gguf", 10_000)


def test_header_is_what_the_package_reads(q4_0: Path) -> None:
    ours, theirs = read_gguf(q4_0), gguf.GGUFReader(q4_0)
    fields = {name: f for name, f in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == {name: field.contents() for name, field in fields.items()}
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.type == tensor.tensor_type.name
        assert mine.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert mine.offset == tensor.data_offset and mine.nbytes == tensor.n_bytes
