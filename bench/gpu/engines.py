"""Engines that are compared on a GPU, with the same three calls as ``bench/cpu/engines.py``.

Each makes its model from a config alone: a generator with a seed gives the same random weights in
every process, so no file is written. The seconds of steps are between events on the device. A slow
host shows as time of the device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import bench.cpu.engines
from lfm2_fast.weights.fusion import fusion_table


class Ours:
    """lfm2_fast, its steps as ``generate`` runs them."""

    how = "its own graph"

    def __init__(self) -> None:
        import torch

        import lfm2_fast
        from bench import shapes
        from bench.gpu import limits, steps
        from lfm2_fast.engine.model_runner import ModelRunner

        self.torch, self.package, self.runner = torch, lfm2_fast, ModelRunner
        self.limits, self.timed, self.shapes = limits, steps, shapes
        self.shape: tuple[int, int, int] | None = None

    def make(self, path: Path, device: str) -> None:
        config = self.package.Config.from_file(path)
        weights = self.shapes.random_weights(config, self.torch.bfloat16, device)
        self.model = self.package.Lfm2ForCausalLM(config, weights)

    def start(self, batch: int, context: int, room: int) -> float:
        """Start as ``Engine.start`` does; the seconds include steps for the warm-up."""
        clock = self.limits.DeviceClock(self.model.device)
        clock.mark()
        if self.shape == (batch, context, room):
            self.decoding.begin()
        else:
            more = room + self.timed.WARM + 2
            self.decoding = self.timed.Decoding(self.model, batch, context, more)
            self.shape = (batch, context, room)
        clock.mark()
        return clock.microseconds()[0] / 1e6

    def decode(self, steps: int) -> list[float]:
        return [us / 1e6 for us in self.decoding.run(steps)]

    def logits(self, tokens: list[int], steps: int) -> np.ndarray:
        """Logits of captured steps, if there are any: the first runs, the second is captured."""
        cache = self.model.new_cache(1, len(tokens) + steps)
        runner = self.runner(self.model.network, cache)
        rows = [runner.prefill([tokens], [0])]
        rows += [runner.step([1], [0]) for _ in range(steps - 1)]
        return np.stack([row[0].float().cpu().numpy() for row in rows])

    def versions(self) -> dict[str, str]:
        named = bench.cpu.engines.installed("torch", "triton")
        return {"lfm2_fast": self.package.__version__, **named}


class HuggingFace(bench.cpu.engines.HuggingFace):
    """transformers' class in bfloat16, eager, with the cache that it makes itself."""

    how = "eager"

    def make(self, path: Path, device: str) -> None:
        from bench.gpu.limits import DeviceClock
        from bench.shapes import random_weights
        from lfm2_fast import Config

        torch, self.device = self.torch, device
        torch.set_grad_enabled(False)
        config = Config.from_file(path)
        ours = random_weights(config, torch.bfloat16, device)
        weights = {}
        for name, fused in fusion_table(config).items():
            weights.update((part.name, rows) for part, rows in fused.split(ours[name]))
        theirs = self.package.Lfm2Config.from_json_file(path)
        with torch.device("meta"):
            model = self.package.Lfm2ForCausalLM(theirs)
        model.load_state_dict(weights, strict=False, assign=True)
        model.tie_weights()
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(theirs).to(device)
        left = [n for n, p in (*model.named_parameters(), *model.named_buffers()) if p.is_meta]
        assert not left, f"without a value: {left}"
        self.model = model.eval()
        self.step = self.model.forward
        self.clock = lambda: DeviceClock(torch.device(device))

    def decode(self, steps: int) -> list[float]:
        clock = self.clock()
        for _ in range(steps):
            clock.mark()
            self.tokens = self._run(self.tokens, self.step).argmax(-1, keepdim=True)
        clock.mark()
        return [us / 1e6 for us in clock.microseconds()]


