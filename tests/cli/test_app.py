"""The commands as people and programs run them: text, notes, errors, terminals, pipes, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import lfm2_fast
from bench.cpu.adapters import write_adapter
from lfm2_fast.__main__ import main
from lfm2_fast.cache.page_memory import PAGE_SIZE

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "lfm2_fast")
LONG = ("--max-new-tokens", "2000")


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process, with stdin a pipe."""

    def command(*arguments: str | Path, stdin: str | io.TextIOWrapper = "") -> Result:
        stream = io.StringIO(stdin) if isinstance(stdin, str) else stdin
        monkeypatch.setattr("sys.stdin", stream)
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int | None)
        return Result(ended.value.code or 0, out, err)

    return command


@pytest.fixture(scope="module")
def endless(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint without end tokens."""
    folder = tmp_path_factory.mktemp("endless")
    for file in tiny.iterdir():
        if file.suffix in (".json", ".jinja", ".safetensors"):
            shutil.copy(file, folder)
    for name in ("config.json", "generation_config.json"):
        stored = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**stored, "eos_token_id": 5}))
    return folder


@pytest.fixture(scope="module")
def bare(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint without its chat template."""
    folder = tmp_path_factory.mktemp("bare")
    for file in tiny.iterdir():
        if file.suffix in (".json", ".safetensors"):
            shutil.copy(file, folder)
    return folder


def screen(*arguments: str | Path, **env: str) -> Any:
    """A command in a terminal, as the documentation is recorded."""
    terminal = runpy.run_path(str(ROOT / "docs" / "record.py"))["Terminal"]
    return terminal(*COMMAND, *map(str, arguments), **env)


def test_help_is_quick_and_names_every_command() -> None:
    begun = time.perf_counter()
    done = subprocess.run([*COMMAND, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert time.perf_counter() - begun < 2  # 0.2 on an idle core
    assert done.returncode == 0 and not done.stderr
    assert {"generate", "chat", "info", "bench", "serve", "batch", "demo"} <= set(
        done.stdout.split()
    )


def test_help_and_version(run: Run) -> None:
    assert run() == run("--help")
    assert run("export") == run("export", "--help")
    assert run("--version") == Result(0, f"lfm2-fast {lfm2_fast.__version__}\n", "")
    for command in ("generate", "chat", "info", "bench", "serve", "batch", "demo"):
        assert run(command, "--help").out.startswith(f"Usage: lfm2-fast {command}")


def test_generate_answers(run: Run, tiny: Path) -> None:
    code, out, err = run("generate", tiny, "What is a generator?")
    assert code == 0
    assert out.endswith("\n") and out.strip() and "<|" not in out
    loading, summary, sampling, timing = err.splitlines()
    assert loading == f"loading {tiny}"
    assert re.fullmatch(r"[\d.]+ million parameters in bfloat16, on \S+ with backend \w+", summary)
    assert sampling == "sampling: greedy (no preset fits the name)"
    assert re.fullmatch(r"first token after [\d.]+ s, \d+ tokens at [\d.]+ tokens/s", timing)


def test_generate_is_models_generate(run: Run, tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = lfm2_fast.load(tiny, dtype="float32")
    ids = tokenizer("The first argument", return_tensors="pt").input_ids
    wanted = {"do_sample": True, "temperature": 0.8, "top_k": 30, "repetition_penalty": 1.1}
    import torch

    torch.manual_seed(4)
    expected = model.generate(ids, max_new_tokens=12, **wanted)[0, ids.shape[1] :]
    options = "--raw --do-sample --temperature 0.8 --top-k 30 --repetition-penalty 1.1 --seed 4"
    more = "--max-new-tokens 12 --dtype float32"
    out = run("generate", tiny, "The first argument", *options.split(), *more.split()).out
    assert out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def test_an_adapter_is_merged(run: Run, tiny: Path, tmp_path: Path) -> None:
    config = lfm2_fast.Config.from_file(tiny / "config.json")
    path = write_adapter(tmp_path / "adapter", config, 4, 1, std=0.15)
    ask = ("generate", tiny, "The server", "--raw", "--greedy", "--max-new-tokens", "8")
    plain, changed = run(*ask), run(*ask, "--adapter", path)
    assert plain.code == changed.code == 0 and plain.out != changed.out
    merged = tmp_path / "merged"
    model = lfm2_fast.load(tiny, device="cpu", adapter=path)
    model.save_pretrained(merged)
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, merged)
    assert run("generate", merged, *ask[2:]).out == changed.out


def test_prompts_come_from_anywhere(run: Run, tiny: Path, tmp_path: Path) -> None:
    expected = run("generate", tiny, "What is a list?").out
    (tmp_path / "prompt.txt").write_text("What is a list?\n")
    assert run("generate", tiny, "--file", tmp_path / "prompt.txt").out == expected
    assert run("generate", tiny, stdin="What is a list?\n").out == expected
    assert run("generate", tiny, "-", stdin="What is a list?").out == expected
    assert run("generate", tiny, "What is a list?", stdin="not read").out == expected


def test_system_stop_and_the_templates_absence(run: Run, tiny: Path) -> None:
    plain = run("generate", tiny, "What is a list?").out
    assert run("generate", tiny, "What is a list?", "--raw").out != plain
    word = plain.split()[1]
    stopped = run("generate", tiny, "What is a list?", "--stop", word).out
    assert plain.startswith(stopped.strip()) and stopped.strip().endswith(word)
    cut = run("generate", tiny, "What is a list?", "--max-new-tokens", "2")
    assert cut.err.endswith("; cut at 2 tokens\n")


def test_presets_are_shown_and_overridable(run: Run, tiny: Path) -> None:
    err = run("generate", tiny, "Hello", "--preset", "lfm2", "--min-p", "0.2").err
    assert "\nsampling: temperature 0.3, min_p 0.2, repetition_penalty 1.05 (preset lfm2; " in err


ERRORS: dict[str, tuple[str, str]] = {
    "no-folder": ("generate nope hi", "there is no folder 'nope'; give a checkpoint folder or"),
    "no-checkpoint": ("generate tests hi", "tests/config.json does not exist;"),
    "no-template": ("generate BARE hi --chat", "has no chat template; it can continue text"),
    "system": ("generate BARE hi --system x", "has no chat template; it can continue text"),
    "no-template-to-chat": ("chat BARE", "has no chat template; it can continue text"),
    "no-tokenizer": ("generate RANDOM hi", "has no tokenizer.json;"),
    "temperature": ("generate TINY hi --temperature -1", "temperature must be above 0, got -1.0"),
    "top-p": ("generate TINY hi --top-p 1.5", "top_p must be from 0 to 1, got 1.5"),
    "contradiction": ("generate TINY hi --greedy --top-k 3", "top_k has no effect on greedy"),
    "preset": ("chat TINY --preset x", "there is no preset 'x'; choose one of lfm2, "),
    "device": ("generate TINY hi --device tpu", "device='tpu' is not a device; use 'auto'"),
    "dtype": ("generate TINY hi --dtype int8", "dtype='int8' is not supported; use 'auto'"),
    "backend": ("generate TINY hi --backend x", "backend='x' is not in this version"),
    "device-first": ("generate nope hi --device tpu", "device='tpu' is not a device"),
    "dtype-first": ("eval nope --text README.md --dtype int8", "dtype='int8' is not supported"),
    "backend-first": ("generate nope hi --backend x", "backend='x' is not in this version"),
    "reference-first": (
        "eval nope --text README.md --reference int8",
        "--reference: dtype='int8' is not supported",
    ),
    "max-length": ("generate TINY hi --max-length 3", "tokens fill the context of 3"),
    "raw-system": ("generate TINY hi --raw --system x", "--system needs the chat template"),
    "two-prompts": ("generate TINY hi --file x", "give the prompt as an argument or with --file"),
    "no-file": ("generate TINY --file nope.txt", "--file nope.txt cannot be read: No such file"),
    "folder-as-text": ("eval TINY --text tests", "--text tests cannot be read: Is a directory;"),
    "no-folder-to-write": (
        "export gguf TINY nope/x",
        "FILE nope/x: there is no folder nope;",
    ),
    "binary-file": ("generate TINY --file TINY/model.safetensors", "is not UTF-8 text"),
    "empty-prompt": ("generate TINY", "the prompt is empty"),
    "option": ("generate TINY hi --beams 3", "No such option: --beams (see lfm2-fast generate --"),
    "command": ("generat", "No such command 'generat'"),
    "argument": ("generate", "Missing argument 'MODEL'"),
    "info": ("info nope", "there is no folder 'nope'"),
    "not-offered": ("export executorch TINY x.pte", "executorch is not offered: its program"),
    "info-device": ("info --device cuda:99", "device='cuda:99' is not available"),
}


@pytest.mark.parametrize(("command", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_are_one_line_and_code_2(
    run: Run,
    tiny: Path,
    bare: Path,
    random_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    message: str,
) -> None:
    monkeypatch.chdir(ROOT)
    if "RANDOM" in command:
        command = command.replace("RANDOM", str(random_checkpoint()))
        capsys.readouterr()  # what writing it has shown
    command = command.replace("TINY", str(tiny)).replace("BARE", str(bare))
    code, out, err = run(*command.split())
    *notes, error = err.splitlines()
    assert (code, out) == (2, "")
    assert error.startswith("lfm2-fast: ") and message in error
    assert len(notes) in (0, 1, 3), "an error is one line after those that tell what is loaded"


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("generate", "--max-new-tokens", "0"),
        ("generate", "--top-k", "many"),
        ("chat", "--seed", str(2**63)),
        ("demo", "--seed", str(2**63)),
        ("serve", "--max-rows", "-1"),
        ("serve", "--port", "99999"),
    ],
)
def test_a_refused_value_is_in_the_error(run: Run, command: str, option: str, value: str) -> None:
    code, out, err = run(command, "MODEL", option, value)
    assert (code, out) == (2, "")
    assert f"'{option}'" in err and value in err and f"(see lfm2-fast {command} --help)" in err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate BARE hi --chat", "has no chat template"),
        ("generate BARE hi --system x", "has no chat template"),
        ("chat BARE", "has no chat template"),
        ("chat RANDOM", "has no tokenizer.json"),
        ("eval RANDOM --text README.md", "has no tokenizer.json"),
    ],
)
def test_a_missing_tokenizer_or_template_is_an_error_before_the_weights_are_loaded(
    run: Run,
    bare: Path,
    random_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    message: str,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("lfm2_fast.weights.checkpoint.load_weights", fail)
    command = command.replace("BARE", str(bare)).replace("RANDOM", str(random_checkpoint()))
    capsys.readouterr()  # what writing it has shown
    code, _, err = run(*command.split())
    assert code == 2 and message in err


NO_TOKEN = "lfm2-fast: row 0 has no token to choose as its new token "


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate BROKEN hi", f"{NO_TOKEN}1, at position "),
        ("generate BROKEN hi --raw --do-sample", f"{NO_TOKEN}1, at position "),
        ("generate BROKEN hi --stop x", f"{NO_TOKEN}1, at position "),
        ("chat BROKEN", f"{NO_TOKEN}1, at position "),
        ("bench BROKEN --prompt 8 --output 2 --batch 1 --rounds 1", NO_TOKEN),
        ("eval BROKEN --text README.md --window 64", "over tokens 0 to 63 of the text is nan: "),
    ],
)
def test_nan_logits_are_an_error(
    run: Run, breaking: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, command, message
) -> None:
    monkeypatch.chdir(ROOT)
    command = command.replace("BROKEN", str(breaking(slice(None))))
    code, out, err = run(*command.split(), stdin="What is a list?\n")
    assert (code, out) == (2, "")
    error = err.splitlines()[-1]
    assert message in error and error.startswith("lfm2-fast: ") and "--traceback" not in error


