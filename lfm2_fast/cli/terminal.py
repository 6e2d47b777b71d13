"""Output of the commands: the answer on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from lfm2_fast.text.markers import CALL_PAIR
from lfm2_fast.text.reply_parser import Delta
from lfm2_fast.text.tool_calls import written_calls

STYLES = {"text": "", "reasoning": "dim italic", "tool_call": "cyan"}
# Control characters of a terminal, except line feeds and tabs.
CONTROLS = {code: "\ufffd" for code in (*range(9), *range(11, 32), *range(127, 160))}


class Terminal:
    """Writes notes and streamed replies, as plain text if there is no terminal.

    Thinking goes to stderr, so that stdout has the answer alone. A tool call in a pipe has markers
    around it, by which programs find it; one that was cut off is text.
    """

    def __init__(self) -> None:
        self.out = Console(highlight=False, soft_wrap=True, emoji=False)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        self._kind: str | None = None
        self._in_line = False

    def note(self, text: str) -> None:
        """Write a note on stderr."""
        self.err.print(text, style="dim", markup=False)

    def show(self, delta: Delta) -> None:
        """Write a piece of a reply, in the style of its kind."""
        if delta.kind != self._kind or delta.kind == "tool_call":
            self.finish()
            self._kind = delta.kind
            if delta.kind == "reasoning":
                self._write("thinking: ")
        if delta.kind == "tool_call":
            call = written_calls([(str(delta.name), json.loads(delta.arguments))])
            begin, end = ("tool call: ", "") if self.out.is_terminal else CALL_PAIR
            self._write(f"{begin}{call}{end}")
        else:
            self._write(delta.text)

    def finish(self) -> None:
        """End the line of the last shown piece."""
        if self._kind is not None or self._in_line:
            self._write("\n")
        self._kind, self._in_line = None, False

    def write(self, text: str, style: str = "") -> None:
        """Write text unchanged on stdout."""
        _write(self.out, text, style)
        self._in_line = not text.endswith("\n")

    def _write(self, text: str) -> None:
        kind = self._kind or "text"
        _write(self.err if kind == "reasoning" else self.out, text, STYLES[kind])


def _write(console: Console, text: str, style: str) -> None:
    if console.is_terminal:
        console.out(text.translate(CONTROLS), style=style or None, end="", highlight=False)
    else:
        console.file.write(text)
        console.file.flush()


class _Notes(logging.Handler):
    """Shows log messages as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        Terminal().note(record.getMessage())


def show_loading_notes() -> None:
    """Show the notes of loading weights, like the types of a GGUF file, from now on."""
    logger = logging.getLogger("lfm2_fast.weights")
    if not any(isinstance(each, _Notes) for each in logger.handlers):
        logger.addHandler(_Notes())
    logger.setLevel(logging.INFO)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Give a function that returns True after Ctrl-C.

    Before its first call, and from the second Ctrl-C on, KeyboardInterrupt is raised as usual.
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
