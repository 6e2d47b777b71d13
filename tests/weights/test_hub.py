"""The hub path against a small server on loopback, in processes of their own.

The server speaks as much of the hub's protocol as a download needs: a repository's files at
``/OWNER/NAME/resolve/REVISION/FILE`` with the commit and an etag in the headers.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench.cpu.adapters import write_adapter
from lfm2_fast.config import Config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves ``files`` as org/model; cuts the connection midway for names in ``cut``, and answers
    those in ``busy`` with 429."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
        self.cut: set[str] = set()
        self.busy: set[str] = set()
        self.status: int | None = None
        self.error_code = ""
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[4:])
        known = parts[:3] == ["org", "model", "resolve"] and parts[3] in ("main", COMMIT)
        if parts[:4] == ["api", "models", "org", "model"]:
            files = [
                {"type": "file", "path": each, "size": 1, "oid": "0"} for each in self.server.files
            ]
            return self.send(json.dumps(files).encode(), body)
        if self.server.status is not None:
            return self.fail(self.server.status, self.server.error_code)
        if not known:
            return self.fail(404, "RevisionNotFound" if parts[1] == "model" else "RepoNotFound")
        if name in self.server.busy:
            return self.fail(429, "")
        if name not in self.server.files:
            return self.fail(404, "EntryNotFound")
        content = self.server.files[name]
        self.server.tokens.add(self.headers["Authorization"])
        if body:
            self.server.asked.append(name)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if not body:
            return
        if name in self.server.cut:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(content)

    def send(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(random_checkpoint) -> Iterator[Hub]:
    folder = random_checkpoint()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server = Hub({**files, "README.md": b"not needed", "pytorch_model.bin": b"not needed"})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


Load = Callable[..., subprocess.CompletedProcess[str]]

# Torch is imported once; each load is in a process of its own, where HF_ENDPOINT is read.
FORK = """
import json, os, signal, sys
import torch, lfm2_fast.hf.causal_lm
assert "huggingface_hub" not in sys.modules
for line in sys.stdin:
    environment, program, out, err = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(100)
        os.environ.clear()
        os.environ.update(environment)
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        exec(program)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def forks() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", FORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process