@pytest.mark.parametrize("way", ["--chat", "--raw", "--chat --do-sample --top-k 1"])
def test_text_before_an_error_keeps_its_line(
    run: Run, tiny: Path, breaking: Callable[..., Path], way: str
) -> None:
    from transformers import AutoTokenizer

    prompt = "The with statement" if way == "--raw" else "What is a list?"
    call = (prompt, "--max-new-tokens", "12", "--dtype", "float32", *way.split())
    whole = run("generate", tiny, *call).out
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    token = next(i for i in ids[2:-2] if ids.count(i) == 1)
    code, out, err = run("generate", breaking(token), *call)
    assert code == 2 and NO_TOKEN in err.splitlines()[-1]
    assert out.endswith("\n") and len(out) > 3 and whole.startswith(out[:-1])


def test_unexpected_errors_are_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("lfm2_fast.cli.environment.machine_facts", fail)
    error = "lfm2-fast: KeyError: 'lost' (lfm2-fast --traceback ... shows where)\n"
    assert run("info") == Result(2, "", error)
    with pytest.raises(KeyError):
        main(["--traceback", "info"])


def test_chat_in_a_pipe(run: Run, tiny: Path) -> None:
    lines = "What is a list?\n\nWhat is a list?\n/exit\nnot read\n"
    code, out, err = run("chat", tiny, "--system", "Be brief.", stdin=lines)
    assert code == 0
    assert len(out.splitlines()) == 2
    assert err.count("first token after") == 2 and "prompt tokens kept" in err
    code, _, err = run("chat", tiny, "--max-length", "30", stdin="What is a list?\n" * 9)
    assert code == 2 and "tokens fill the context of 30" in err