class HuggingFaceCompiled(HuggingFace):
    """transformers' class with its static cache; a step compiled, and replayed as one CUDA graph.

    Inductor's own graphs ("reduce-overhead", which ``generate`` asks for) check and copy on the
    host at every step. Here the whole step is captured instead, with the choice of the token. The
    host only starts a replay, so the time is that of the kernels. Coordinate descent makes Inductor
    write and tune kernels for products with one token. If the capture fails, "reduce-overhead" is
    timed, and ``how`` says so.

    On a CPU the step is traced and not compiled, to see that this code runs.
    """

    def make(self, path: Path, device: str) -> None:
        super().make(path, device)
        self.caches: dict[tuple[int, int], Any] = {}
        self.steps: dict[int, Step] = {}
        self.how = "traced alone" if device == "cpu" else "one graph of ours around Inductor's"
        self.compiled = self._compile({"coordinate_descent_tuning": True})

    def _compile(self, options: dict[str, Any]) -> Any:
        def forward(tokens: Any, cache: Any) -> Any:
            out = self.model.forward(
                input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            row = out.logits[:, -1]
            return row, row.argmax(-1, keepdim=True)

        how = {"backend": "eager"} if self.device == "cpu" else {"options": options}
        return self.torch.compile(forward, dynamic=False, fullgraph=True, **how)

    def new_cache(self, batch: int, length: int) -> Any:
        """Return the one cache of that size, emptied: graphs point to its tensors."""
        size = (batch, -(-length // 256) * 256)
        if size not in self.caches:
            self.caches[size] = self.package.StaticCache(self.model.config, max_cache_len=size[1])
        self.caches[size].reset()
        return self.caches[size]

    def start(self, batch: int, context: int, room: int) -> float:
        seconds = super().start(batch, context, room + 1)
        if id(self.cache) not in self.steps:
            self.steps[id(self.cache)] = self._captured()
            seconds = super().start(batch, context, room + 1)
        self.one = self.steps[id(self.cache)]
        self.one.tokens.copy_(self.tokens)
        return seconds

    def decode(self, steps: int) -> list[float]:
        clock = self.clock()
        for _ in range(steps):
            clock.mark()
            self.one.run()
        clock.mark()
        return [us / 1e6 for us in clock.microseconds()]

    def logits(self, tokens: list[int], steps: int) -> np.ndarray:
        self.start(1, len(tokens), steps)  # compiles and captures, where that is to be done
        self.cache.reset()
        rows = [self._run(self.torch.tensor([tokens], device=self.device), self.model.forward)]
        for _ in range(steps - 1):
            self.one.tokens.fill_(1)
            self.one.run()
            rows.append(self.one.row.clone())
        return np.stack([row[0].float().cpu().numpy() for row in rows])

    def _captured(self) -> Step:
        """Step on this cache, ready to run; making it leaves the cache further on."""
        torch = self.torch
        step = Step(self.compiled, self.tokens, self.cache)
        if self.device == "cpu":
            step()
            return step
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # compiles, tunes and loads
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
            step.run = graph.replay
        except RuntimeError as error:
            self.how = f"reduce-overhead: one graph failed ({str(error).splitlines()[0]})"
            options = {"coordinate_descent_tuning": True, "triton.cudagraphs": True}
            step = Step(self._compile(options), self.tokens, self.cache)
            for _ in range(3):
                step()
        return step

    def versions(self) -> dict[str, str]:
        return bench.cpu.engines.installed("transformers", "torch", "triton")


class Step:
    """Step of one token: reads ``tokens [B, 1]`` and writes the next; ``row`` has the logits."""

    def __init__(self, compiled: Any, tokens: Any, cache: Any) -> None:
        self.compiled, self.tokens, self.cache = compiled, tokens.clone(), cache
        self.row: Any = None
        self.run: Any = self

    def __call__(self) -> None:
        self.row, token = self.compiled(self.tokens, self.cache)
        self.tokens.copy_(token)
