"""A checkpoint as a GGUF file: its tensors, its made-up vocabulary, and how it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lfm2_fast
from bench.cpu.gguf_file import GGUFError, gguf_file, read_safetensors, write_gguf

gguf: Any = pytest.importorskip("gguf")


def quantiser(folder: Path, body: str) -> Path:
    path = folder / "llama-quantize"
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_it_holds_the_checkpoint(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(tiny, path)
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    weights = load_file(tiny / "model.safetensors")
    assert len(found) == len(weights)
    embedding = torch.from_numpy(found["token_embd.weight"].data.copy()).view(torch.bfloat16)
    assert torch.equal(embedding, weights["model.embed_tokens.weight"])
    conv = torch.from_numpy(found["blk.0.shortconv.conv.weight"].data.copy())
    assert torch.equal(conv, weights["model.layers.0.conv.conv.weight"].squeeze(1).float())
    heads = reader.fields["lfm2.attention.head_count_kv"].contents()
    assert [bool(n) for n in heads] == [
        kind == "full_attention"
        for kind in lfm2_fast.Config.from_file(tiny / "config.json").layer_types
    ]
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(set(tokens)) == len(tokens) == len(weights["model.embed_tokens.weight"])
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == 7


def test_8_bits_by_the_package_gguf(tiny: Path, tmp_path: Path) -> None:
    write_gguf(tiny, tmp_path / "x.gguf", "Q8_0")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    matrix = found["token_embd.weight"]
    assert matrix.tensor_type == gguf.GGMLQuantizationType.Q8_0
    wide = gguf.quants.dequantize(matrix.data, matrix.tensor_type)
    bits = read_safetensors(tiny / "model.safetensors")["model.embed_tokens.weight"]
    exact = (bits.astype(np.uint32) << 16).view(np.float32)
    assert np.abs(wide - exact).max() <= np.abs(exact).max() / 127
    assert found["blk.0.shortconv.conv.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_it_is_made_once_by_the_quantiser(folder: Path, tmp_path: Path) -> None:
    program = quantiser(tmp_path, f'cp "$1" "$2"; echo "$1 $3" >> {tmp_path}/made')
    path = gguf_file(folder, "Q4_0", program)
    assert path == folder / "checkpoint-Q4_0.gguf" and path.is_file()
    assert gguf_file(folder, "Q4_0", program) == path
    base = folder / "checkpoint-BF16.gguf"
    assert (tmp_path / "made").read_text(encoding="utf-8") == f"{base} Q4_0\n"
    assert not list(folder.glob("*.partial"))


def test_without_a_quantiser_4_bits_are_refused(folder: Path, tmp_path: Path) -> None:
    missing = tmp_path / "llama-quantize"
    assert gguf_file(folder, "Q8_0", missing).is_file()
    with pytest.raises(GGUFError, match="Q4_0.gguf: there is no .*llama-quantize: run `make peers"):
        gguf_file(folder, "Q4_0", missing)


def test_a_quantiser_that_fails_says_why(folder: Path, tmp_path: Path) -> None:
    program = quantiser(tmp_path, "echo a line >&2; echo no such type >&2; exit 1")
    with pytest.raises(GGUFError, match="llama-quantize failed and said: no such type"):
        gguf_file(folder, "Q8_0", program)
    assert not (folder / "checkpoint-Q8_0.gguf").exists()