def test_info(run: Run, tiny: Path) -> None:
    facts = json.loads(run("info", "--json", tiny).out)
    assert list(facts) == ["versions", "device", "operations", "backends", "model"]
    model = lfm2_fast.load(tiny)
    assert facts["device"]["backend"] == model.ops.name
    assert model.ops.name in facts["operations"].values()
    assert facts["backends"]["eager"] == "yes"
    assert facts["model"]["parameters"] == model.num_parameters()
    cache = lfm2_fast.Cache(model.config, 1, 1, device="cpu", dtype=model.dtype)
    page = cache.pool.memory.page_bytes
    assert facts["model"]["cache_bytes_per_token"] == page / PAGE_SIZE
    lines = run("info", tiny).out.splitlines()
    assert len(lines) == sum(map(len, facts.values()))
    assert f"versions.lfm2_fast: {lfm2_fast.__version__}" in lines
    eager = json.loads(run("info", "--json", "--backend", "eager", "--device", "cpu").out)
    assert set(eager["operations"].values()) == {"eager"}


def test_info_says_why_no_faster_body_runs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2_fast.ops.native_library._why_not", "there is no extension; build it")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    facts = json.loads(run("info", "--json", "--device", "cpu").out)
    assert facts["backends"]["native"] == "no: there is no extension; build it"
    assert facts["backends"]["triton"].startswith("no: Triton runs on GPUs")
    assert set(facts["operations"].values()) == {"eager"}


