"""``lfm2-fast serve --replicas``, as a person runs it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.conftest import Client

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def served(tiny: Path, tmp_path: Path):
    command = [sys.executable, "-m", "lfm2_fast", "serve", str(tiny), "--port", "0"]
    command += ["--replicas", "2", "--device", "cpu", "--dtype", "float32", "--memory", "64MB"]
    command += ["--api-key", "secret", "--max-body", "100000", "--max-rows", "4"]
    pipe = subprocess.PIPE
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=pipe, stderr=log)
        try:
            assert process.stdout is not None
            ready = next((line for line in process.stdout if line.startswith("ready at")), None)
            log.seek(0)
            assert ready is not None, log.read()[-3000:]
            client = Client.__new__(Client)
            client.host = re.search(r"http://([\d.:]+)", ready)[1]
            yield process, client
        finally:
            process.terminate()
            process.communicate(timeout=120)


def test_one_address_serves_the_whole_application_until_a_signal(served) -> None:
    process, client = served
    key = {"Authorization": "Bearer secret"}
    assert client("/health").body == {"status": "ok"}
    client.refused(client("/v1/models"), None, "invalid_api_key", 401)
    large = {"prompt": "x" * 200_000}
    client.refused(client("/v1/completions", large), None, "invalid_api_key", 401)
    assert [each["id"] for each in client("/v1/models", **key).body["data"]] == ["tiny"]
    assert "<html" in client("/").body.lower()
    client.refused(client("/metrics", **key), None, "unsupported_endpoint", 404)
    client.refused(client("/v1/completions", b"{", **key), None, "invalid_json")
    client.refused(client("/v1/completions", large, **key), None, "body_too_large", 413)
    answer = client("/v1/completions", {"prompt": "The csv module", "max_tokens": 5}, **key)
    assert answer.status == 200 and answer.body["usage"]["completion_tokens"] == 5
    fields = {"prompt": "To create", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    response = client.send("/v1/completions", fields, **key)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert len(response.headers.get_all("x-request-id")) == 1
    assert response.readline().startswith(b"data: ")
    process.send_signal(signal.SIGTERM)
    text = response.read().decode()
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]" and len(events) > 1000
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert process.wait(timeout=120) == 0