@pytest.fixture
def execute(
    forks: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program in a process of its own, which this returns when it has ended."""

    def execute(
        program: str, cache: Path, url: str, stderr: str | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        settings = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(cache), **env}
        for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"):
            if name not in env:
                settings.pop(name, None)
        said = tmp_path_factory.mktemp("said")
        out, err = said / "out", said / "err"
        assert forks.stdin and forks.stdout
        forks.stdin.write(json.dumps([settings, program, str(out), stderr or str(err)]) + "\n")
        forks.stdin.flush()
        status = int(forks.stdout.readline())
        texts = (path.read_text() if path.exists() else "" for path in (out, err))
        return subprocess.CompletedProcess(program, status, *texts)

    return execute


@pytest.fixture
def load(execute: Callable[..., subprocess.CompletedProcess[str]]) -> Load:
    """Load ``name`` in a process of its own."""

    def load(
        cache: Path,
        url: str,
        name: str = "org/model",
        extra: str = "",
        **options: str | None,
    ) -> subprocess.CompletedProcess[str]:
        program = f"""
import sys, time, lfm2_fast
time.sleep = lambda seconds: None  # the hub's client retries as it does, but without its pauses
try:
    model = lfm2_fast.load({name!r}, device="cpu", {extra})
except lfm2_fast.CheckpointError as error:
    sys.exit(f"CheckpointError: {{error}}")
print(model.num_parameters(), model.name_or_path)
"""
        return execute(program, cache, url, **options)

    return load


def test_only_what_is_needed_is_downloaded_once(hub: Hub, load: Load, tmp_path: Path) -> None:
    for _ in range(2):
        result = load(tmp_path, hub.url)
        assert result.returncode == 0, result.stderr
        assert result.stdout == "407200 org/model\n"
    assert sorted(hub.asked) == ["config.json", "generation_config.json", "model.safetensors"]
    hub.shutdown()
    hub.server_close()
    offline = load(tmp_path, hub.url, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    local = load(tmp_path, hub.url, extra="local_files_only=True")
    assert local.returncode == 0, local.stderr
    # A hub that cannot be reached is no reason to refuse what the cache holds.
    unreachable = load(tmp_path, hub.url)
    assert unreachable.returncode == 0, unreachable.stderr


def test_a_terminal_sees_a_progress_bar(hub: Hub, load: Load, tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    result = load(tmp_path, hub.url, stderr=os.ttyname(end))
    os.close(end)
    assert result.returncode == 0
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's end of file
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    assert b"model.safetensors" in shown and b"100%" in shown


def adapter_of(base: Path, folder: Path, seed: int) -> Path:
    """Write an adapter that names its base."""
    write_adapter(folder, Config.from_file(base / "config.json"), 4, seed, std=0.3)
    path = folder / "adapter_config.json"
    fields = {**json.loads(path.read_text()), "base_model_name_or_path": str(base)}
    path.write_text(json.dumps(fields))
    return folder


def test_an_adapter_on_the_hub(
    hub: Hub,
    execute: Callable[..., subprocess.CompletedProcess[str]],
    random_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """By itself, merged into its base, and beside it; from the cache once it was fetched."""
    base = random_checkpoint()
    folder, other = (adapter_of(base, tmp_path / str(seed), seed) for seed in range(2))
    hub.files = {each.name: each.read_bytes() for each in folder.iterdir()}
    hub.files["README.md"] = b"not needed"
    hub.files |= {f"inner/{each.name}": each.read_bytes() for each in other.iterdir()}
    program = f"""
import torch, lfm2_fast
ids, options = torch.tensor([[1, 5, 9]]), dict(device="cpu", dtype="float32", backend="eager")
model = lfm2_fast.load({str(base)!r}, **options)
plain, here = model(ids).logits, lfm2_fast.load({str(folder)!r}, **options)(ids).logits
alone = lfm2_fast.load("org/model", **options)(ids).logits
merged = lfm2_fast.load({str(base)!r}, adapter="org/model", **options)(ids).logits
place = dict(subfolder="inner", revision="{COMMIT}")
there = lfm2_fast.load({str(other)!r}, **options)(ids).logits
inner = lfm2_fast.load("org/model", adapter_kwargs=place, **options)(ids).logits
assert torch.equal(inner, there)
inner = lfm2_fast.load({str(base)!r}, adapter="org/model", adapter_kwargs=place, **options)
assert torch.equal(inner(ids).logits, there)
model.load_adapter("org/model", "inner", adapter_kwargs=place)
model.load_adapter("org/model")
distances = [(each - here).norm() / here.norm() for each in (model(ids).logits, plain)]
print(torch.equal(alone, here), torch.equal(merged, here), bool(distances[0] < 1e-5 < distances[1]))
"""
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        result = execute(program, tmp_path / "cache", hub.url, **env)
        assert result.stdout == "True True True\n", result.stderr
    files = ["adapter_config.json", "adapter_model.safetensors"]
    # The hub's cache has one copy of files that are equal, as the two configs are.
    assert sorted(hub.asked) == [*files, f"inner/{files[1]}"]


def test_an_adapter_with_a_config_on_the_hub(
    hub: Hub,
    execute: Callable[..., subprocess.CompletedProcess[str]],
    random_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The adapter counts, as with Hugging Face, and comes with the token that is given for it."""
    base = random_checkpoint()
    folder = adapter_of(base, tmp_path / "adapter", 0)
    hub.files |= {each.name: each.read_bytes() for each in folder.iterdir()}
    program = f"""
import torch, lfm2_fast
options = dict(device="cpu", dtype="float32", backend="eager", adapter_kwargs=dict(token="mine"))
models = [lfm2_fast.load(each, **options) for each in ({str(folder)!r}, "org/model")]
print(torch.equal(*(each(torch.tensor([[1, 5, 9]])).logits for each in models)))
"""
    result = execute(program, tmp_path / "cache", hub.url)
    assert result.stdout == "True\n", result.stderr
    assert sorted(hub.asked) == ["adapter_config.json", "adapter_model.safetensors", "config.json"]
    assert hub.tokens == {"Bearer mine"}


def test_the_given_cache_folder_is_used(hub: Hub, load: Load, tmp_path: Path) -> None:
    result = load(tmp_path / "home", hub.url, extra=f"cache_dir={str(tmp_path / 'mine')!r}")
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "mine").glob("models--org--model/snapshots/*/model.safetensors"))