def test_info_says_that_the_extension_was_built_slow(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lfm2_fast.ops.native_library.why_slow", lambda device: "for the oldest; rebuild"
    )
    facts = json.loads(run("info", "--json", "--device", "cpu").out)
    assert facts["backends"]["native"] == "yes, but slowly: for the oldest; rebuild"


def test_demo(run: Run) -> None:
    code, out, err = run("demo", "The with statement", "--max-new-tokens", "10")
    assert code == 0
    assert out.startswith("The with statement") and len(out) > 30
    assert err.startswith("A small LFM2") and "tokens/s" in err and "To talk with it: " in err
    assert run("demo").out == run("demo", "--seed", "0").out != run("demo", "--seed", "1").out


@pytest.mark.slow
def test_a_conversation_on_a_terminal(endless: Path) -> None:
    terminal = screen("chat", endless)

    def prompt(text: str) -> bool:
        return text.endswith("\n> ")

    assert "/help lists commands, /exit leaves" in terminal.wait_for(prompt)
    for question in ("What is a list?", "And an index\\\nof it?"):
        terminal.type(f"{question}\n")
        terminal.wait_for(lambda text: len(text) > 80)
        terminal.type("\x03")
        assert "stopped" in terminal.wait_for(prompt)
    assert "prompt tokens kept; stopped" in terminal.text

    def interrupt(typed: str, seen: Callable[[str], bool]) -> None:
        terminal.type(typed)
        terminal.wait_for(lambda text: text.endswith(typed[-4:]))
        for _ in range(10):
            # Between what it shows and its wait for more, input() does not see a signal.
            terminal.type("\x03")
            with suppress(TimeoutError):
                terminal.wait_for(seen, seconds=3)
                return
        raise TimeoutError(f"Ctrl-C did nothing; the terminal shows {terminal.text!r}")

    interrupt("never min\x7f\x7f\x7f\x7fsent", lambda text: "Ctrl-C again" in text and prompt(text))
    terminal.type("/help\n")
    assert "start again" in terminal.wait_for(prompt)
    interrupt("once", prompt)
    with pytest.raises(EOFError):
        interrupt("more", lambda text: False)
    assert terminal.close() == 0
    assert "Traceback" not in terminal.text


@pytest.mark.slow
def test_end_of_input_leaves_a_dumb_terminal(tiny: Path) -> None:
    terminal = screen("chat", tiny, TERM="dumb", NO_COLOR="1")
    terminal.wait_for(lambda text: text.endswith("\n> "))
    terminal.type("What is a list?\n")
    terminal.wait_for(lambda text: text.endswith("\n> "))
    terminal.type("\x04")
    assert terminal.close() == 0
    assert "first token after" in terminal.text


def test_a_prompt_is_wanted_on_a_terminal(tiny: Path) -> None:
    terminal = screen("generate", tiny)
    assert terminal.close() == 2
    assert terminal.text.startswith("lfm2-fast: there is no prompt: give it as an argument")


