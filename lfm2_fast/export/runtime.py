"""Process that runs an export in the environment of its runtime."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lfm2_fast.export.errors import ExportError

PROGRAM = Path(__file__).parent / "vendor" / "run.py"


class Runtime:
    """Export at ``path``, opened by its runtime on ``device``: "CPU", "GPU" or "NPU".

    ``python`` is that of the runtime's environment. ``context`` bounds the tokens of a text. With
    ``exact``, the runtime computes in float32 as far as it has settings for that; else its defaults
    count.
    A context manager: the process ends with the block. Raises ExportError if the runtime cannot
    open the export, with what it found.
    """

    def __init__(
        self,
        python: Path,
        name: str,
        path: Path,
        *,
        device: str = "CPU",
        context: int,
        exact: bool = False,
    ) -> None:
        mode = "exact" if exact else "default"
        command = [python, PROGRAM, name, path, device, str(context), mode]
        self._name = name
        # A file, since a pipe that nothing reads would fill up.
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        try:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
            )
        except OSError as error:
            raise ExportError(f"{python} cannot be started: {error}") from error
        try:
            self.facts: dict[str, Any] = self._ask({"op": "open"})
        except BaseException:
            self.close()
            raise

    def feed(
        self, ids: Sequence[int], *, restart: bool = False, every: bool = False
    ) -> torch.Tensor:
        """Run tokens after those before, or after none, and return logits ``[rows, V]`` float32.

        They are of the last token, or of ``every`` one. Raises ExportError if the runtime fails.
        """
        asked = {"op": "feed", "ids": list(ids), "restart": restart, "all": every}
        answer = self._ask(asked)
        shape = (answer["rows"], answer["columns"])
        assert self._process.stdout is not None
        data = bytearray(self._process.stdout.read(4 * shape[0] * shape[1]))
        if len(data) < 4 * shape[0] * shape[1]:
            raise self._ended()
        return torch.frombuffer(data, dtype=torch.float32).view(shape)

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ExportError(f"the runtime of {self._name} refuses: {answer['error']}")
        return answer

    def _ended(self) -> ExportError:
        """Return the error of a process that ended, with the last lines that it wrote."""
        code = self._process.wait()
        self._log.seek(0)
        last = self._log.read().strip().splitlines()[-8:]
        return ExportError(
            f"the runtime of {self._name} ended with code {code}: " + "\n".join(last)
        )
