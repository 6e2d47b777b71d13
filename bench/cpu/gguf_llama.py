"""GGUF files that llama.cpp's converter and quantizer write, run by llama.cpp and by this package.

    make peers && python -m bench.cpu.gguf_llama real && python -m bench.cpu.gguf_llama random

Logits of both are compared with those of the file's dequantized weights in float32. The allowed
error is that of llama.cpp's rounding alone (``llama_rounding``). Greedy tokens are compared too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import torch
from transformers import SuppressTokensLogitsProcessor

import lfm2_fast
from bench.cpu.llama_build import CONVERTER, PEERS, program
from bench.cpu.llama_rounding import rounding
from bench.cpu.llama_server import LlamaServer
from bench.gate import distance, logits
from bench.report import results
from bench.shapes import TINY, random_weights
from lfm2_fast.text.tokenizer import load_tokenizer
from lfm2_fast.weights.fusion import fusion_table
from lfm2_fast.weights.gguf_checkpoint import gguf_names
from lfm2_fast.weights.gguf_config import raw_config
from lfm2_fast.weights.gguf_file import GGUFFile, read_gguf

OUT = results.RESULTS / "gguf-llama.json"
KEPT = ("F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
KINDS = (*KEPT, "Q3_K_M", "Q2_K", "IQ4_NL")
PROMPTS, STEPS, WRITTEN = 6, 6, 48
# The small checkpoint's <|endoftext|> and <|im_end|>.
ENDS = [2, 7]
# Factor by which an error may exceed that of rounding: two computations round other numbers.
SLACK = 1.2
# Takes any tokenizer for LFM2's, since the converter knows published ones by their hash.
CONVERT = """
import runpy, sys
sys.path[:0] = [{root!r}, {root!r} + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "lfm2"
sys.argv = [{script!r}, {folder!r}, "--outtype", {kind!r}, "--outfile", {out!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


@dataclass(frozen=True)
class Found:
    """Distances of logits from the exact ones, relative to their size, and counts of equal tokens.

    ``rounded`` is the error of llama.cpp's rounding alone. ``ours`` is in float32, and
    ``ours_bfloat16`` as ``load`` does it. ``written`` has the number of equal greedy tokens of each
    prompt, of ``WRITTEN``. ``gaps`` has the exact logit of our first different token less that of
    llama.cpp's. ``noise`` is the largest error of both engines' logits together.
    """

    types: dict[str, int]
    ours: float
    ours_bfloat16: float
    llama: float
    rounded: float
    apart: float
    written: list[int]
    gaps: list[float]
    noise: float


def wrong(found: Found) -> str | None:
    """Return the rule that a file breaks, or None.

    Rounding must explain the error of either engine, and both errors the distance between them.
    Tokens may differ where the exact logits of two are nearer than the errors.
    """
    if max(found.ours, found.llama) > SLACK * found.rounded:
        return f"an error is more than {SLACK} times {found.rounded:.3g}, that of rounding"
    if found.apart > SLACK * float(np.hypot(found.ours, found.rounded)):
        return f"the engines are {found.apart:.3g} apart, more than their errors"
    gap = max(map(abs, found.gaps), default=0.0)
    if gap > found.noise:
        return f"tokens differ whose logits are {gap:.3g} apart"
    return None


def convert(folder: Path, out: Path, kind: str) -> None:
    """Write a checkpoint as a GGUF file with llama.cpp's converter."""
    script = PEERS / CONVERTER
    code = CONVERT.format(
        root=str(script.parent), script=str(script), folder=str(folder), kind=kind, out=str(out)
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=300)


def quantize(base: Path, out: Path, kind: str) -> None:
    """Write a GGUF file in fewer bits with llama.cpp's quantizer."""
    command = [program("llama-quantize"), base, out, kind, "1"]
    subprocess.run([str(word) for word in command], check=True, capture_output=True, timeout=300)


def random_checkpoint(folder: Path) -> Path:
    """Write a small checkpoint whose rows are whole groups of 256, with the small one's tokenizer.

    Matrices are scaled up, so that logits depend on all layers.
    """
    copytree(TINY, folder)
    config = replace(
        lfm2_fast.Config.from_file(TINY / "config.json"),
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    weights = random_weights(config, torch.bfloat16)
    for name, fused in fusion_table(config).items():
        if not fused.is_norm:
            weights[name] *= 4
    lfm2_fast.Lfm2ForCausalLM(config, weights, backend="eager").save_pretrained(folder)
    return folder


def files_of(checkpoint: Path, folder: Path, kinds: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Yield the file of each kind, made by the converter or, from BF16, by the quantizer."""
    base = folder / "base-bf16.gguf"
    convert(checkpoint, base, "bf16")
    for kind in kinds:
        out = folder / f"{kind}.gguf"
        if kind == "BF16":
            out = base
        elif kind == "F16":
            convert(checkpoint, out, "f16")
        else:
            quantize(base, out, kind)
        yield kind, out


def exact_model(file: GGUFFile) -> tuple[lfm2_fast.Lfm2ForCausalLM, dict[int, str]]:
    """Return the file's model in float32, its weights widened by the package ``gguf`` alone.

    The second has the GGUF type of each matrix, by the address of its numbers.
    """
    import gguf

    config = lfm2_fast.Config.from_dict(raw_config(file))
    table = fusion_table(config)
    names = gguf_names(table, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file.path).tensors}
    weights, types = {}, {}
    for name, fused in table.items():
        parts = [stored[names[part.name]] for part in fused.parts]
        wide = [np.array(gguf.quants.dequantize(p.data, p.tensor_type), np.float32) for p in parts]
        weights[name] = torch.from_numpy(np.concatenate(wide)).reshape(fused.shape)
        types[weights[name].data_ptr()] = parts[0].tensor_type.name
    return lfm2_fast.Lfm2ForCausalLM(config, weights, backend="eager"), types


def centred(rows: np.ndarray) -> np.ndarray:
    return rows - rows.mean(-1, keepdims=True)


def compare(path: Path, prompts: Sequence[list[int]]) -> Found:
    """Run a file by both, and by the exact model; see ``Found``."""
    file = read_gguf(path)
    exact, types = exact_model(file)
    ours = lfm2_fast.load(path, device="cpu", dtype="float32")
    size = exact.network.config.vocab_size

    def by(model: Any) -> np.ndarray:
        rows = np.concatenate([logits(model, ids, STEPS) for ids in prompts])
        return centred(rows)

    right, own = by(exact), by(ours)
    beside = by(lfm2_fast.load(path, device="cpu", dtype="bfloat16"))
    with rounding(types):
        noisy = by(exact)
    written, gaps = [], []
    length = max(map(len, prompts)) + WRITTEN
    with LlamaServer(program("llama-server"), path, 1, 1, length, "llama.cpp") as server:
        theirs = np.concatenate([server.logits(ids, STEPS, size) for ids in prompts])
        for ids in prompts:
            body = server._body(ids, WRITTEN) | {"return_tokens": True}
            a = server._complete(body)["tokens"]
            out = ours.generate(
                torch.tensor([ids]),
                max_new_tokens=WRITTEN,
                eos_token_id=[],
                # Tokens that llama.cpp, asked to ignore ends, never writes.
                logits_processor=[SuppressTokensLogitsProcessor(ENDS)],
            )
            b = out[0, len(ids) :].tolist()
            same = next((i for i in range(WRITTEN) if a[i] != b[i]), WRITTEN)
            written.append(same)
            if same < WRITTEN:
                at = exact(torch.tensor([ids + a[:same]])).logits[0, -1]
                gaps.append(float(at[b[same]] - at[a[same]]))
    return Found(
        dict(Counter(t.type for t in file.tensors.values() if t.type != "F32")),
        ours=distance(own, right),
        ours_bfloat16=distance(beside, right),
        llama=distance(theirs, right),
        rounded=distance(noisy, right),
        apart=distance(theirs, own),
        written=written,
        gaps=gaps,
        noise=float(np.abs(own - right).max() + np.abs(theirs - right).max()),
    )


def prompts_of(folder: Path) -> list[list[int]]:
    """Return pieces of the held-out text, of several lengths."""
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(str(folder))(text, verbose=False).input_ids
    return [[ids[0], *ids[1 + 700 * i :][: 10 + 23 * i]] for i in range(PROMPTS)]


def main() -> None:
    """Compare kinds of files of a checkpoint, and write each into the result file."""
    parser = argparse.ArgumentParser(description="GGUF files, by llama.cpp and by lfm2_fast")
    parser.add_argument("shape", choices=("real", "random"), help="whose part to measure")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds with commas")
    given = parser.parse_args()
    torch.set_num_threads(1)
    protocol = {
        "prompts": PROMPTS,
        "steps": STEPS,
        "greedy_tokens": WRITTEN,
        "exact": "float32 on the file's weights, widened by the package gguf",
        "rounded": "the same with activations, keys and values rounded as llama.cpp does",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = TINY if given.shape == "real" else random_checkpoint(folder / "random")
        prompts = prompts_of(checkpoint)
        for kind, path in files_of(checkpoint, folder, given.kinds.split(",")):
            of = compare(path, prompts)
            print(kind, wrong(of) or "right", of, flush=True)
            found = results.header("GGUF files of llama.cpp's tools, by it and by us", protocol)
            before = json.loads(OUT.read_text("utf-8")) if OUT.is_file() else {}
            found["files"] = before.get("files", {})
            found["files"].setdefault(given.shape, {})[kind] = asdict(of)
            results.write(OUT, found)


if __name__ == "__main__":
    main()
