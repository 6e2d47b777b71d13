"""Structured output: grammars that the fields of a body ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lfm2_fast.engine.request import Hook
from lfm2_fast.server.errors import refused
from lfm2_fast.server.protocol import Sampled
from lfm2_fast.server.service import Service
from lfm2_fast.server.tools import Tools

FIELDS = (
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_json_object",
    "grammar",
    "json_schema",
)
# Makes the hook of a prompt, None where nothing constrains the answer.
Constraint = Callable[[Sequence[int]], Hook | None]


async def constraint_of(service: Service, body: Sampled, tools: Tools | None = None) -> Constraint:
    """Return the constraint of a body's answer. Raises ApiError for what is not supported."""
    for name in FIELDS:
        if getattr(body, name):
            raise refused(f"{name} is not supported yet", name)
    if body.response_format not in (None, {"type": "text"}):
        raise refused("response_format may be of type text alone", "response_format")
    return lambda prompt: None
