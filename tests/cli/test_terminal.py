"""What a terminal and what a pipe gets of a streamed text, and of notes."""

from __future__ import annotations

import re

import pytest

from lfm2_fast.cli.terminal import Terminal
from lfm2_fast.text.segments import Segment


def show(segments: list[tuple[str, str]], *, cut: bool = False) -> None:
    terminal = Terminal()
    for at, (kind, text) in enumerate(segments, 1):
        half = len(text) // 2
        terminal.show(Segment(kind, text[:half], True))  # type: ignore[arg-type]
        terminal.show(Segment(kind, text[half:], False))  # type: ignore[arg-type]
        if kind != "answer" and not (cut and at == len(segments)):
            terminal.show(Segment(kind, "", False, last=True))  # type: ignore[arg-type]
    terminal.finish()


PASSAGES = [
    ("thinking", "Two\nand two."),
    ("answer", "Let me look.\x1b[2J"),
    ("tool call", "[f(x=1)]"),
    ("answer", "Four."),
]


def test_thinking_and_tool_calls_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    show(PASSAGES)
    out, err = capsys.readouterr()
    call = "<|tool_call_start|>[f(x=1)]<|tool_call_end|>"
    assert out == f"Let me look.\x1b[2J\n{call}\nFour.\n"
    assert err == "thinking: Two\nand two.\n"


def test_a_tool_call_that_was_cut_off_is_not_closed(capsys: pytest.CaptureFixture[str]) -> None:
    show([("tool call", "[f()]"), ("tool call", '[f(y="a')], cut=True)
    start, end = "<|tool_call_start|>", "<|tool_call_end|>"
    assert capsys.readouterr().out == f'{start}[f()]{end}\n{start}[f(y="a\n'


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
    assert plain.sub("", out) == "Let me look.\ufffd[2J\ntool call: [f(x=1)]\nFour.\n"
    assert plain.sub("", err) == "thinking: Two\nand two.\n"
    assert ("\x1b[2;3m" in err) == (term != "dumb")
    assert ("\x1b[36m" in out) == (term == "xterm")
