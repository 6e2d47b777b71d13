"""Entry point of ``python -m lfm2_fast`` and of ``lfm2-fast``."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import typer

import lfm2_fast
from lfm2_fast.cli.app import app
from lfm2_fast.export.errors import ExportError


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit. An error is one line on stderr, with exit code 2."""
    given = sys.argv[1:] if arguments is None else arguments
    _complete_streams()
    try:
        code = app(given, prog_name="lfm2-fast", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        code = 1  # The reader of the pipe has stopped. Typer does the same while a command runs.
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if "--traceback" in given[:1]:
            raise
        print(f"lfm2-fast: {_explained(error)}", file=sys.stderr)
        code = 2
    try:
        sys.stdout.flush()
    except OSError:
        # Python would write once more at exit, and report an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _complete_streams() -> None:
    """Replace streams that the caller closed, and characters that cannot be read or written."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _explained(error: Exception) -> str:
    """Describe an error in one line."""
    message = " ".join(str(error).split())
    if hasattr(error, "format_message"):
        where = getattr(getattr(error, "ctx", None), "command_path", "lfm2-fast")
        fault = f"{error.format_message()}{_refused(error)}"
        return f"{' '.join(fault.split())} (see {where} --help)"
    if isinstance(error, ValueError | OSError | ExportError):
        return message
    if isinstance(error, lfm2_fast.BackendError | lfm2_fast.CacheError | lfm2_fast.LogitsError):
        return message
    return f"{type(error).__name__}: {message} (lfm2-fast --traceback ... shows where)"


def _refused(error: Exception) -> str:
    """Return the value that typer refused, where pydantic's message leaves it out."""
    faults: list[dict[str, Any]] = getattr(error.__cause__, "errors", list)()
    return f", got {faults[0]['input']!r}" if faults else ""


if __name__ == "__main__":
    main()
