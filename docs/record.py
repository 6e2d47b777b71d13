"""Run the commands and the code in docs/usage/*.md, and write what they show into the pages.

    python docs/record.py [PAGE ...]

In a block marked ``console``, a line after "$ " is a command. It runs in a terminal of 100 columns,
and the rest of the block is its output. Lines after "> " are typed into it. Blocks marked
``python`` run in order in one process; a ``text`` block after one is its output. A page without a
``text`` block shows no output of Python, and its blocks do not run. All use the small checkpoint in
the package. A page of ``NEEDS`` is left out if its folder does not exist.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "> "
# Page -> the folder that its commands use. ``lfm2-fast export openvino lfm2_fast/tiny FOLDER``
# writes this one.
NEEDS = {"export.md": "tiny-openvino"}
# A progress bar's line that is erased, with the cursor in it or below.
ERASED = re.compile(r"[^\n]*(\n(\x1b\[\?25[hl]|\r)*\x1b\[1A)?\x1b\[2K")
ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[=>]")


class Terminal:
    """Command that runs in its own terminal; ``text`` is its output so far."""

    def __init__(self, *command: str, columns: int = 100, **env: str) -> None:
        self.text = ""
        self.code: int | None = None
        self.process, self._terminal = pty.fork()
        if self.process == 0:
            os.chdir(ROOT)
            # A process in the background ignores Ctrl-C, and so would the command.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execvpe(command[0], command, {**os.environ, "TERM": "xterm", **env})
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("4H", 40, columns, 0, 0))

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._terminal, text.encode())

    def wait_for(self, seen: Callable[[str], bool], seconds: float = 120) -> str:
        """Read until ``seen`` is true of the text since the last call, which is returned.

        Raises TimeoutError if that takes longer, EOFError if the command ends before.
        """
        start, limit = len(self.text), time.monotonic() + seconds
        raw = b""
        while not seen(self.text[start:]):
            if not select.select([self._terminal], [], [], max(0, limit - time.monotonic()))[0]:
                raise TimeoutError(f"waited for {seconds} s; the terminal shows {self.text!r}")
            try:
                piece = os.read(self._terminal, 4096)
            except OSError:
                piece = b""
            if not piece:
                raise EOFError(f"the command has ended; the terminal shows {self.text!r}")
            raw += piece
            shown = ERASED.sub("", raw.decode(errors="ignore").replace("\r\n", "\n"))
            shown = ESCAPES.sub("", shown)
            self.text = self.text[:start] + shown.replace("\r", "")
        return self.text[start:]

    def close(self) -> int:
        """Read to the end, and return the exit code of the command."""
        try:
            self.wait_for(lambda _: False)
        except EOFError:
            pass
        except TimeoutError:
            os.kill(self.process, signal.SIGKILL)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        os.close(self._terminal)
        return self.code


def console(block: str, path: str) -> str:
    """Return the block with new output of its commands, which are looked up on ``path`` first."""
    parts = []
    for part in re.split(r"(?m)^(?=\$ )", block):
        if part:
            command, *rest = part.splitlines()
            terminal = Terminal("sh", "-c", command.removeprefix("$ "), PATH=path)
            for line in rest:
                if line.startswith(PROMPT):
                    terminal.wait_for(lambda text: text.endswith(f"\n{PROMPT}"))
                    terminal.type(line.removeprefix(PROMPT) + "\n")
            terminal.close()
            lines = [line.rstrip() for line in terminal.text.splitlines()]
            parts.append("\n".join([command, *lines]).rstrip() + "\n")
    return "".join(parts)


def python(blocks: list[str]) -> list[str]:
    """Return the output of each block, run in order in one process."""
    mark = "-- next block --"
    code = f"\nprint({mark!r})\n".join(blocks)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit("the page's Python code failed")
    return [f"{printed.strip()}\n" for printed in done.stdout.split(mark)]


def record(page: Path, path: str) -> None:
    """Write new output into a page."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(
        r"(?ms)^```console\n(.*?)^```$",
        lambda found: f"```console\n{console(found[1], path)}```",
        text,
    )
    code = re.compile(r"(?ms)^```python\n(.*?)^```$(\n\n```text\n.*?^```$)?")
    found = list(code.finditer(text))
    if not any(block[2] for block in found):
        page.write_text(text, encoding="utf-8")
        return
    printed = iter(python([block[1] for block in found]))

    def renewed(found: re.Match[str]) -> str:
        output = next(printed)
        return f"```python\n{found[1]}```" + (f"\n\n```text\n{output}```" if found[2] else "")

    page.write_text(code.sub(renewed, text), encoding="utf-8")


def main() -> None:
    """Record the named pages, or all."""
    pages = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "docs" / "usage").glob("*.md"))
    with tempfile.TemporaryDirectory() as folder:
        command = Path(folder) / "lfm2-fast"
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m lfm2_fast "$@"\n')
        command.chmod(0o755)
        for page in pages:
            if not (ROOT / NEEDS.get(page.name, "")).exists():
                print(f"{page} is left out: there is no {NEEDS[page.name]}", file=sys.stderr)
                continue
            record(page, f"{folder}{os.pathsep}{os.environ['PATH']}")


if __name__ == "__main__":
    main()
