"""The command, signals, the page, and applications that people mount."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import lfm2_fast
from lfm2_fast.__main__ import main
from tests.server.conftest import EXTRA

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: Any) -> subprocess.Popen[str]:
    call = [sys.executable, "-m", "lfm2_fast", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(call, cwd=ROOT, text=True, stdout=pipe, stderr=pipe)


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_lets_running_requests_end(serving, tiny: Path, sign: int, code: int) -> None:
    from tests.server.conftest import Client

    with command("serve", tiny, "--port", 0, "--dtype", "float32", "--device", "cpu") as process:
        assert process.stdout is not None
        ready = re.fullmatch(r"ready at (http://127\.0\.0\.1:\d+)\n", process.stdout.readline())
        assert ready is not None
        client = Client.__new__(Client)
        client.host = ready[1].removeprefix("http://")
        fields = {"prompt": "To create", "max_tokens": 300, "ignore_eos": True, "stream": True}
        fields["stream_options"] = {"include_usage": True}
        response = client.send("/v1/completions", fields)
        assert response.readline().startswith(b"data: ")
        process.send_signal(sign)
        rest = response.read().decode()
        out, err = process.communicate(timeout=60)
    # Of a busy machine an event may have several tokens.
    assert rest.endswith("data: [DONE]\n\n") and '"completion_tokens":300' in rest
    assert process.returncode == code and out == "" and "Traceback" not in err
    assert re.search(r'127\.0\.0\.1 "POST /v1/completions" 200 req-\w+ [\d.]+s', err), err


def test_requests_that_outlast_the_drain_get_an_error(serving, model) -> None:
    """A stream by an event, others by their status; none ends as if it were whole."""
    client = serving(model, max_rows=2, drain=0)
    long = {"prompt": "To create", "max_tokens": 2000, "ignore_eos": True}
    stream = client.send("/v1/completions", {**long, "stream": True})
    assert stream.readline().startswith(b"data: ")
    found: list[Any] = []
    whole = threading.Thread(target=lambda: found.append(client("/v1/completions", long)))
    whole.start()
    while client.service.engine.engine.statistics.running < 2:
        time.sleep(0.005)
    client.server.close()
    whole.join()
    client.refused(found[0], None, "engine_stopped", 503)
    events = [line for line in stream.read().decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2][6:])["error"]["code"] == "engine_stopped"


def test_a_port_in_use_is_an_error_before_anything_is_loaded(client, capsys) -> None:
    port = client.host.split(":")[1]
    with pytest.raises(SystemExit) as ended:
        main(["serve", "nowhere/at-all", "--port", port])
    assert ended.value.code == 2
    assert f"cannot serve on 127.0.0.1 port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        (["--tensor-parallel-size", "2"], "one for each device"),
        (["--context-shift"], "drops the middle"),
        (["--embeddings"], "sentence-transformers"),
    ],
    ids=str,
)
def test_options_of_other_servers_are_refused_by_name(capsys, option: Any, advice: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "nowhere", *option])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and f"{option[0]} is not supported" in err and advice in err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--memory", "500%"], "at most '100%' of the free memory, got '500%'"),
        (["--memory", "5XB"], "memory must be bytes, or like '8GB', '500MB' or"),
        (["--served-model-name", ""], "served_model_name is an empty text: give a name"),
        (["--api-key", ""], "api_key is an empty text, which anyone can send"),
        (["--preset", "nope"], "there is no preset 'nope'; choose one of"),
        (["--chat-template", "nope"], "--chat-template nope cannot be read: No such file"),
    ],
    ids=str,
)
def test_wrong_settings_are_errors_before_anything_is_loaded(
    capsys, option: list[str], message: str
) -> None:
    pytest.importorskip("fastapi", reason=EXTRA)
    for place in (["--port", "0"], ["--ray-address", "auto"]):
        with pytest.raises(SystemExit) as ended:
            main(["serve", "nowhere/at-all", *place, *option])
        err = capsys.readouterr().err
        assert ended.value.code == 2 and err.startswith("lfm2-fast: ") and message in err


def test_adapters_are_named_with_their_paths(capsys) -> None:
    pytest.importorskip("fastapi", reason=EXTRA)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "nowhere", "--adapter", "x"])
    assert ended.value.code == 2 and "--adapter 'x' is not NAME=PATH" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["serve", "nowhere", "--adapter", "x=a", "--adapter", "x=b"])
    assert ended.value.code == 2 and "--adapter x= is given twice" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["fastapi", "prometheus_client", "uvicorn"])
def test_without_the_extra_the_error_has_the_remedy(
    missing: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for name in (["serve", "x"], ["batch", "x", "y", "--output", "z"]):
        with pytest.raises(SystemExit):
            main(name)
        assert "pip install 'lfm2-fast[server]'" in capsys.readouterr().err
    with pytest.raises(ImportError, match="lfm2-fast.server."):
        lfm2_fast.serve("x")


def test_an_empty_key_is_refused(model) -> None:
    pytest.importorskip("fastapi", reason=EXTRA)
    for keys in ("", ["a", ""]):
        with pytest.raises(ValueError, match="api_key is an empty text"):
            lfm2_fast.serve(model, port=0, background=True, api_key=keys)


def test_a_chat_template_that_cannot_be_parsed_is_an_error_at_the_start(model) -> None:
    pytest.importorskip("fastapi", reason=EXTRA)
    from lfm2_fast.server.run import create_app

    with pytest.raises(ValueError, match="chat_template has a fault in line 2: .*; mend it"):
        create_app(model, chat_template="{{ messages }}\n{% if %}")
    # A fault that depends on the messages is an answer to them.
    app = create_app(model, max_rows=1, chat_template="{{ 1 + messages }}")
    app.state.service.close()


def test_an_application_can_be_mounted(client, model) -> None:
    fastapi = pytest.importorskip("fastapi", reason=EXTRA)
    from lfm2_fast.server.run import RunningServer, bound_socket, create_app
    from tests.server.conftest import Client

    inner = create_app(model, max_rows=1, served_model_name=["one", "two"])
    outer = fastapi.FastAPI()
    outer.mount("/llm", inner)
    outer.state.service = inner.state.service
    with RunningServer(outer, bound_socket("127.0.0.1", 0)) as server:
        mounted = Client(server)
        assert [each["id"] for each in mounted("/llm/v1/models").body["data"]] == ["one", "two"]
        fields = {"prompt": "a", "model": "two", "max_tokens": 2}
        assert mounted("/llm/v1/completions", fields).body["model"] == "one"
        assert mounted("/llm/").status == 200
    inner.state.service.close()
    assert not [t for t in threading.enumerate() if t is inner.state.service.engine._thread]


def test_the_tokenizer_is_of_the_revision_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason=EXTRA)
    from lfm2_fast.server import run

    class Asked(Exception):
        pass

    def asked(name: str, **options: object) -> None:
        raise Asked(name, options)

    monkeypatch.setattr(run, "load_tokenizer", asked)
    given = {"revision": "old", "local_files_only": True}
    with pytest.raises(Asked) as found:
        run.create_app("owner/name", dtype="float32", **given)
    assert found.value.args == ("owner/name", given)


def test_a_template_of_the_callers_own(serving, model) -> None:
    tokenizer = lfm2_fast.text.tokenizer.load_tokenizer(str(model.name_or_path))
    client = serving(
        model, max_rows=1, tokenizer=tokenizer, chat_template="{{ messages[0].oops.x }}"
    )
    message = client.refused(client.chat(), "messages", "invalid_value")
    assert "the chat template refuses these messages" in message


def test_a_template_is_shown_as_a_chat_gets_it(serving, model) -> None:
    """A field that chats turn into a variable of the template is one here too."""
    client = serving(model, max_rows=1, chat_template="{{ reasoning_effort }}")
    fields = {"messages": [{"role": "user", "content": "a"}], "reasoning_effort": "low"}
    assert client("/apply-template", fields).body["prompt"] == "low"
    assert client("/v1/chat/completions", {**fields, "max_tokens": 1}).status == 200


def test_the_page_loads_nothing_from_elsewhere(client, serving, model) -> None:
    answer = client("/")
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)|https?://|@import", answer.body)
    assert serving(model, max_rows=1, page=False)("/").status == 404


def test_the_document_describes_every_endpoint(client) -> None:
    document = client("/openapi.json").body
    held = document["components"]["schemas"]
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert "default" in operation["responses"] or path == "/metrics", (method, path)
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert names <= held.keys() and {"ChatBody", "StreamOptions", "Error"} <= names


def test_batch_answers_a_file(tiny: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("fastapi", reason=EXTRA)
    requests, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": "The csv module", "max_tokens": 3}
    asks = [{"custom_id": str(i), "url": "/v1/completions", "body": body} for i in range(3)]
    requests.write_text("\n".join(map(json.dumps, asks)))
    call = ["batch", str(tiny), str(requests), "--output", str(output), "--device", "cpu"]
    for answered, kept in ((3, 0), (0, 3)):
        with pytest.raises(SystemExit) as ended:
            main(call)
        err = capsys.readouterr().err
        assert not ended.value.code
        assert f"{answered} answered" in err and f"{kept} were there before" in err
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(line["custom_id"] for line in lines) == ["0", "1", "2"]
