"""Requests that schemathesis makes of the OpenAPI document: whatever they are, none is a 5xx.

``LFM2_FAST_FUZZ`` is the number of requests of each endpoint; 10,000 in all are the long proof.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="`make test-clients` installs it")
from hypothesis import HealthCheck, given, settings  # noqa: E402

KEY = {"Authorization": "Bearer secret"}


COUNT = int(os.environ.get("LFM2_FAST_FUZZ", "15"))


def test_no_request_breaks_the_server(url: str) -> None:
    document = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=KEY)
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) >= 15
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck))
        def ask(case: Any) -> None:
            check(case)

        ask()


def check(case: Any) -> None:
    """Send a request, and look at its answer."""
    if isinstance(case.body, dict):
        # What is drawn at random asks for long texts, which prove nothing more.
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(case.body.get(name, 4), int):
                case.body[name] = min(case.body.get(name, 4), 4)
        if isinstance(case.body.get("n"), int):
            case.body["n"] = min(case.body["n"], 4)
    answer = case.call(headers=KEY, timeout=60)
    assert answer.status_code < 500, (answer.status_code, answer.text, case.body)
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
