"""Output of streamed text and of notes, in a terminal and in a pipe."""

from __future__ import annotations

import re

import pytest

from lfm2_fast.cli.terminal import Terminal
from lfm2_fast.text.reply_parser import Delta


def show(deltas: list[Delta]) -> None:
    terminal = Terminal()
    for delta in deltas:
        terminal.show(delta)
    terminal.finish()


PASSAGES = [
    Delta("reasoning", "Two\n"),
    Delta("reasoning", "and two."),
    Delta("text", "Let me "),
    Delta("text", "look.\x1b[2J"),
    Delta("tool_call", "", 0, "a", "f", '{"x": 1}'),
    Delta("tool_call", "", 1, "b", "g", "{}"),
    Delta("text", "Four."),
]


def test_thinking_and_tool_calls_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    show(PASSAGES)
    out, err = capsys.readouterr()
    calls = [f"<|tool_call_start|>{call}<|tool_call_end|>" for call in ("[f(x=1)]", "[g()]")]
    assert out == f"Let me look.\x1b[2J\n{calls[0]}\n{calls[1]}\nFour.\n"
    assert err == "thinking: Two\nand two.\n"


def test_notes_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().note("system prompt: :warning: [bold]")
    assert capsys.readouterr().err == "system prompt: :warning: [bold]\n"


@pytest.mark.parametrize("term", ["xterm", "dumb", "no colour"])
def test_thinking_and_tool_calls_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    monkeypatch.setenv("TERM", "dumb" if term == "dumb" else "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if term == "no colour":
        monkeypatch.setenv("NO_COLOR", "1")
    show(PASSAGES)
    out, err = capsys.readouterr()
    plain = re.compile(r"\x1b\[[\d;]*m")
    lines = ["Let me look.\ufffd[2J", "tool call: [f(x=1)]", "tool call: [g()]", "Four."]
    assert plain.sub("", out).splitlines() == lines
    assert plain.sub("", err) == "thinking: Two\nand two.\n"
    assert ("\x1b[2;3m" in err) == (term != "dumb")
    assert ("\x1b[36m" in out) == (term == "xterm")
