"""A process with one engine in it, which answers requests: JSON lines in, JSON lines out.

    python bench/worker.py ENGINE

Engines do not share a process, so that neither their threads nor their memory mix, and each can be
asked how long its import took and how much memory it holds.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))


def memory() -> dict[str, int]:
    """Bytes of this process: resident now, of which its own, and resident at most so far."""
    names = {"VmRSS": "resident", "RssAnon": "own", "VmHWM": "peak"}
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key in names:
            found[names[key]] = int(value.split()[0]) * 1024
    return found


def make(name: str) -> Any:
    """The engine of that name, "kind" or "kind variant"."""
    kind, _, variant = name.partition(" ")
    if kind == "llama.cpp":
        from llama import LlamaCpp

        return LlamaCpp(variant)
    import engines

    if kind == "lfm2_fast":
        return engines.Ours(**json.loads(variant or "{}"))
    if kind == "transformers":
        return engines.HuggingFaceCompiled() if variant == "compiled" else engines.HuggingFace()
    if kind == "reference":
        return engines.Ours(dtype="float32", backend="eager")
    raise ValueError(f"there is no engine {name!r}")


class Service:
    """The requests, by name."""

    def __init__(self, name: str) -> None:
        begin = time.perf_counter()
        self.engine = make(name)
        self.imported = time.perf_counter() - begin

    def hello(self) -> dict[str, Any]:
        return {"import_seconds": self.imported, "versions": self.engine.versions()}

    def load(self, folder: str, threads: int) -> dict[str, Any]:
        if hasattr(self.engine, "prepare"):
            self.engine.prepare(Path(folder))
        begin = time.perf_counter()
        self.engine.load(Path(folder), threads)
        return {"seconds": time.perf_counter() - begin}

    def start(self, batch: int, context: int, room: int) -> float:
        return self.engine.start(batch, context, room)

    def decode(self, steps: int) -> list[float]:
        return self.engine.decode(steps)

    def logits(self, prompt: list[int], steps: int) -> dict[str, Any]:
        found = self.engine.logits(prompt, steps)
        return {"shape": found.shape, "data": base64.b64encode(found.tobytes()).decode()}

    def memory(self) -> dict[str, int]:
        return memory()


def main() -> None:
    # What libraries print must not come between the answers.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(what: Callable[[], Any]) -> Any:
        try:
            found = {"answer": what()}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(found) + "\n")
        out.flush()

    service: Any = None

    def begin() -> Any:
        nonlocal service
        service = Service(sys.argv[1])
        return service.hello()

    answer(begin)
    for line in sys.stdin:
        request = json.loads(line)
        answer(lambda request=request: getattr(service, request.pop("do"))(**request))


if __name__ == "__main__":
    main()
