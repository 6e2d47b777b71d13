"""llama-server: its calls, requests at once, and its end in every case."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from bench.cpu import llama_build
from bench.cpu.gguf_file import gguf_file
from bench.cpu.llama_server import LlamaServer
from bench.cpu.references import reference
from bench.gate import PROMPT, STEPS
from bench.worker import EngineError
from tests.bench.cpu.fakes import asked, fake_server


def start(path: Path, rows: int = 3) -> LlamaServer:
    return LlamaServer(path, Path("x.gguf"), 2, rows, 384, "llama-server Q8_0")


def lives(server: LlamaServer) -> bool:
    try:
        os.kill(server.process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_requests_come_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A proxy without a server: a request through it would fail.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    prompts = [[5, 6], [7], [8, 9, 10]]
    with start(fake_server(tmp_path)) as server:
        assert server.seconds > 0
        # The fake answers none before all three have come.
        assert 0 < server.together(prompts, 12) < 10
    assert not lives(server)
    found = asked(tmp_path, "requests")
    assert sorted(body["prompt"] for body in found) == sorted(prompts)
    wanted = {"n_predict": 12, "ignore_eos": True, "cache_prompt": False, "temperature": 0}
    for body in found:
        assert body["path"] == "/completion" and body | wanted == body
    options = " ".join(server.command)
    assert "--parallel 3 -c 1536" in options and "-t 2 -tb 2" in options
    assert "-m x.gguf --host 127.0.0.1" in options


def test_logits_are_of_forced_tokens(tmp_path: Path) -> None:
    with start(fake_server(tmp_path)) as server:
        found = server.logits([3, 4], 2, 4)
    assert np.allclose(found, [[-0.5, 1.5, -0.5, -0.5], [-0.75, 1.25, -0.75, 0.25]], atol=1e-6)
    (body,) = asked(tmp_path, "requests")
    assert body["n_probs"] == 4 and body["n_predict"] == 2
    assert body["logit_bias"] == [[1, 1e6]]


@pytest.mark.parametrize(
    "body", ["found['completion_probabilities'].pop()", "rows[1]['top_logprobs'].pop()"]
)
def test_logits_that_lack_a_token_are_refused(tmp_path: Path, body: str) -> None:
    with (
        start(fake_server(tmp_path, body)) as server,
        pytest.raises(EngineError, match="every token"),
    ):
        server.logits([3, 4], 2, 4)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("found['tokens_predicted'] = 11", "and wrote 11 of 12 tokens"),
        ("found['timings']['prompt_n'] = 0", "ran 0 tokens of a prompt of 2"),
        ("return self.answer(400, {'error': 'too long'})", "it answered 400: .*too long"),
        ("found = 7", "its answer is not an object: 7"),
        ("import os; print('a fault', flush=True); os._exit(1)", "failed: .*it said: a fault"),
    ],
)
def test_a_request_that_fails_says_why_and_ends_the_server(
    tmp_path: Path, body: str, said: str
) -> None:
    with pytest.raises(EngineError, match=said), start(fake_server(tmp_path, body), 1) as server:
        server.together([[5, 6]], 12)
    assert not lives(server)


def test_a_server_that_does_not_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match="no program .*llama-server: run `make peers`"):
        start(tmp_path / "llama-server")
    with pytest.raises(EngineError, match="ended with code 1; it said: bad file"):
        start(fake_server(tmp_path, start='sys.exit("loading\\nbad file")'))
    monkeypatch.setattr("bench.cpu.llama_server.START", 0.3)
    keep = "import os, time; here.with_name('pid').write_text(str(os.getpid())); time.sleep(60)"
    with pytest.raises(EngineError, match="not ready after"):
        start(fake_server(tmp_path, start=keep))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.slow
@pytest.mark.skipif(not llama_build.built(), reason="`make peers` has not built llama.cpp here")
def test_the_real_server_runs_the_same_model(folder: Path) -> None:
    pytest.importorskip("gguf")
    file = gguf_file(folder, "BF16", llama_build.program("llama-quantize"))
    right = reference(folder, 1).centred()
    size = right.exact.shape[-1]
    program, name = llama_build.program("llama-server"), "llama-server BF16"
    with LlamaServer(program, file, 1, 4, 64, name) as server:
        assert right.wrong(name, server.logits(PROMPT, STEPS, size)) is None
        assert right.wrong(name, server.logits(PROMPT[1:], STEPS, size)) is not None
        assert server.together([PROMPT, PROMPT[5:], PROMPT[7:]], 6) > 0
