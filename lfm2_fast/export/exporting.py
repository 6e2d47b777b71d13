"""Export of a checkpoint by a vendor's program, proven before it takes its place."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lfm2_fast.export.environment import Note, run, vendor_python
from lfm2_fast.export.proof import (
    PROMPT,
    STEPS,
    Outcome,
    Proof,
    outcome,
    proof_ids,
    prove,
    prove_rounded,
    prove_static,
)
from lfm2_fast.export.rounding import round_weights
from lfm2_fast.export.runtime import Runtime
from lfm2_fast.export.vendors import Vendor
from lfm2_fast.hf.causal_lm import Lfm2ForCausalLM
from lfm2_fast.hf.load import load
from lfm2_fast.text.tokenizer import TOKENIZER_FILES, load_tokenizer
from lfm2_fast.weights.hub import find_checkpoint
from lfm2_fast.weights.safetensors_files import INDEX

# Tokens that a runtime has room for in the proof. Half of a static shape is the prompt's, so that
# the proof's prompt is padded.
CONTEXT = 4 * PROMPT
# File of an export with its origin and the results of its proof.
RECORD = "lfm2_fast_export.json"


def export(
    vendor: Vendor,
    name: str,
    folder: Path,
    type: str,
    *,
    environment: Path | None = None,
    note: Note,
    **options: Any,
) -> dict[str, Any]:
    """Write the checkpoint ``name`` into ``folder`` for a vendor's runtime, and return its record.

    ``type`` is one of the vendor's types of weights. ``environment`` replaces the exporter's own;
    ``note`` gets lines that tell the progress. ``options`` are those of the hub. The graph is
    proven with float32 weights first, then with those of ``type``: see ``proof``.

    Raises ValueError for a wrong argument or a folder that is not empty, ExportError if the
    exporter or a proof fails. Then nothing is left in the folder or beside it.
    """
    if type not in vendor.types:
        raise ValueError(f"type={type!r} is not supported; use {', '.join(vendor.types)}")
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: remove it, or name another")
    tokenizer = load_tokenizer(name, **options)
    model = load(name, device="cpu", dtype="float32", backend="eager", **options)
    if model.network.config.quantization:
        raise ValueError(f"{name} is quantized already: export the checkpoint it was made from")
    # It may take minutes to make, so all else is checked before.
    python = vendor_python(vendor.name, vendor.modules, environment, note)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        source = Path(temporary) / "checkpoint"
        _write_source(source, model, tokenizer, name, options)
        made = Path(temporary) / "f32"
        built = _build(vendor, python, source, made, "f32", model, tokenizer, note)
        if type != "f32":
            shutil.rmtree(made)
            made = Path(temporary) / type
            built = _build(vendor, python, source, made, type, model, tokenizer, note)
        longest = model.network.config.context_length
        record = {
            "runtime": vendor.name,
            "type": type,
            "context": min(vendor.context or longest, longest),
            "prompt_tokens": PROMPT,
            "greedy_tokens": STEPS,
            **built,
        }
        (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _keep_files(source, made)
        if folder.is_dir():
            folder.rmdir()
        os.replace(made, folder)
    return record


def _write_source(
    folder: Path, model: Lfm2ForCausalLM, tokenizer: Any, name: str, options: dict[str, Any]
) -> None:
    """Write the model in float32 as Hugging Face's classes read it, with the tokenizer's files."""
    model.save_pretrained(folder)
    found = find_checkpoint(name, weights=False, also=TOKENIZER_FILES, **options)
    files = [found / file for file in TOKENIZER_FILES]
    if not files[0].is_file():  # a GGUF file
        tokenizer.save_pretrained(folder)
    for file in files:
        if file.is_file():
            shutil.copy(file, folder)


def _build(
    vendor: Vendor,
    python: Path,
    source: Path,
    made: Path,
    type: str,
    model: Lfm2ForCausalLM,
    tokenizer: Any,
    note: Note,
) -> dict[str, Any]:
    """Export ``source``, and return the results of its proof, with facts about the runtime.

    The weights of ``model`` are those of ``source``, and are rounded in place where ``type`` is.
    """
    config = model.network.config
    note(f"exporting {type} for {vendor.title}")
    for command in vendor.commands(python, source, made, type, config):
        run(command, note, shown=("mended: ",))
    note(f"comparing {PROMPT} tokens and {STEPS} greedy tokens with the model's, on this CPU")
    with Runtime(python, vendor.name, made, context=CONTEXT, exact=True) as runtime:
        found, facts = outcome(runtime, proof_ids(tokenizer)), runtime.facts
    expected = _logits(model, found)
    rounding = vendor.rounding(type, config)
    if rounding is None:
        proof = prove(found, expected)
    else:

        def rounded() -> torch.Tensor:
            round_weights(model.network, rounding)
            return _logits(model, found)

        proof = prove_rounded(found, expected, rounded)
    note(described(type, proof))
    static: dict[str, float] = {}
    if vendor.static:
        half = load(source, device="cpu", dtype="float16", backend="eager")
        halves = _logits(half, found)
        # The proof is of the shapes, and not of a device's rounding.
        options = vendor.name, made
        with Runtime(python, *options, device="STATIC", context=CONTEXT, exact=True) as runtime:
            static = {"static_shapes_error": prove_static(runtime, found, halves, expected)}
    if vendor.unproven is not None:
        note(vendor.unproven)
    found_by = {"proven_on": facts, "not_proven": vendor.unproven}
    return {**_known(found_by), "proof": {**_known(asdict(proof)), **static}}


def described(type: str, proof: Proof) -> str:
    """Return a line with the figures of a proof."""
    words = f"{type}: logits within {proof.largest_error:.2g} of the model's"
    if proof.expected_prompt_error is not None:
        words = (
            f"{type}: logits off by {proof.prompt_error:.2g} in the prompt and "
            f"{proof.steps_error:.2g} in the steps, where the same rounding gives "
            f"{proof.expected_prompt_error:.2g} and {proof.expected_steps_error:.2g} here"
        )
    return f"{words}; {proof.equal_tokens} of {STEPS} greedy tokens are the model's"


def _logits(model: Lfm2ForCausalLM, found: Outcome) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([found.ids]), use_cache=False).logits[0].float()


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _keep_files(source: Path, made: Path) -> None:
    """Copy the tokenizer and the configs that the exporter left out."""
    for file in source.iterdir():
        is_text = file.suffix in (".json", ".jinja") and file.name != INDEX
        if is_text and not (made / file.name).exists():
            shutil.copy(file, made)
