"""Requests that schemathesis makes of the OpenAPI document: no answer is a 5xx.

``LFM2_FAST_FUZZ`` is the number of requests of each endpoint that reads a body. Counts of answers
are added to the JSON file ``LFM2_FAST_FUZZ_RECORD``; bench/results/fuzz.json is one, which grows.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="`make test-clients` installs it")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402

KEY = {"Authorization": "Bearer secret"}
COUNT = int(os.environ.get("LFM2_FAST_FUZZ", "16"))


def test_no_request_breaks_the_server(url: str) -> None:
    document = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=KEY)
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) >= 15
    for operation in operations:
        answers: Counter[str] = Counter()
        if operation.body:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                fuzz(operation, mode, COUNT // 2, answers)
        else:
            # They differ in nothing, or in a name.
            fuzz(operation, GenerationMode.POSITIVE, min(COUNT, 32), answers)
        record(operation.label, answers)


def fuzz(operation: Any, mode: Any, count: int, answers: Counter[str]) -> None:
    """Send requests of one endpoint, right ones or wrong ones, and count the statuses."""

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        answers[check(case)] += 1

    ask()


def record(label: str, answers: Counter[str]) -> None:
    """Add an endpoint's counts to the record, if one was asked for."""
    if path := os.environ.get("LFM2_FAST_FUZZ_RECORD"):
        file = Path(path)
        found = json.loads(file.read_text()) if file.exists() else {"requests": 0, "answers": {}}
        before = Counter(found["answers"].get(label, {}))
        found["answers"][label] = dict(before + answers)
        found["requests"] += answers.total()
        file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def check(case: Any) -> str:
    """Send a request, look at its answer, and return its status."""
    if isinstance(case.body, dict):
        # What is drawn at random asks for long texts, which prove nothing more.
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(case.body.get(name, 4), int):
                case.body[name] = min(case.body.get(name, 4), 4)
        if isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"
        if isinstance(case.body.get("n"), int):
            case.body["n"] = min(case.body["n"], 4)
    answer = case.call(headers=KEY, timeout=60)
    assert answer.status_code < 500, (answer.status_code, answer.text, case.body)
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return str(answer.status_code)
