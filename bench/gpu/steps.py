"""Parts of the model's work on a GPU that can be timed: steps, prompts and first tokens."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import replace
from typing import Any

import torch

import lfm2_fast
from bench.gpu.limits import DeviceClock, quantiles
from bench.report.stats import ratio
from bench.shapes import random_weights
from lfm2_fast.cli.benchmark import Sequences, bytes_read_per_step
from lfm2_fast.engine.decode import DecodeLoop
from lfm2_fast.engine.model_runner import ModelRunner
from lfm2_fast.engine.request import Request, Row
from lfm2_fast.engine.step_buffers import StepBuffers
from lfm2_fast.ops.sampling import SamplingParams
from lfm2_fast.ops.triton_ops import TritonOps
from lfm2_fast.weights.formats import INT8
from lfm2_fast.weights.fusion import fusion_table

STEPS = 100
# Uncaptured steps, the capture, and some for the warm-up; some launches have four steps.
WARM = 12
# Comparisons: number of turns, and steps of a turn.
TURNS, TURN_STEPS = 10, 48
# What the checkpoints' own generation_config asks for.
SEEDS_SAMPLING = SamplingParams(
    do_sample=True, temperature=0.3, min_p=0.15, repetition_penalty=1.05
)


def prompt(length: int) -> list[int]:
    return [1 + i % 97 for i in range(length)]


class Decoding:
    """Rows of one context that are written step by step, as ``generate`` writes them.

    Each may grow by ``room`` tokens, of which the first ``WARM`` are written here.
    """

    def __init__(
        self,
        model: lfm2_fast.Lfm2ForCausalLM,
        batch: int,
        context: int,
        room: int,
        params: SamplingParams | None = None,
    ) -> None:
        self.model, self.params = model, params or SamplingParams()
        self.batch, self.context, self.room = batch, context, room
        self.cache = model.new_cache(batch, context + room)
        self.buffers = StepBuffers(model.network, self.cache)
        self.steps: DecodeLoop | None = None
        self.begin()

    def begin(self) -> None:
        """Start over with the prompt, and warm up; captured graphs stay."""
        context = self.context
        self.end()
        self.cache.reset()
        network = self.model.network
        steps = DecodeLoop(network, self.cache, self.buffers, params=self.params)
        request = Request(prompt(context), self.params)
        rows = [Row(0, request, i, limit=self.room, arrival=i, slot=i) for i in range(self.batch)]
        logits = ModelRunner(network, self.cache, self.buffers).prefill([prompt(context)], [0])
        for slot in range(1, self.batch):
            self.cache.copy(0, slot)
        steps.admit(rows, logits.expand(self.batch, -1))
        self.steps = steps
        self.run(WARM)

    def run(self, count: int) -> list[float]:
        """Return microseconds on the device of at least ``count`` steps.

        Steps that are launched together have their mean.
        """
        clock, together = DeviceClock(self.model.device), []
        while sum(together) < count:
            clock.mark()
            together.append(self.launch())
        clock.mark()
        times = zip(clock.microseconds(), together, strict=True)
        return [us / steps for us, steps in times for _ in range(steps)]

    def launch(self) -> int:
        """Launch the next steps and read those before. Return the number that was launched."""
        assert self.steps is not None
        launched = self.steps.launch()
        assert launched, "there is no room for another step"
        list(self.steps.read(self.steps.lag))
        return launched

    def end(self) -> None:
        """Read the launches that were not read."""
        if self.steps is not None:
            self.steps.settle()

    @property
    def nbytes(self) -> int:
        """Fewest bytes that a step reads: every weight, and the context's keys and values."""
        config, item = self.model.network.config, self.model.dtype.itemsize
        return bytes_read_per_step(self.model) + config.cache_bytes(item, self.batch * self.context)

    def kernels(self) -> int:
        """Number of kernels of a step, as the profiler counts them in a replay.

        Everything later in this process takes longer, because the driver continues to report.
        """
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            launched = self.launch()
            torch.cuda.synchronize()
        kinds = torch.autograd.DeviceType.CUDA
        names = [event.name for event in profiled.events() if event.device_type == kinds]
        if not names:
            raise RuntimeError("the profiler saw nothing of a step")
        return sum(not name.startswith(("Memcpy", "Memset")) for name in names) // launched


def decode(
    model: lfm2_fast.Lfm2ForCausalLM, batch: int, context: int, copied: float
) -> dict[str, Any]:
    """Microseconds of a step from a context on, and its share of the copy's bandwidth."""
    decoding = Decoding(model, batch, context, 2 * STEPS)
    times = quantiles(decoding.run(STEPS))
    decoding.end()
    share = round(decoding.nbytes / times["p50"] / 1e3 / copied, 3)
    return {"us": times, "nbytes": decoding.nbytes, "share_of_copy": share}


def kernels(model: lfm2_fast.Lfm2ForCausalLM, batch: int, context: int) -> dict[str, Any]:
    """Number of kernels of a step that ``decode`` times. Nothing may be timed after it."""
    decoding = Decoding(model, batch, context, 2 * STEPS)
    found = decoding.kernels()
    decoding.end()
    return {"kernels": found}


