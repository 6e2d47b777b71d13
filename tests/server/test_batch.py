"""Batches: every request is answered once, with any interruptions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'server' is not installed")

from lfm2_fast.__main__ import main  # noqa: E402
from lfm2_fast.server.batch import Line, Output, Summary, lines_of, run_batch, shard_of  # noqa: E402
from lfm2_fast.server.run import create_app  # noqa: E402


def ask(id: Any, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    if url.endswith("completions") and "chat" not in url:
        body = {"prompt": "The csv module", "max_tokens": 4, **body}
    return {"custom_id": id, "method": "POST", "url": url, "body": body}


MESSAGES = [{"role": "user", "content": "Hello!"}]
LINES: list[Any] = [
    ask("a"),
    ask("b", "/v1/chat/completions", messages=MESSAGES, max_tokens=3),
    "{",
    ask("c", "/v1/responses", input="Hello!", max_output_tokens=3),
    ask("d", n=0),
    ask(5),
    ask("a"),
    ask("e", "/v1/files"),
    [1],
    ask("f", stream=True),
]


@pytest.fixture(scope="module")
def service(model) -> Iterator[Any]:
    app = create_app(model, max_rows=2, max_queue=None)
    yield app.state.service
    app.state.service.close()


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    file = tmp_path / "requests.jsonl"
    lines = [line if isinstance(line, str) else json.dumps(line) for line in LINES]
    file.write_text("\n".join([*lines[:3], "", *lines[3:]]))
    return file


def answered(service: Any, lines: Any, path: Path, **options: Any) -> Summary:
    output = Output(path)
    try:
        return asyncio.run(run_batch(service, iter(lines), output, at_once=3, **options))
    finally:
        output.close()


def told(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_line_has_an_answer_or_an_error(service, requests: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    summary = answered(service, lines_of(requests), path)
    assert (summary.answered, summary.failed, summary.kept) == (10, 6, 0)
    found = {line["custom_id"]: line for line in told(path) if line["response"] is not None}
    assert set(found) == {"a", "b", "c", "d", "f"}
    statuses = {id: line["response"]["status_code"] for id, line in found.items()}
    assert statuses == {"a": 200, "b": 200, "c": 200, "d": 400, "f": 200}
    body = found["a"]["response"]["body"]
    assert body["object"] == "text_completion" and body["usage"]["completion_tokens"] == 4
    assert found["f"]["response"]["body"]["choices"] == body["choices"]
    assert found["d"]["response"]["body"]["error"]["param"] == "n"
    wrong = {line["error"]["line"]: line["error"] for line in told(path) if line["error"]}
    assert {number: error["code"] for number, error in wrong.items()} == {
        3: "invalid_json",
        7: "invalid_value",
        8: "duplicate_custom_id",
        9: "invalid_value",
        10: "invalid_json",
    }
    assert summary.new_tokens >= 4 + 4 and summary.prompt_tokens > 10


def test_a_crash_loses_and_repeats_nothing(service, requests: Path, tmp_path: Path) -> None:
    """The crash comes after any number of lines, or in the middle of one."""
    whole = tmp_path / "whole.jsonl"
    answered(service, lines_of(requests), whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    for kept in range(0, len(lines), 3):
        path = tmp_path / f"cut-{kept}.jsonl"
        path.write_bytes(b"".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
        summary = answered(service, lines_of(requests), path)
        assert (summary.answered, summary.kept) == (len(lines) - kept, kept)
        keys = [(line["custom_id"], (line["error"] or {}).get("line")) for line in told(path)]
        assert len(set(keys)) == len(keys) == len(lines)
    again = answered(service, lines_of(requests), whole)
    assert (again.answered, again.kept) == (0, 10)


def test_an_interrupted_batch_continues(service, requests: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"

    def stop(summary: Summary) -> None:
        if summary.answered == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answered(service, lines_of(requests), path, progress=stop)
    assert len(told(path)) == 4
    assert answered(service, lines_of(requests), path).kept == 4
    assert len(told(path)) == 10


def test_an_id_of_half_a_character_is_answered_once(service, tmp_path: Path) -> None:
    requests, path = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_text(json.dumps(ask("\ud800")))
    assert answered(service, lines_of(requests), path).answered == 1
    assert answered(service, lines_of(requests), path).kept == 1


def test_shards_share_the_lines_out(requests: Path) -> None:
    numbers = [[line.number for line in lines_of(requests, (i, 3))] for i in (1, 2, 3)]
    assert numbers == [[1, 7, 10], [2, 5, 8, 11], [3, 6, 9]]
    assert sorted(sum(numbers, [])) == [line.number for line in lines_of(requests)]
    assert shard_of("2/3") == (2, 3)
    for text in ("", "3", "0/2", "3/2", "a/b", "-1/2", "1/2/3"):
        with pytest.raises(ValueError, match="--shard must be I/N"):
            shard_of(text)


def test_missing_files_are_errors_before_anything_is_loaded(tmp_path: Path, capsys) -> None:
    (tmp_path / "requests").write_text("{}")
    for requests, output, message in (
        ("nope", "answers", "REQUESTS: there is no file"),
        ("requests", "nope/answers", f"there is no folder {tmp_path / 'nope'}; create it first"),
        ("requests", ".", f"--output {tmp_path} is a folder: name a file in it"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["batch", "nowhere", str(tmp_path / requests), "--output", str(tmp_path / output)])
        err = capsys.readouterr().err
        assert ended.value.code == 2 and err.count("\n") == 1 and message in err


def test_one_process_writes_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = Output(path)
    with pytest.raises(ValueError, match="another process writes"):
        Output(path)
    first.close()
    Output(path).close()


def test_an_engine_that_ended_is_no_answer(model, tmp_path: Path) -> None:
    app = create_app(model, max_rows=2)
    app.state.service.close()
    from lfm2_fast.server.completions import completion

    line = Line(1, "a", completion, json.dumps({"prompt": "a"}).encode())
    with pytest.raises(Exception, match="the engine was closed"):
        answered(app.state.service, [line], tmp_path / "answers.jsonl")
    assert told(tmp_path / "answers.jsonl") == []
