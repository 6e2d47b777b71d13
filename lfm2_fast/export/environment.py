"""Environments of the vendors' exporters: virtual environments with pinned packages.

The exporters need an older transformers than this package, so that each runs in an environment of
its own. It is made in a cache folder when it is first needed.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from lfm2_fast.export.errors import ExportError

REQUIREMENTS = Path(__file__).parent / "requirements"
# Lines of pip that tell how far it is.
PROGRESS = ("Collecting ", "Downloading ", "Processing ", "Installing ")
# Lines of a failed program that its error repeats.
LINES = 12

Note = Callable[[str], None]


def vendor_python(name: str, modules: Sequence[str], given: Path | None, note: Note) -> Path:
    """Return the Python of the environment for the exporter ``name``, making it if it is missing.

    ``given`` is the folder of another environment, which is used as it is. ``modules`` are those
    that it must import. ``note`` gets lines that tell the progress. Raises ExportError if the
    environment cannot be made, or lacks a module.
    """
    if given is not None:
        python = _python(given)
        if not python.is_file():
            raise ExportError(
                f"environment={str(given)!r} has no {python.relative_to(given)}: make it with "
                "python -m venv, or leave --environment out"
            )
        _check(python, modules, f"install {_requirements(name)} there")
        return python
    folder = cached_environment(name)
    if not _python(folder).is_file():
        # Missing, or made by a Python that is gone.
        shutil.rmtree(folder, ignore_errors=True)
        _make(folder, name, modules, note)
    return _python(folder)


def cached_environment(name: str) -> Path:
    """Return the folder of an exporter's environment. Other pins or another Python change it."""
    pins = "\n".join(file.read_text(encoding="utf-8") for file in _files(name))
    version = ".".join(map(str, sys.version_info[:2]))
    mark = hashlib.sha256(f"{pins}\n{version}\n{sys.prefix}".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lfm2_fast" / "environments" / f"{name}-{mark}"


def run(command: Sequence[str | Path], note: Note, *, shown: Sequence[str] = ()) -> None:
    """Run a program, and note the lines of its output that begin with one of ``shown``.

    Raises ExportError with the end of the output if it fails.
    """
    words = [str(word) for word in command]
    last: deque[str] = deque(maxlen=LINES)
    try:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise ExportError(f"{words[0]} cannot be started: {error}") from error
    with process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip():
                    last.append(line.rstrip())
                if line.startswith(tuple(shown)):
                    note(line.rstrip())
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ExportError(
            f"this command ended with code {process.returncode}: {shlex.join(words)}\n"
            + "\n".join(last)
        )


def _make(folder: Path, name: str, modules: Sequence[str], note: Note) -> None:
    """Make an environment beside its place and move it there, whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    note(f"making the environment for {name} in {folder}: once, some minutes, up to 2 GB")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary) / "environment"
        pip: list[str | Path] = [_python(made), "-m", "pip", "install", "--progress-bar", "off"]
        try:
            run([sys.executable, "-m", "venv", made], note)
            for options in _options(name):
                run([*pip, *options], note, shown=PROGRESS)
            _check(_python(made), modules, "report this")
        except ExportError as error:
            raise ExportError(
                f"the environment for {name} could not be made: make one yourself with "
                f"{_requirements(name)}, and pass its folder with --environment; {error}"
            ) from error
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(made)  # another process was faster


def _check(python: Path, modules: Sequence[str], remedy: str) -> None:
    """Raise ExportError if ``python`` cannot import a module."""
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    try:
        run([python, "-c", code, *modules], lambda line: None)
    except ExportError as error:
        raise ExportError(f"{python} cannot import {', '.join(modules)}: {remedy}; {error}") from (
            error
        )


def _files(name: str) -> list[Path]:
    """Return the files of pinned packages. The second is of those that need others by mistake."""
    names = (f"{name}.txt", f"{name}-without-dependencies.txt")
    return [file for file in map(REQUIREMENTS.joinpath, names) if file.is_file()]


def _options(name: str) -> list[list[str | Path]]:
    """Return the options of each call of pip that installs the packages."""
    return [[*["--no-deps"][:number], "-r", file] for number, file in enumerate(_files(name))]


def _requirements(name: str) -> str:
    """Name the calls of pip that install the packages."""
    calls = [f"'pip install {shlex.join(map(str, options))}'" for options in _options(name)]
    return " and ".join(calls)


def _python(environment: Path) -> Path:
    """Return the place of an environment's Python."""
    name = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    return environment.joinpath(*name)