def compare(first: Decoding, second: Decoding) -> dict[str, Any]:
    """Steps of ``first`` over those of ``second``, in turns that swap their order."""
    samples: dict[str, list[float]] = {"first": [], "second": []}
    sides = (("first", first), ("second", second))
    for turn in range(TURNS):
        for name, decoding in sides if turn % 2 else reversed(sides):
            decoding.begin()
            samples[name].append(quantiles(decoding.run(TURN_STEPS))["p50"])
    for decoding in (first, second):
        decoding.end()
    value, low, high = ratio(samples["first"], samples["second"], paired=True)
    us = {name: quantiles(found) for name, found in samples.items()}
    return {"ratio": round(value, 4), "interval": [round(low, 4), round(high, 4)], "us": us}


def sampled(model: lfm2_fast.Lfm2ForCausalLM, context: int) -> dict[str, Any]:
    """Steps that draw as the checkpoints ask for, over greedy ones."""
    room = WARM + TURN_STEPS + 2
    drawn = Decoding(model, 1, context, room, SEEDS_SAMPLING)
    return compare(drawn, Decoding(model, 1, context, room))


def dependent(model: lfm2_fast.Lfm2ForCausalLM, context: int) -> dict[str, Any]:
    """Steps whose few-token kernels are launched before their predecessors' end, over plain."""
    room = WARM + TURN_STEPS + 2
    plain = Decoding(plain_of(model), 1, context, room)
    return compare(Decoding(model, 1, context, room), plain)


def plain_of(model: lfm2_fast.Lfm2ForCausalLM) -> lfm2_fast.Lfm2ForCausalLM:
    """Return a model on the same weights whose launches are not dependent."""
    plain = copy.copy(model)
    plain._modules = {"network": copy.copy(model.network)}  # the copy shares its dictionary
    if model.device.type == "cuda":
        plain.network.ops = TritonOps()
    return plain


def int8(model: lfm2_fast.Lfm2ForCausalLM, context: int) -> dict[str, Any]:
    """Steps of a model of random weights in 8-bit integers over its own, which are in bfloat16."""
    room = WARM + TURN_STEPS + 2
    narrow = Decoding(narrow_of(model), 1, context, room)
    return compare(narrow, Decoding(model, 1, context, room))


def narrow_of(model: lfm2_fast.Lfm2ForCausalLM) -> lfm2_fast.Lfm2ForCausalLM:
    """Return a model of the same config and random weights in 8-bit integers."""
    config = model.network.config
    made = quantized(config, random_weights(config, torch.bfloat16, model.device))
    return lfm2_fast.Lfm2ForCausalLM(replace(config, quantization="int8"), made)


def quantized(
    config: lfm2_fast.Config, weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Weights with their matrices in 8-bit integers, as loading makes them."""
    made = dict(weights)
    for name, fused in fusion_table(config).items():
        if fused.is_matrix:
            parts = zip(INT8.suffixes, INT8.quantize(weights[name]), strict=True)
            made |= {name + suffix: part for suffix, part in parts}
    return made


def prefill(model: lfm2_fast.Lfm2ForCausalLM, length: int, rate: float) -> dict[str, Any]:
    """Microseconds of a prompt on the device, and its share of ``rate``, in teraflops a second."""
    config, times = model.network.config, []
    cache = model.new_cache(1, length)
    runner = ModelRunner(model.network, cache)
    for _ in range(5):
        cache.reset()
        clock = DeviceClock(model.device)
        clock.mark()
        runner.prefill([prompt(length)], [0])
        clock.mark()
        times += clock.microseconds()
    found = quantiles(times[1:])
    flops = prefill_flops(config, length)
    return {"us": found, "flops": flops, "share": round(flops / found["p50"] / 1e6 / rate, 3)}


def prefill_flops(config: lfm2_fast.Config, length: int) -> int:
    """Multiplications and additions of a prompt's matrices and attention, the head's once.

    Attention is counted as causal: a token meets itself and those before it.
    """
    head = config.vocab_size * config.hidden_size
    matrices = sum(
        math.prod(fused.shape)
        for name, fused in fusion_table(config).items()
        if fused.is_matrix and name.startswith("layers.")
    )
    width = config.num_attention_heads * config.head_dim
    pairs = config.layer_types.count("full_attention") * length * (length + 1) // 2
    return 2 * matrices * length + 4 * width * pairs + 2 * head


def first_token(model: lfm2_fast.Lfm2ForCausalLM, length: int, copied: float) -> dict[str, Any]:
    """Microseconds from a prompt to its first token on the host, and their ratio to the floor.

    The floor is the time to read every weight once, at the copy's bandwidth.
    """
    text, times = torch.tensor([prompt(length)]), []
    for _ in range(7):
        begin = time.perf_counter()
        model.generate(text, max_new_tokens=1, eos_token_id=[])
        times.append(1e6 * (time.perf_counter() - begin))
    # The first call runs as it is, the second captures.
    found = quantiles(times[2:])
    return {
        "us": found,
        "over_floor": round(found["p50"] * copied * 1e3 / bytes_read_per_step(model), 2),
    }


def as_host_sees(model: lfm2_fast.Lfm2ForCausalLM, context: int) -> dict[str, Any]:
    """Microseconds between the tokens that the engine hands out on the host."""
    sequences = Sequences(model)
    sequences.start([prompt(context)], 3 * STEPS)
    sequences.decode(WARM)
    return {"us": quantiles([1e6 * seconds for seconds in sequences.decode(STEPS)])}
