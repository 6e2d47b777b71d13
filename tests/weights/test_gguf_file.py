"""The header of a GGUF file beside the package gguf, and files that are truncated or hostile."""

from __future__ import annotations

import random
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import lfm2_fast
from lfm2_fast.cli.environment import checkpoint_facts
from lfm2_fast.config_values import CheckpointError
from lfm2_fast.text.tokenizer import load_tokenizer
from lfm2_fast.weights.gguf_file import read_gguf

gguf: Any = pytest.importorskip("gguf")
# Bytes and seconds that a file of two megabytes may take.
MEMORY, SECONDS = 1 << 30, 20
NUMBERS = [0, 1, 2, 7, 31, 33, 255, 65537, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]


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


def truncated(made: bytearray, draw: random.Random) -> None:
    del made[draw.randrange(len(made)) :]


def header_bytes(made: bytearray, draw: random.Random) -> None:
    for _ in range(draw.randrange(1, 9)):
        made[draw.randrange(len(made) // 40)] = draw.randrange(256)


def lengths(made: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(made) // 40)
    made[at : at + 8] = draw.choice([b"\xff" * 8, b"\0" * 8, (1 << 40).to_bytes(8, "little")])


def counts(made: bytearray, draw: random.Random) -> None:
    at = draw.randrange(8, 400)
    made[at : at + 8] = draw.randrange(1 << 64).to_bytes(8, "little")


def settings(made: bytearray, draw: random.Random) -> None:
    """Change one number of the model's metadata, or its type."""
    keys = ("context_length", "embedding_length", "block_count", "feed_forward_length")
    keys += ("attention.head_count", "attention.head_count_kv", "shortconv.l_cache", "vocab_size")
    keys += ("attention.layer_norm_rms_epsilon", "rope.freq_base")
    at = _behind(made, b"lfm2." + draw.choice(keys).encode())
    if draw.random() < 0.2:
        made[at : at + 4] = struct.pack("<I", draw.randrange(14))
    elif draw.random() < 0.5:
        made[at + 4 : at + 8] = struct.pack("<I", draw.choice(NUMBERS))
    else:
        made[at + 4 : at + 8] = struct.pack(
            "<f", draw.choice([0.0, -1.0, 1e38, 1e-40, float("nan")])
        )


def tensors(made: bytearray, draw: random.Random) -> None:
    """Change the axes, a length, the type or the place of one tensor."""
    names = ("token_embd", "blk.0.shortconv.conv", "blk.2.attn_q_norm", "blk.5.ffn_down")
    at = _behind(made, draw.choice(names).encode() + b".weight")
    axes = struct.unpack("<I", made[at : at + 4])[0]
    field = draw.choice([0, 4, 4 + 8 * axes, 8 + 8 * axes])
    size = 4 if field in (0, 4 + 8 * axes) else 8
    value = draw.choice([draw.randrange(50), draw.choice(NUMBERS), draw.randrange(1 << 8 * size)])
    made[at + field : at + field + size] = value.to_bytes(size, "little")


def _behind(made: bytearray, key: bytes) -> int:
    return made.index(struct.pack("<Q", len(key)) + key) + 8 + len(key)


@contextmanager
def bounded() -> Iterator[None]:
    """Bound the memory and the time of the block; beyond, it raises what no checkpoint raises."""

    def late(*_: object) -> None:
        raise TimeoutError(f"it took more than {SECONDS} seconds")

    limit = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limit[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limit)


def check_hostile(whole: bytes, path: Path, count: int, use: Callable[[Path], Any]) -> int:
    """Use changed files; return how many were refused. Any other error is raised."""
    ways = (truncated, header_bytes, lengths, counts, settings, tensors)
    refused = 0
    for seed in range(count):
        draw = random.Random(seed)
        made = bytearray(whole)
        ways[seed % len(ways)](made, draw)
        path.write_bytes(made)
        try:
            with bounded():
                use(path)
        except CheckpointError as error:
            assert str(path) in str(error), (seed, error)
            refused += 1
        except Exception as error:
            raise AssertionError(f"file {seed}: {error!r}") from error
    return refused


def load(path: Path) -> None:
    lfm2_fast.load(path, device="cpu")


def read_all_else(path: Path) -> None:
    checkpoint_facts(str(path))
    load_tokenizer(str(path))


@pytest.mark.slow
@pytest.mark.parametrize("use", [load, read_all_else])
def test_hostile_files_are_refused(q4_0: Path, tmp_path: Path, use: Callable[[Path], Any]) -> None:
    # Others hit a text of the tokenizer, and load.
    assert check_hostile(q4_0.read_bytes(), tmp_path / "x.gguf", 120, use) > 40


@pytest.mark.nightly
@pytest.mark.parametrize(("use", "count"), [(load, 10_000), (read_all_else, 2_000)])
def test_ten_thousand_hostile_files_are_refused(
    q4_0: Path, tmp_path: Path, use: Callable[[Path], Any], count: int
) -> None:
    refused = check_hostile(q4_0.read_bytes(), tmp_path / "x.gguf", count, use)
    assert refused > 0.4 * count
