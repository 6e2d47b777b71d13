"""Engines in Python, each used in its fastest way through the same few calls.

``lfm2_fast`` is called through its public ``generate``; Hugging Face through the model's forward
call, to which its own ``generate`` only adds time. llama.cpp is a program: ``llama_bench.py``.
"""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    """Program to measure. Its constructor raises ImportError if it is missing."""

    def load(self, folder: Path, threads: int) -> None:
        """Read the checkpoint, ready to run."""

    def start(self, batch: int, context: int, room: int) -> float:
        """Start over with a prompt of ``context`` tokens in each of ``batch`` sequences.

        Each may grow by ``room`` tokens. Returns the seconds until all have their first new token.
        """

    def decode(self, steps: int) -> list[float]:
        """Continue every sequence greedily by ``steps`` tokens; return the seconds of each step."""

    def logits(self, tokens: list[int], steps: int) -> np.ndarray:
        """Return logits ``[steps, vocabulary]`` float32 after ``tokens`` and after each token 1."""

    def versions(self) -> dict[str, str]:
        """Packages that the figures depend on."""


def prompt(row: int, length: int) -> list[int]:
    """Token ids of a prompt, different for each row."""
    return [2 + (7 * row + 31 * i) % 4001 for i in range(length)]


def installed(*packages: str) -> dict[str, str]:
    """Versions of packages."""
    return {name: importlib.metadata.version(name) for name in packages}


class Ours:
    """lfm2_fast; ``options`` go to ``load``."""

    def __init__(self, **options: Any) -> None:
        import torch

        import lfm2_fast
        from bench.gate import logits
        from lfm2_fast.cli.benchmark import Sequences

        self.torch, self.package, self.options = torch, lfm2_fast, options
        self.sequences_of, self.logits_of = Sequences, logits

    def load(self, folder: Path, threads: int) -> None:
        self.torch.set_num_threads(threads)
        self.model = self.package.load(folder, device="cpu", **self.options)
        self.sequences = self.sequences_of(self.model)

    def start(self, batch: int, context: int, room: int) -> float:
        return self.sequences.start([prompt(row, context) for row in range(batch)], room)

    def decode(self, steps: int) -> list[float]:
        return self.sequences.decode(steps)

    def logits(self, tokens: list[int], steps: int) -> np.ndarray:
        return self.logits_of(self.model, tokens, steps)

    def versions(self) -> dict[str, str]:
        return {"lfm2_fast": self.package.__version__, **installed("torch")}


class HuggingFace:
    """transformers' class in bfloat16, eager, with the cache that it makes itself."""

    device = "cpu"

    def __init__(self) -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self.torch, self.package = torch, transformers

    def load(self, folder: Path, threads: int) -> None:
        self.torch.set_num_threads(threads)
        self.torch.set_grad_enabled(False)
        kind = self.package.Lfm2ForCausalLM
        self.model = kind.from_pretrained(folder, dtype=self.torch.bfloat16).eval()
        for weight in self.model.parameters():
            # From the mapped file into the process's memory, which the system does not evict
            # between turns.
            weight.data = weight.data.clone()
        self.step = self.model.forward

    def new_cache(self, batch: int, length: int) -> Any:
        return self.package.DynamicCache(config=self.model.config)

    def start(self, batch: int, context: int, room: int) -> float:
        prompts = [prompt(row, context) for row in range(batch)]
        text = self.torch.tensor(prompts, device=self.device)
        self.cache = self.new_cache(batch, context + room)
        begin = time.perf_counter()
        self.tokens = self._run(text, self.model.forward).argmax(-1, keepdim=True)
        return time.perf_counter() - begin

    def decode(self, steps: int) -> list[float]:
        times = [time.perf_counter()]
        for _ in range(steps):
            self.tokens = self._run(self.tokens, self.step).argmax(-1, keepdim=True)
            times.append(time.perf_counter())
        return np.diff(times).tolist()

    def logits(self, tokens: list[int], steps: int) -> np.ndarray:
        self.cache = self.new_cache(1, len(tokens) + steps)
        text, one = (self.torch.tensor([ids], device=self.device) for ids in (tokens, [1]))
        rows = [self._run(text, self.model.forward)]
        rows += [self._run(one, self.step).clone() for _ in range(steps - 1)]
        return np.stack([row[0].float().cpu().numpy() for row in rows])

    def _run(self, ids: Any, forward: Any) -> Any:
        """Logits of the last position, ``[batch, vocabulary]``."""
        out = forward(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    def versions(self) -> dict[str, str]:
        return installed("transformers", "torch")


class HuggingFaceCompiled(HuggingFace):
    """transformers' class with its static cache; steps of one token compiled by torch.compile."""

    def __init__(self) -> None:
        super().__init__()
        import torch._inductor.config as inductor
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()  # raises where there is none
        # Lets Inductor repack the weights for oneDNN, its fastest way on a CPU.
        inductor.freezing = True
        self.caches: dict[tuple[int, int], Any] = {}

    def load(self, folder: Path, threads: int) -> None:
        super().load(folder, threads)
        self.step = self.torch.compile(self.model.forward, dynamic=False, fullgraph=True)

    def new_cache(self, batch: int, length: int) -> Any:
        """Return the one cache of that size, emptied: compiled code keeps its tensors."""
        size = (batch, -(-length // 128) * 128)
        if size not in self.caches:
            self.caches[size] = self.package.StaticCache(self.model.config, max_cache_len=size[1])
        self.caches[size].reset()
        return self.caches[size]
