"""``lfm2-fast batch --ray``: a worker or the driver dies, and every request has one answer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.cluster.simulated import eventually
from lfm2_fast.cluster.batch import run_batch_on_ray
from lfm2_fast.cluster.scale import Scale

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")

ROOT = Path(__file__).resolve().parents[3]
ROWS = 96


def asks(count: int, tokens: int) -> list[dict[str, Any]]:
    body = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    return [
        {"custom_id": f"r{i}", "url": "/v1/completions", "body": {**body, "prompt": f"{i} is"}}
        for i in range(count)
    ]


def command(source: Path, output: Path, *more: str) -> list[str]:
    call = [sys.executable, "-m", "lfm2_fast", "batch", "lfm2_fast/tiny", str(source)]
    call += ["--output", str(output), "--ray", "--replicas", "2", "--rows-per-block", "8"]
    return [*call, "--max-rows", "4", "--device", "cpu", "--memory", "64MB", *more]


def start(*call: Any, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(command(*call), cwd=ROOT, stdout=file, stderr=file)


def finished(process: subprocess.Popen[bytes], log: Path) -> str:
    code = process.wait(timeout=240)
    text = log.read_text(errors="replace")
    assert code == 0, text[-4000:]
    return text


def answers(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in output.glob("*.jsonl") for line in file.open()]


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Processes of a batch whose engines answer."""
    found = []
    for each in psutil.Process(process.pid).children(recursive=True):
        try:
            if "MapWorker" in " ".join(each.cmdline()):
                found.append(each)
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_killed_worker_and_a_killed_batch_lose_no_row_and_double_none(tmp_path: Path) -> None:
    source, output, log = tmp_path / "in.jsonl", tmp_path / "out", tmp_path / "log"
    lines = [json.dumps(each) for each in asks(ROWS, tokens=200)]
    lines.insert(5, "")
    lines.insert(9, "{")
    lines.append(json.dumps({"custom_id": "wrong", "url": "/v1/files", "body": {}}))
    lines.append(lines[0])
    source.write_text("\n".join(lines))

    process = start(source, output, log=log)
    eventually(lambda: len(answers(output)) >= 16 or process.poll() is not None, 200)
    (victim, *_) = workers(process)
    victim.kill()
    kept = len(answers(output))
    eventually(lambda: len(answers(output)) >= kept + 16 or process.poll() is not None, 200)
    # The whole run dies: the command, then Ray's processes, which belong to it.
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for each in family:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    kept = len({each["custom_id"] for each in answers(output)} - {None})
    assert 32 <= kept < ROWS

    text = finished(start(source, output, log=log), log)
    found = answers(output)
    ids = Counter(each["custom_id"] for each in found)
    # As in a batch without Ray, a line that is not a request has a number and no custom_id.
    assert ids == Counter([*(f"r{i}" for i in range(ROWS)), None, None, "r0"])
    faults = {each["error"]["line"]: each for each in found if each["error"]}
    assert {line: each["error"]["code"] for line, each in faults.items()} == {
        10: "invalid_json",
        len(lines) - 1: "invalid_value",
        len(lines): "duplicate_custom_id",
    }
    assert not any(each["response"] for each in faults.values())
    good = [each for each in found if not each["error"]]
    assert len(good) == ROWS and {each["response"]["status_code"] for each in good} == {200}
    assert "MapBatches(Answerer)" in text
    # Nothing is left to do: no file is added.
    files = sorted(output.iterdir())
    finished(start(source, output, log=log), log)
    assert sorted(output.iterdir()) == files


def test_tables_are_read_and_written(tmp_path: Path) -> None:
    import ray

    source, output = tmp_path / "in.parquet", tmp_path / "out"
    rows = [{**each, "body": json.dumps(each["body"])} for each in asks(12, tokens=4)]
    rows[3]["body"] = "{"
    rows.append({**rows[3], "custom_id": None})
    source.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), source / "1.parquet")
    # Ids that stand in the other file already, and bodies that are no texts.
    (body,) = (each["body"] for each in asks(1, tokens=4))
    more = [{"custom_id": id, "url": rows[0]["url"], "body": body} for id in ("r2", "r3", "last")]
    pq.write_table(pa.Table.from_pylist(more), source / "2.parquet")
    pq.write_table(pa.table({"body": ["{}"]}), tmp_path / "nameless.parquet")
    options = {"model": "lfm2_fast/tiny", "max_rows": 4, "device": "cpu", "memory": "64MB"}
    try:
        with pytest.raises(ValueError, match="nameless.parquet has no column custom_id"):
            run_batch_on_ray(f"{tmp_path}/nameless.parquet", str(output), options, Scale())
        run_batch_on_ray(str(source), str(output), options, Scale())
    finally:
        ray.shutdown()
    table = pa.concat_tables([pq.read_table(file) for file in output.glob("*.parquet")])
    found = {row["custom_id"]: row for row in table.to_pylist()}
    nameless = f"line 13 of {source / '1.parquet'}"
    again = [f"line {number} of {source / '2.parquet'}" for number in (1, 2)]
    assert found.keys() == {*(f"r{i}" for i in range(12)), nameless, *again, "last"}
    assert table.num_rows == 16
    assert found["r3"]["status"] is None and "body must be" in found["r3"]["answer"]
    assert found[nameless]["status"] is None and "custom_id must" in found[nameless]["answer"]
    for id in again:
        assert found[id]["status"] is None and "is in an earlier line too" in found[id]["answer"]
    for id in ("r2", "last"):
        told = json.loads(found[id]["answer"])
        assert found[id]["status"] == 200 and told["custom_id"] == id
        assert told["response"]["body"]["usage"]["completion_tokens"] == 4