def refused(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_a_config_that_does_not_fit_stops_before_the_weights(
    hub: Hub, load: Load, tmp_path: Path
) -> None:
    hub.files["config.json"] = b'{"model_type": "llama"}'
    assert "not an LFM2 checkpoint" in refused(load(tmp_path, hub.url))
    assert hub.asked == ["config.json"]


def test_missing_files_are_named(hub: Hub, load: Load, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    message = refused(load(tmp_path / "a", hub.url))
    assert "org/model has no model.safetensors in the hub" in message
    del hub.files["config.json"]
    message = refused(load(tmp_path / "b", hub.url))
    assert "org/model on the hub has no config.json and no GGUF file" in message


def test_a_missing_shard_is_named(hub: Hub, load: Load, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    hub.files["model.safetensors.index.json"] = b'{"weight_map": {"x": "model-1-of-2.safetensors"}}'
    message = refused(load(tmp_path, hub.url))
    assert "org/model has no model-1-of-2.safetensors in the hub" in message


def test_a_broken_index_is_named(hub: Hub, load: Load, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    hub.files["model.safetensors.index.json"] = b'{"weight_map": ["model-1-of-2.safetensors"]}'
    assert "index.json has no weight_map; replace it; force_download=True" in refused(
        load(tmp_path, hub.url)
    )


def test_a_cut_connection_is_named_and_goes_on_later(hub: Hub, load: Load, tmp_path: Path) -> None:
    hub.cut.add("model.safetensors")
    message = refused(load(tmp_path, hub.url))
    assert "could not download model.safetensors of org/model" in message
    assert "try again" in message
    hub.cut.clear()
    result = load(tmp_path, hub.url)
    assert result.returncode == 0, result.stderr


def test_a_file_that_the_hub_would_not_give_is_not_missing(
    hub: Hub, load: Load, tmp_path: Path
) -> None:
    """Without its generation config a model would not know its end tokens."""
    hub.busy.add("generation_config.json")
    message = refused(load(tmp_path, hub.url))
    assert "could not download generation_config.json of org/model" in message
    assert "429" in message and "try again" in message
    hub.busy.clear()
    assert load(tmp_path, hub.url).returncode == 0


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("org/other", "", "org/other is neither a folder here nor a model on the hub"),
        ("org/model", 'revision="v9"', "org/model at revision 'v9' does not exist on the hub"),
        ("org/mo del", "", "'org/mo del' is neither a folder here nor a hub id"),
    ],
)
def test_wrong_names_are_named(
    hub: Hub, load: Load, tmp_path: Path, name: str, extra: str, message: str
) -> None:
    assert message in refused(load(tmp_path, hub.url, name, extra))


def test_a_gated_model_says_what_to_do(hub: Hub, load: Load, tmp_path: Path) -> None:
    hub.status, hub.error_code = 403, "GatedRepo"
    assert "org/model is gated: accept its terms" in refused(load(tmp_path, hub.url))


def test_no_network_and_not_cached(load: Load, tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9"
    for result in (
        load(tmp_path, nobody),
        load(tmp_path, nobody, HF_HUB_OFFLINE="1"),
        load(tmp_path, nobody, extra="local_files_only=True"),
    ):
        message = refused(result)
        assert "config.json of org/model is not in the local cache" in message
        assert "connect once to download it, or give a folder" in message


def test_a_cache_without_markers_does_not_prove_that_files_are_absent(
    hub: Hub, load: Load, tmp_path: Path
) -> None:
    """Another client made the cache, and noted nowhere which files the repository does not have."""
    assert load(tmp_path, hub.url).returncode == 0
    (file,) = tmp_path.glob("hub/models--org--model/snapshots/*/generation_config.json")
    file.unlink()
    nobody = "http://127.0.0.1:9"
    message = refused(load(tmp_path, nobody))
    assert "generation_config.json of org/model" in message and "local_files_only" in message
    assert load(tmp_path, nobody, extra="local_files_only=True").returncode == 0


def test_weights_missing_in_the_cache_are_named_offline(
    hub: Hub, load: Load, tmp_path: Path
) -> None:
    hub.cut.add("model.safetensors")
    refused(load(tmp_path, hub.url))
    message = refused(load(tmp_path, hub.url, HF_HUB_OFFLINE="1"))
    assert "org/model has no model.safetensors in the local cache" in message
    assert "connect to the network once" in message


def test_the_command_line_loads_from_the_hub(
    hub: Hub, execute: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    hub.files = {path.name: path.read_bytes() for path in tiny.iterdir()}

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = f"""
import os, sys
from lfm2_fast.__main__ import main
sys.stdin = open(os.devnull)
main({list(arguments)!r})
"""
        return execute(program, tmp_path, hub.url)

    told = command("info", "org/model")
    assert "model.context: 2048\n" in told.stdout
    assert hub.asked == ["config.json", "generation_config.json"], "info fetches no weights"
    first = command("generate", "org/model", "Hello!", "--max-new-tokens", "4")
    assert first.returncode == 0, first.stderr
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(hub.asked)
    assert "README.md" not in hub.asked
    asked = len(hub.asked)
    options = ("--max-new-tokens", "4", "--local-files-only")
    again = command("generate", "org/model", "Hello!", *options)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert len(hub.asked) == asked


@pytest.fixture
def gguf_hub(hub: Hub, q4_0: Path) -> Hub:
    """A repository of GGUF files, one of them split, beside what is no model."""
    whole = q4_0.read_bytes()
    others = ("x-Q8_0.gguf", "mmproj-x-Q4_0.gguf", "BF16/x-BF16-00001-of-00002.gguf")
    hub.files = {"x-Q4_0.gguf": whole, **dict.fromkeys(others, b"GGUF"), "config.json": b"{}"}
    hub.files["BF16/x-BF16-00002-of-00002.gguf"] = b"GGUF, too"
    return hub


def test_a_gguf_type_is_named_behind_a_colon(gguf_hub: Hub, load: Load, tmp_path: Path) -> None:
    for name, extra in (("org/model:q4_0", ""), ("org/model", 'gguf_file="x-Q4_0.gguf"')):
        result = load(tmp_path, gguf_hub.url, name, extra)
        assert result.returncode == 0, result.stderr
        assert result.stdout.endswith(f" {name}\n")
    assert gguf_hub.asked == ["x-Q4_0.gguf"], "it is downloaded once, and nothing else"
    gguf_hub.shutdown()
    gguf_hub.server_close()
    unreachable = load(tmp_path, gguf_hub.url, "org/model:Q4_0")
    assert unreachable.returncode == 0, unreachable.stderr
    missing = refused(load(tmp_path / "b", gguf_hub.url, "org/model:Q4_0"))
    assert "list of files of org/model is not in the local cache and the hub cannot be" in missing


def test_a_gguf_file_is_chosen_or_the_names_are_listed(
    gguf_hub: Hub, load: Load, tmp_path: Path
) -> None:
    wrong = refused(load(tmp_path, gguf_hub.url, "org/model:Q6_K"))
    names = "BF16/x-BF16-00001-of-00002.gguf, x-Q4_0.gguf, x-Q8_0.gguf"
    assert f"org/model has no GGUF file of type 'Q6_K'; it has {names}" in wrong
    missing = refused(load(tmp_path, gguf_hub.url, extra='gguf_file="y.gguf"'))
    assert "org/model on the hub has no y.gguf; check gguf_file" in missing
    split = refused(load(tmp_path, gguf_hub.url, "org/model:BF16"))
    assert "x-BF16-00001-of-00002.gguf" in split and "truncated" in split
    assert gguf_hub.asked[-1] == "BF16/x-BF16-00002-of-00002.gguf", "all parts are there first"
    gguf_hub.files = {name: gguf_hub.files[name] for name in ("x-Q4_0.gguf", "mmproj-x-Q4_0.gguf")}
    gguf_hub.busy.add("x-Q4_0.gguf")
    message = refused(load(tmp_path, gguf_hub.url))
    assert "could not download x-Q4_0.gguf of org/model" in message and "429" in message
    gguf_hub.busy.clear()
    assert load(tmp_path, gguf_hub.url).returncode == 0, "the only one of a repository"
