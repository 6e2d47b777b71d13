"""Output of the commands: the answer on stdout, everything else on stderr."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from lfm2_fast.text.segments import ANSWER, PASSAGES, TOOL_CALL, Kind, Segment

STYLES: dict[Kind, str] = {"answer": "", "thinking": "dim italic", "tool call": "cyan"}
# What a terminal would act on, but for line feeds and tabs.
CONTROLS = {code: "\ufffd" for code in (*range(9), *range(11, 32), *range(127, 160))}


class Terminal:
    """Writes notes and streamed segments; plain text wherever no terminal is.

    Thinking goes to stderr, so that stdout has the answer alone. A tool call in a pipe keeps the
    model's markers, by which programs find it; one that was cut off has no closing marker.
    """

    def __init__(self) -> None:
        self.out = Console(highlight=False, soft_wrap=True, emoji=False)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        self._kind: Kind | None = None
        self._in_line = False

    def note(self, text: str) -> None:
        """A line about what happens, on stderr."""
        self.err.print(text, style="dim", markup=False)

    def show(self, segment: Segment) -> None:
        """A piece of streamed text, in the manner of its kind."""
        if segment.first:
            self.finish()
            self._kind = segment.kind
            if segment.kind == "thinking":
                self._write("thinking: ")
            elif segment.kind == "tool call":
                self._write("tool call: " if self.out.is_terminal else TOOL_CALL)
        if segment.last and segment.kind == "tool call" and not self.out.is_terminal:
            self._write(PASSAGES[TOOL_CALL][0])
        self._write(segment.text)

    def finish(self) -> None:
        """End the line of what was shown last."""
        if self._kind is not None or self._in_line:
            self._write("\n")
        self._kind, self._in_line = None, False

    def write(self, text: str, style: str = "") -> None:
        """Text as it is, on stdout."""
        _write(self.out, text, style)
        self._in_line = not text.endswith("\n")

    def _write(self, text: str) -> None:
        kind = self._kind or ANSWER
        _write(self.err if kind == "thinking" else self.out, text, STYLES[kind])


def _write(console: Console, text: str, style: str) -> None:
    if console.is_terminal:
        console.out(text.translate(CONTROLS), style=style or None, end="", highlight=False)
    else:
        console.file.write(text)
        console.file.flush()


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether Ctrl-C was pressed.

    Until it is first called, and from the second time on, Ctrl-C raises KeyboardInterrupt as ever.
    """
    asked = pressed = False

    def note(signum: int, frame: object) -> None:
        nonlocal pressed
        if pressed or not asked:
            raise KeyboardInterrupt
        pressed = True

    def stopped() -> bool:
        nonlocal asked
        asked = True
        return pressed

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
