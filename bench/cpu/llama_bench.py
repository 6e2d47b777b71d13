"""llama.cpp's own program ``llama-bench`` as an engine, where one is given.

Its options and the fields of its JSON are those of llama.cpp's ``tools/llama-bench/README.md``.
It chooses no token and shows no logits, so these cannot be checked: all that can be said is whether
the same file was right when llama-cpp-python ran it.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from bench.cpu.llama_cpp import write_gguf
from bench.worker import EngineError

KINDS = ("BF16", "Q8_0", "Q4_0")
PREFIX = "llama-bench "
# Weights in memory of the process, as other engines have them: older spelling, newer, none.
UNMAPPED = (["-mmp", "0"], ["-lm", "none"], [])
LONGEST = 900


class LlamaBench:
    """The program on a GGUF file of one kind, which is made beside the checkpoint if need be.

    Raises EngineError where the program or the file cannot be had, or the program fails.
    """

    def __init__(self, program: Path, kind: str, folder: Path, threads: int) -> None:
        self.program, self.kind, self.threads = program, kind, threads
        self.name = PREFIX + kind
        self.build = ""
        if not program.is_file():
            raise EngineError(f"there is no program {program}", self.name)
        self.file = self._file(folder, kind)
        self.unmapped: list[str] = []
        for place, options in enumerate(UNMAPPED):
            self.unmapped = options
            try:
                self._run(0, 0, 1)
                break
            except EngineError:
                if place == len(UNMAPPED) - 1:
                    raise

    @property
    def versions(self) -> dict[str, str]:
        return {"llama-bench": self.build}

    def rate(self, context: int, steps: int) -> float:
        """Tokens a second of one run: ``steps`` after ``context``, or with no steps, of these."""
        found = self._run(0, context, steps) if steps else self._run(context, 0, 0)
        return float(found["samples_ts"][0])

    def close(self) -> None:
        """Nothing runs between turns."""

    def _run(self, prompt: int, depth: int, steps: int) -> dict[str, Any]:
        """Run the program once; its object of the one test."""
        wanted = {"n_prompt": prompt, "n_depth": depth, "n_gen": steps, "n_threads": self.threads}
        options = ["-m", self.file, "-t", self.threads, "-ngl", 0, *self.unmapped]
        options += ["-p", prompt, "-n", steps, "-r", 1, "-o", "json"]
        if depth:
            options += ["-d", depth]
        try:
            done = subprocess.run(
                [str(self.program), *map(str, options)],
                capture_output=True,
                text=True,
                timeout=LONGEST,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EngineError(str(error), self.name) from error
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise EngineError(f"it ended with code {done.returncode} and said: {said}", self.name)
        try:
            (found,) = json.loads(done.stdout)
            ran = {name: found.get(name, 0) for name in wanted}
            self.build = f"{found['build_number']} ({found['build_commit']})"
            samples = found["samples_ts"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError(f"its answer is not one test's JSON: {error}", self.name) from error
        if ran != wanted or len(samples) != 1:
            raise EngineError(f"it ran {ran}, {len(samples)} times, not {wanted} once", self.name)
        return found

    def _file(self, folder: Path, kind: str) -> Path:
        """The same file that llama-cpp-python reads, or one made anew."""
        path = folder / f"{kind}.gguf"
        if path.is_file():
            return path
        partial, quantiser = path.with_suffix(".partial"), self.program.with_name("llama-quantize")
        try:
            if kind != "BF16" and quantiser.is_file():
                base = self._file(folder, "BF16")
                command = [str(quantiser), str(base), str(partial), kind]
                subprocess.run(command, capture_output=True, text=True, check=True, timeout=LONGEST)
            elif kind == "Q4_0":
                raise EngineError(
                    "its file is made by llama-quantize, which is not beside the program", self.name
                )
            else:
                write_gguf(folder, partial, kind)
        except (ImportError, OSError, subprocess.SubprocessError) as error:
            raise EngineError(f"no {path.name}: {error}", self.name) from error
        partial.replace(path)
        return path
