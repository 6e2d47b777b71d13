"""GGUF files that this package writes: read back, run by llama.cpp, and what is refused."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from bench.cpu import llama_build
from bench.cpu.llama_server import LlamaServer
from lfm2_fast.__main__ import main
from lfm2_fast.config_values import CheckpointError
from lfm2_fast.text.tokenizer import load_tokenizer
from lfm2_fast.weights.gguf_export import export_gguf
from lfm2_fast.weights.gguf_file import read_gguf

pytest.importorskip("gguf")
Make = Callable[[str], Path]


def changed_copy(tiny: Path, folder: Path, file: str, **changes: Any) -> Path:
    """Copy the small checkpoint with values of a JSON file changed."""
    shutil.copytree(tiny, folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    return folder


def matrices(model: lfm2_fast.Lfm2ForCausalLM) -> dict[str, torch.Tensor]:
    """Return every matrix but the embedding and the head, dequantized."""
    return {
        name: part.dequantized(torch.float32)
        for name, part in model.network.named_modules()
        if hasattr(part, "dequantized") and name not in ("embed_tokens", "lm_head")
    }


def test_bf16_comes_back_equal(tiny: Path, gguf_of: Make) -> None:
    ours = lfm2_fast.load(gguf_of("bf16"), device="cpu")
    theirs = lfm2_fast.load(tiny, device="cpu")
    assert ours.dtype == torch.bfloat16
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_q4_0_is_int4(tiny: Path, q4_0: Path) -> None:
    """All but the embedding are equal: it is in groups there and in rows here."""
    ours = matrices(lfm2_fast.load(q4_0, device="cpu"))
    theirs = matrices(lfm2_fast.load(tiny, device="cpu", quantization="int4"))
    assert ours.keys() == theirs.keys() and len(ours) == 4 * 4 + 2 * 4
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    types = {name: tensor.type for name, tensor in read_gguf(q4_0).tensors.items()}
    assert types["token_embd.weight"] == "Q8_0" and types["blk.0.ffn_up.weight"] == "Q4_0"


def test_generation_config_and_template_go_along(tiny: Path, tmp_path: Path) -> None:
    sampling = {"do_sample": True, "temperature": 0.25, "top_k": 9, "min_p": 0.5}
    folder = changed_copy(
        tiny, tmp_path / "a", "generation_config.json", eos_token_id=[7, 2], **sampling
    )
    (folder / "chat_template.jinja").unlink()
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "{{ 1 }}"}))
    export_gguf(folder, tmp_path / "x.gguf", "q8_0")
    model = lfm2_fast.load(tmp_path / "x.gguf", device="cpu")
    found = model.generation_config.to_dict()
    assert found["eos_token_id"] == [7, 2]
    assert {name: found[name] for name in sampling} == sampling
    assert load_tokenizer(str(tmp_path / "x.gguf")).chat_template == "{{ 1 }}"


def test_the_command_writes_what_it_says(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], q4_0: Path
) -> None:
    path = tmp_path / "x.gguf"
    for arguments, code, said in (
        ([str(tiny), str(path), "--type", "Q4_0"], 0, "2.2 MB"),
        ([str(tiny), str(path), "--type", "q4_k"], 2, "type='q4_k' is not supported; use f32, f16"),
        (
            [str(q4_0), str(path)],
            2,
            "is already a GGUF file: convert it with llama.cpp's llama-quantize",
        ),
    ):
        with pytest.raises(SystemExit) as left:
            main(["export", "gguf", *arguments])
        assert (left.value.code or 0) == code
        assert said in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["x.gguf"]
    # But for the checkpoint's name, which is the folder's in both.
    assert path.read_bytes() == q4_0.read_bytes()


def test_checkpoints_that_llama_cpp_does_not_run_are_refused(
    tiny: Path, tmp_path: Path, random_checkpoint: Callable[..., Path]
) -> None:
    def refuse(folder: Path, words: str, type: str = "q8_0") -> None:
        with pytest.raises(CheckpointError, match=words):
            export_gguf(folder, tmp_path / "x.gguf", type)

    refuse(random_checkpoint(), "has no tokenizer.json, which a GGUF file needs")
    refuse(random_checkpoint(conv_bias=True), "conv_bias, which llama.cpp does not run")
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
    refuse(random_checkpoint(rope_parameters={**yarn, "rope_theta": 1e4}), "type 'yarn'; write the")
    lfm2_fast.load(tiny, device="cpu", quantization="int8").save_pretrained(tmp_path / "int8")
    refuse(tmp_path / "int8", "already quantized .int8.: export the unquantized checkpoint")
    other = changed_copy(tiny, tmp_path / "b", "tokenizer.json", normalizer={"type": "NFC"})
    refuse(other, "splits texts by other rules than LFM2's")
    large = lfm2_fast.load(tiny, device="cpu")
    large.network.layers[0].conv.in_proj.weight[3, 5] = 1e6
    shutil.copytree(tiny, tmp_path / "c")
    large.save_pretrained(tmp_path / "c")
    refuse(tmp_path / "c", "in_proj.weight has numbers that F16 cannot hold; use bf16", "f16")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.slow
@pytest.mark.skipif(not llama_build.built(), reason="`make peers` has not built llama.cpp here")
def test_llama_cpp_writes_the_same_tokens(tiny: Path, gguf_of: Make) -> None:
    """The tokens are those of this package in float32, from a text and from a conversation."""
    file = gguf_of("bf16")
    model = lfm2_fast.load(file, device="cpu", dtype="float32")
    tokenizer = load_tokenizer(str(file))
    text = (tiny / "heldout.txt").read_text("utf-8")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ls é🎉?"}]

    def ours(ids: list[int]) -> list[int]:
        return model.generate(torch.tensor([ids]), max_new_tokens=32)[0, len(ids) :].tolist()

    program = llama_build.program("llama-server")
    with LlamaServer(program, file, 1, 1, 512, "llama-server") as server:

        def ask(path: str, **body: Any) -> Any:
            request = urllib.request.Request(
                f"http://127.0.0.1:{server.port}/{path}",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with server.opener.open(request, timeout=100) as answer:
                return json.load(answer)

        def tokenize(text: str) -> list[int]:
            return ask("tokenize", content=text, add_special=True, parse_special=True)["tokens"]

        assert tokenize(text[:4000]) == tokenizer(text[:4000]).input_ids
        prompts = [tokenizer(text[first : first + 200]).input_ids for first in (0, 900, 5000)]
        prompt = ask("apply-template", messages=messages)["prompt"]
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
        assert tokenize(prompt) == chat
        for ids in (*prompts, chat):
            body = {"prompt": ids, "n_predict": 32, "temperature": 0, "return_tokens": True}
            assert ask("completion", **body)["tokens"] == ours(ids)
        body = {"messages": messages, "max_tokens": 32, "temperature": 0}
        answer = ask("v1/chat/completions", **body)["choices"][0]["message"]["content"]
        wanted = tokenizer.decode(ours(chat), skip_special_tokens=True)
        assert answer.strip() == wanted.strip()
