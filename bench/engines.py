"""The engines that are compared, each driven in its own best way through the same few calls.

An engine loads a checkpoint; ``start`` runs a prompt in each of some sequences and gives the seconds
to their first tokens; ``decode`` continues all of them greedily and gives the seconds of each step.
This file alone knows how an engine is called: ``lfm2_fast`` through its public ``generate``, Hugging
Face through the model's forward call, which its own ``generate`` only adds time to, llama.cpp through
its C interface (``llama.py``).
"""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    """What is measured; an engine's constructor imports it, and raises ImportError without."""

    def load(self, folder: Path, threads: int) -> None:
        """Read the checkpoint, ready to run."""

    def start(self, batch: int, context: int, room: int) -> float:
        """Forget all; run ``context`` tokens in each of ``batch`` sequences that may grow by
        ``room``. Seconds until the first new tokens are known."""

    def decode(self, steps: int) -> list[float]:
        """Write ``steps`` more tokens to every sequence; the seconds of each step."""

    def logits(self, prompt: list[int], steps: int) -> np.ndarray:
        """``[steps, vocabulary]`` float32: what follows the prompt, then each fed token 1."""

    def versions(self) -> dict[str, str]:
        """The packages that the figures depend on."""


def prompt(row: int, length: int) -> list[int]:
    """Token ids of a prompt; another for each row."""
    return [2 + (7 * row + 31 * i) % 4001 for i in range(length)]


def installed(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


class Clock:
    """A streamer that notes when it is given tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.last: Any = None

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())
        self.last = tokens

    def end(self) -> None:
        pass


class Ours:
    """lfm2_fast, through ``generate`` with a cache that carries on."""

    def __init__(self, **options: Any) -> None:
        import torch

        import lfm2_fast

        self.torch, self.package, self.options = torch, lfm2_fast, options

    def load(self, folder: Path, threads: int) -> None:
        self.torch.set_num_threads(threads)
        self.model = self.package.load(folder, **self.options)

    def start(self, batch: int, context: int, room: int) -> float:
        self.text = self.torch.tensor([prompt(row, context) for row in range(batch)])
        self.cache = self.model.new_cache(batch, context + room)
        begin = time.perf_counter()
        self._generate(1)
        return time.perf_counter() - begin

    def decode(self, steps: int) -> list[float]:
        clock = Clock()
        self._generate(steps + 1, streamer=clock)
        return np.diff(clock.times[1:]).tolist()

    def _generate(self, count: int, **more: Any) -> None:
        self.text = self.model.generate(
            self.text,
            attention_mask=self.torch.ones_like(self.text),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=[],
            past_key_values=self.cache,
            **more,
        )

    def logits(self, prompt: list[int], steps: int) -> np.ndarray:
        cache = self.model.new_cache(1, len(prompt) + steps)
        ids, rows = prompt, []
        for _ in range(steps):
            out = self.model(
                self.torch.tensor([ids]), past_key_values=cache, logits_to_keep=1
            ).logits
            rows.append(out[0, -1].float().numpy())
            ids = [1]
        return np.stack(rows)

    def versions(self) -> dict[str, str]:
        return {"lfm2_fast": self.package.__version__, **installed("torch")}


class HuggingFace:
    """transformers' class, eager, with the cache that it makes itself."""

    def __init__(self, dtype: str = "bfloat16") -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self.torch, self.package, self.dtype = torch, transformers, dtype

    def load(self, folder: Path, threads: int) -> None:
        self.torch.set_num_threads(threads)
        self.torch.set_grad_enabled(False)
        kind = self.package.Lfm2ForCausalLM
        self.model = kind.from_pretrained(folder, dtype=getattr(self.torch, self.dtype)).eval()
        self.forward = self.model.forward

    def start(self, batch: int, context: int, room: int) -> float:
        text = self.torch.tensor([prompt(row, context) for row in range(batch)])
        self.cache = self.new_cache(batch, context + room)
        begin = time.perf_counter()
        self._step(text, self.model.forward)
        return time.perf_counter() - begin

    def new_cache(self, batch: int, length: int) -> Any:
        return self.package.DynamicCache(config=self.model.config)

    def decode(self, steps: int) -> list[float]:
        times = [time.perf_counter()]
        for _ in range(steps):
            self._step(self.tokens, self.forward)
            times.append(time.perf_counter())
        return np.diff(times).tolist()

    def _step(self, ids: Any, forward: Any) -> None:
        out = forward(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.tokens = out.logits[:, -1].argmax(-1, keepdim=True)

    def logits(self, prompt: list[int], steps: int) -> np.ndarray:
        cache = self.new_cache(1, len(prompt) + steps)
        ids, rows, forward = prompt, [], self.model.forward
        for _ in range(steps):
            out = forward(
                input_ids=self.torch.tensor([ids]), past_key_values=cache, logits_to_keep=1
            ).logits
            rows.append(out[0, -1].float().numpy())
            ids, forward = [1], self.forward
        return np.stack(rows)

    def versions(self) -> dict[str, str]:
        return installed("transformers", "torch")


class HuggingFaceCompiled(HuggingFace):
    """transformers' class with its static cache; single-token steps compiled by torch.compile."""

    def __init__(self) -> None:
        super().__init__()
        import torch._inductor.config as inductor

        # Lets Inductor repack the weights for oneDNN, which is what makes it fast on a CPU.
        inductor.freezing = True

    def load(self, folder: Path, threads: int) -> None:
        super().load(folder, threads)
        self.forward = self.torch.compile(self.model.forward, dynamic=False, fullgraph=True)

        self.caches: dict[tuple[int, int], Any] = {}

    def new_cache(self, batch: int, length: int) -> Any:
        """The one cache of that size, emptied: compiled code holds on to its tensors."""
        size = (batch, -(-length // 128) * 128)
        if size not in self.caches:
            self.caches[size] = self.package.StaticCache(self.model.config, max_cache_len=size[1])
        self.caches[size].reset()
        return self.caches[size]
