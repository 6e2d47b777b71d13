"""Reference logits, with which engines are compared before they are timed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.gate import PROMPT, STEPS, rounding, wrong_logits
from bench.worker import REFERENCES, Remote

# Cost of 8 and 4 bits, by the last word of an engine's name; others see ``gate.rounding``.
# Random weights suffer more than trained ones; logits of another model are off by 1.4.
ALLOWED = {"Q4_0": 0.9, "int4": 0.9, "Q8_0": 0.2, "int8": 0.2}


@dataclass(frozen=True)
class Reference:
    """Logits ``[STEPS, vocabulary]`` in float32 of ``gate.PROMPT``, and the error of bfloat16."""

    exact: np.ndarray
    rounded: float

    def wrong(self, name: str, logits: np.ndarray) -> str | None:
        """Return why logits are wrong for the engine of that name, or None."""
        return wrong_logits(logits, self.exact, ALLOWED.get(name.split()[-1], self.rounded))

    def centred(self) -> Reference:
        """Return a copy with rows shifted to a mean of 0, as in ``LlamaServer.logits``."""
        return Reference(self.exact - self.exact.mean(-1, keepdims=True), self.rounded)


def reference(folder: Path, threads: int) -> Reference:
    """Run the references on a checkpoint, each in its own process."""
    found = []
    for name in REFERENCES:
        engine = Remote(name)
        try:
            engine.ask("load", folder=str(folder), threads=threads)
            found.append(engine.logits(PROMPT, STEPS))
        finally:
            engine.close()
    exact, plain = found
    return Reference(exact, rounding(exact, plain))
