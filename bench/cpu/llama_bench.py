"""llama.cpp as an engine: its own ``llama-bench``, after a check of its server's logits.

The options and the fields of its JSON are those of llama.cpp's ``tools/llama-bench/README.md``.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from bench.cpu.gguf_file import GGUFError, gguf_file
from bench.cpu.llama_server import LlamaServer
from bench.gate import PROMPT, STEPS
from bench.worker import EngineError
from lfm2_fast.cli.machine_load import memory

PREFIX = "llama.cpp "
LONGEST = 900


class LlamaBench:
    """Run of the program on a checkpoint's GGUF file of one kind, which is made if it is missing.

    ``programs`` is the folder of llama.cpp's programs. Each turn is a separate run, which loads the
    file again. Raises EngineError if the program or the file is missing.
    """

    def __init__(self, programs: Path, kind: str, folder: Path, threads: int) -> None:
        self.program, self.threads = programs / "llama-bench", threads
        self.programs, self.name = programs, PREFIX + kind
        self.versions: dict[str, str] = {}
        if not self.program.is_file():
            raise EngineError(f"there is no program {self.program}: run `make peers`", self.name)
        try:
            self.file = gguf_file(folder, kind, programs / "llama-quantize")
        except GGUFError as error:
            raise EngineError(str(error), self.name) from error

    def inspect(self, size: int) -> tuple[np.ndarray, float, dict[str, int]]:
        """Return logits ``[STEPS, size]`` of ``gate.PROMPT``, the load time, and memory in bytes.

        All three come from the server. It runs the file as ``llama-bench`` does, and shows logits.
        """
        program, length = self.programs / "llama-server", len(PROMPT) + STEPS
        with LlamaServer(program, self.file, self.threads, 1, length, self.name) as server:
            logits = server.logits(PROMPT, STEPS, size)
            return logits, server.seconds, memory(pid=server.process.pid)

    def rate(self, context: int, steps: int) -> float:
        """Return tokens a second of ``steps`` after ``context``; without steps, of the context."""
        prompt, depth = (0, context) if steps else (context, 0)
        wanted = {"n_prompt": prompt, "n_depth": depth, "n_gen": steps, "n_threads": self.threads}
        # Weights are in memory of the process, as in the other engines.
        options = ["-m", self.file, "-t", self.threads, "-ngl", 0, "-lm", "none"]
        options += ["-p", prompt, "-d", depth, "-n", steps, "-r", 1, "-o", "json"]
        found = self._run([str(self.program), *map(str, options)])
        try:
            ran = {name: found[name] for name in wanted}
            samples = found["samples_ts"]
            self.versions = {"llama.cpp": str(found["build_commit"])}
        except (KeyError, TypeError) as error:
            raise EngineError(f"its answer lacks a field: {error}", self.name) from error
        if ran != wanted or len(samples) != 1:
            raise EngineError(f"it ran {ran}, {len(samples)} times, not {wanted} once", self.name)
        return float(samples[0])

    def close(self) -> None:
        """Do nothing: no process runs between turns."""

    def _run(self, command: list[str]) -> Any:
        """Run the program, and return the object of its one test."""
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EngineError(str(error), self.name) from error
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise EngineError(f"it ended with code {done.returncode} and said: {said}", self.name)
        try:
            (found,) = json.loads(done.stdout)
        except (ValueError, TypeError) as error:
            raise EngineError(f"its answer is not one test's JSON: {error}", self.name) from error
        return found
