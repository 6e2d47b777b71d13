"""A checkpoint as a GGUF file for llama.cpp's programs: its made-up vocabulary, how it is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.cpu.gguf_file import GGUFError, gguf_file
from lfm2_fast.weights.gguf_file import read_gguf

pytest.importorskip("gguf")


def quantiser(folder: Path, body: str) -> Path:
    path = folder / "llama-quantize"
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_a_vocabulary_is_made_up(folder: Path, tmp_path: Path) -> None:
    file = read_gguf(gguf_file(folder, "BF16", tmp_path / "llama-quantize"))
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert len(set(tokens)) == len(tokens) == file.tensors["token_embd.weight"].shape[0]


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