def test_the_documentation_is_recorded_and_its_options_exist(run: Run, tmp_path: Path) -> None:
    record = runpy.run_path(str(ROOT / "docs" / "record.py"))
    block = "$ printf 'hi\\n> '; read x; echo got $x\n> old\nstale\n$ echo  two\n"
    expected = "$ printf 'hi\\n> '; read x; echo got $x\nhi\n> old\ngot old\n$ echo  two\ntwo\n"
    gone = "$ printf 'a\\nbar 1\\r\\033[2Kbar 2\\n\\033[1A\\033[2Kb\\n'\n"
    block, expected = f"{block}{gone}", f"{expected}{gone}a\nb\n"
    assert record["console"](block, os.environ["PATH"]) == expected
    assert record["python"](["x = 1", "print(x)"]) == ["\n", "1\n"]
    page = tmp_path / "page.md"
    for shown, left in (("", ""), ("\n\n```text\nstale\n```", "\n\n```text\nnew\n```")):
        code = "```python\nprint('new')\n```" if shown else "```python\nunknown\n```"
        page.write_text(f"{code}{shown}\n")
        record["record"](page, os.environ["PATH"])
        assert page.read_text() == f"{code}{left}\n"
    commands = ("generate", "chat", "info", "eval", "bench", "serve", "batch", "demo")
    options = "\n".join(run(name, "--help").out for name in commands)
    options += run("export", "gguf", "--help").out
    for page in (ROOT / "docs" / "usage").glob("*.md"):
        mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text()))
        assert {option for option in mentioned if f"{option} " not in options} <= {"--traceback"}


def start(*arguments: str | Path, **kwargs: Any) -> subprocess.Popen[str]:
    command = [*COMMAND, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=pipe, stderr=pipe, **kwargs)


@pytest.mark.slow
def test_interrupt_ends_generate(endless: Path) -> None:
    with start("generate", endless, "What is a list?", *LONG) as process:
        assert process.stdout is not None
        first = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(first + rest) < 2000 and rest.endswith("\n")
    assert err.endswith("; stopped\n") and "Traceback" not in err


@pytest.mark.slow
def test_interrupt_ends_chat_in_a_pipe(endless: Path) -> None:
    with start("chat", endless, *LONG, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("What is a list?\n" * 3)
        process.stdin.close()
        process.stdin = None
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130 and rest.endswith("\n")
    # One message is answered. Its text may have several lines.
    assert err.count("first token after") == 1
    assert err.endswith("; stopped\n") and "Traceback" not in err


@pytest.mark.slow
def test_a_reader_that_leaves_ends_generate(endless: Path) -> None:
    with start("generate", endless, "What is a list?", *LONG) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(20)
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in err and "Broken" not in err


@pytest.mark.parametrize(
    ("redirection", "code"),
    [("> /dev/full", 2), (">&-", 0), ("2>&-", 0), ("< /dev/null", 0), ("<&-", 0), ("| true", 0)],
)
def test_odd_streams(redirection: str, code: int) -> None:
    command = f'"{sys.executable}" -m lfm2_fast --version {redirection}'
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert "Exception" not in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (code == 2)


BAD = b"caf\xe9"


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_in_a_pipe_that_are_not_utf_8(
    run: Run, tiny: Path, command: str, errors: str
) -> None:
    call = (command, tiny, "--max-new-tokens", "8")
    stream = io.TextIOWrapper(io.BytesIO(BAD), "utf-8", errors)
    code, out, err = run(*call, stdin=stream)
    assert code == 0, err
    assert out == run(*call, stdin="caf\ufffd").out


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (["generate", "TINY", BAD], "'[PROMPT]'"),
        (["generate", "TINY", "x", "--system", BAD], "'--system'"),
        (["generate", "TINY", "x", "--stop", "a", "--stop", BAD], "'--stop'"),
        (["chat", "TINY", "--system", BAD], "'--system'"),
        (["demo", BAD], "'[PROMPT]'"),
    ],
)
def test_bytes_in_an_argument_that_are_not_utf_8(
    run: Run, tiny: Path, arguments: list[str | bytes], where: str
) -> None:
    given = [os.fsdecode(argument).replace("TINY", str(tiny)) for argument in arguments]
    code, out, err = run(*given)
    assert (code, out) == (2, "")
    assert err.startswith(f"lfm2-fast: Invalid value for {where}: it is not UTF-8 text (see lfm2-")
    assert err.count("\n") == 1, "nothing was loaded"


def test_an_ascii_terminal() -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with start("na\u00efve", env=env) as process:
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert err.startswith("lfm2-fast: No such command 'na?ve'.")
