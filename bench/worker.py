"""Engine in its own process, which answers requests: JSON lines in, JSON lines out.

Each engine has its own process, so that threads and memory do not mix.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# Name -> the module, the class, and what it is made with.
ENGINES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lfm2_fast": ("cpu.engines", "Ours", {}),
    "lfm2_fast int8": ("cpu.engines", "Ours", {"quantization": "int8"}),
    "lfm2_fast int4": ("cpu.engines", "Ours", {"quantization": "int4"}),
    "transformers": ("cpu.engines", "HuggingFace", {}),
    "transformers compiled": ("cpu.engines", "HuggingFaceCompiled", {}),
}
# The same names on a GPU.
GPU_ENGINES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lfm2_fast": ("gpu.engines", "Ours", {}),
    "transformers": ("gpu.engines", "HuggingFace", {}),
    "transformers compiled": ("gpu.engines", "HuggingFaceCompiled", {}),
}
# References for their logits.
REFERENCES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "reference": ("cpu.engines", "Ours", {"dtype": "float32", "backend": "eager"}),
    "plain": ("cpu.engines", "Ours", {"dtype": "bfloat16", "backend": "eager"}),
}


class EngineError(RuntimeError):
    """Error of an engine that cannot run here, or has failed: its name, and the reason."""

    def __init__(self, why: str, engine: str) -> None:
        super().__init__(why)
        self.engine = engine


class Remote:
    """Engine in another process, started by ``python``. Raises EngineError if it does not start.

    ``root`` is the checkout whose package and benchmarks run.
    """

    def __init__(
        self, name: str, python: str | None = None, *, gpu: bool = False, root: Path = ROOT
    ) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python or sys.executable, "-m", "bench.worker", name, *(["gpu"] if gpu else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL,
            text=True,
            cwd=root,
            env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        )
        self.versions: dict[str, str] = self._answer()

    def ask(self, request: str, **arguments: Any) -> Any:
        """Return the answer to a request of ``Service``. Raises EngineError if that failed."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, as the answer will say
            self.process.stdin.write(json.dumps({"do": request, **arguments}) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def logits(self, tokens: list[int], steps: int) -> np.ndarray:
        """``Engine.logits``."""
        found = self.ask("logits", tokens=tokens, steps=steps)
        return np.frombuffer(base64.b64decode(found["data"]), np.float32).reshape(found["shape"])

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EngineError(f"its process ended with code {self.process.wait()}", self.name)
        found = json.loads(line)
        if "error" in found:
            raise EngineError(found["error"], self.name)
        return found["answer"]


class Service:
    """Requests, by name."""

    def __init__(self, name: str, *, gpu: bool = False) -> None:
        module, kind, options = (GPU_ENGINES if gpu else ENGINES | REFERENCES)[name]
        self.engine = getattr(importlib.import_module(f"bench.{module}"), kind)(**options)

    def load(self, folder: str, threads: int) -> float:
        begin = time.perf_counter()
        self.engine.load(Path(folder), threads)
        return time.perf_counter() - begin

    def make(self, config: str, device: str) -> float:
        """Make the model of that config file with random weights, instead of loading one."""
        begin = time.perf_counter()
        self.engine.make(Path(config), device)
        return time.perf_counter() - begin

    def how(self) -> str:
        """Return the way in which the engine has come to run a step."""
        return self.engine.how

    def start(self, batch: int, context: int, room: int) -> float:
        return self.engine.start(batch, context, room)

    def decode(self, steps: int) -> list[float]:
        return self.engine.decode(steps)

    def logits(self, tokens: list[int], steps: int) -> dict[str, Any]:
        found = self.engine.logits(tokens, steps)
        return {"shape": found.shape, "data": base64.b64encode(found.tobytes()).decode()}


def main() -> None:
    # Output of libraries must not come between the answers.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(what: Callable[[], Any]) -> None:
        try:
            found = {"answer": what()}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        out.write(json.dumps(found) + "\n")
        out.flush()

    made: list[Service] = []

    def begin() -> dict[str, str]:
        made.append(Service(sys.argv[1], gpu=sys.argv[2:] == ["gpu"]))
        return made[0].engine.versions()

    answer(begin)
    for line in sys.stdin:
        request = json.loads(line)
        call = request.pop("do")
        answer(lambda call=call, request=request: getattr(made[0], call)(**request))


if __name__ == "__main__":
    main()
