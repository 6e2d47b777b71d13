"""Fixtures shared by the tests: checkpoints on disk, models of both classes, error budgets.

Triton kernels run on the machine's GPU, or in Triton's interpreter where there is none.
``TRITON_INTERPRET=1`` forces the interpreter; ``TRITON_INTERPRET=0`` without a GPU is an error.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from safetensors.torch import load_file, save_file

CUDA = torch.cuda.is_available()
# Triton reads this once, when it is first imported.
INTERPRETED = os.environ.setdefault("TRITON_INTERPRET", "0" if CUDA else "1") == "1"
if not (CUDA or INTERPRETED):
    raise pytest.UsageError("TRITON_INTERPRET=0 asks for a GPU, and torch sees none")

# A shell's background job ignores Ctrl-C. Commands that tests start would ignore it as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

if not INTERPRETED:
    # Every new example may compile a kernel again: the same ones each time, and none to shrink one.
    settings.register_profile("gpu", derandomize=True, phases=(Phase.explicit, Phase.generate))
    settings.load_profile("gpu")

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores. A pytest that a test starts is not a worker.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        del os.environ[name]

import lfm2_fast  # noqa: E402
from lfm2_fast.cache.kv_cache import KVPages  # noqa: E402
from lfm2_fast.engine.graphs import Graphs  # noqa: E402
from lfm2_fast.engine.step_buffers import StepBuffers  # noqa: E402
from lfm2_fast.weights.fusion import fusion_table  # noqa: E402
from tests.quick_interpreter import quick_interpreter as quickly  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

# Odd on purpose: no size is a power of two but the head's, and no two are equal.
SMALL = {
    "vocab_size": 307,
    "hidden_size": 96,
    "intermediate_size": 150,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"],
    "block_auto_adjust_ff_dim": False,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 7,
}

# Marks of whole folders and files, by how their paths begin. A file is slow if `make check` would
# otherwise end after its two minutes; files beside it test the same rooms.
MARKS = {
    "bench/": "bench",
    "cli/test_app.py": "slow",
    "clients/": "slow",
    "cluster/on_ray/": "cluster",
    "csrc/test_clang.py": "build",
    "csrc/test_extension.py": "build",
    "csrc/test_groups_bodies.py": "build",
    "csrc/test_sampling.py": "slow",
    "engine/test_cpu_graph.py": "slow",
    "engine/test_decode.py": "slow",
    "engine/test_first_token.py": "interpreter",
    "engine/test_near_ties.py": "slow",
    "engine/test_on_a_gpu.py": "interpreter",
    "engine/test_other_devices.py": "slow",
    "engine/test_published_bugs.py": "slow",
    "engine/test_speculation.py": "slow",
    "export/": "slow",
    "hf/test_adapters.py": "slow",
    "hf/test_beam_search.py": "slow",
    "hf/test_clients.py": "slow",
    "hf/test_compiling.py": "slow",
    "hf/test_generate.py": "slow",
    "hf/test_generate_batch.py": "slow",
    "hf/test_generate_loop.py": "slow",
    "hf/test_page_arguments.py": "slow",
    "hf/test_page_generate.py": "slow",
    "hf/test_processors.py": "slow",
    "hf/test_speculation.py": "slow",
    "hf/test_steps.py": "slow",
    "kernels/": "interpreter",
    "kernels/test_aot.py": "build",
    "models/test_dspark.py": "slow",
    "models/test_published_sizes.py": "slow",
    "models/test_rope.py": "slow",
    "ops/test_sampling.py": "slow",
    "ops/test_triton_ops.py": "interpreter",
    "ops/test_verified_steps.py": "slow",
    "packaging/": "build",
    "text/test_conversation.py": "slow",
    "text/test_grammar.py": "slow",
    "text/test_reply_parser.py": "slow",
    "text/test_tool_calls.py": "slow",
    "weights/test_adapter.py": "slow",
    "weights/test_compressed_tensors.py": "slow",
    "weights/test_formats.py": "slow",
    "weights/test_gguf_checkpoint.py": "slow",
    "weights/test_hub.py": "slow",
    "weights/test_interleave.py": "slow",
}

Pair = tuple[Any, lfm2_fast.Lfm2ForCausalLM]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = item.path.as_posix().removeprefix(f"{ROOT.as_posix()}/tests/")
        for start, mark in MARKS.items():
            if path.startswith(start):
                item.add_marker(mark)
        given = getattr(item, "callspec", None)
        if given is None:
            continue
        dtype, order = given.params.get("kernel_dtype"), given.params.get("grid_order")
        body = given.params.get("body")
        name, dtype = body if isinstance(body, tuple) else ("triton", dtype)
        # Each dtype and each order is in `make test`, every pair of them in `make nightly`. Other
        # bodies than Triton's have no grid.
        crossed = (torch.float32, "in_order"), (torch.float16, "reversed")
        if (dtype, order) in crossed if name == "triton" else order == "reversed":
            item.add_marker("nightly")


def pytest_collection_finish() -> None:
    """Leave what was imported out of later collections, of which a capture makes one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The small real checkpoint's folder."""
    return ROOT / "lfm2_fast" / "tiny"


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes, with Hugging Face's class, a random checkpoint of SMALL with some values changed.

    Matrices are scaled up: at the usual initial size a model with a tied head repeats its input.
    """
    made: dict[str, Path] = {}

    def make(*, seed: int = 0, scale: float = 4.0, **changed: Any) -> Path:
        from transformers import Lfm2Config, Lfm2ForCausalLM

        key = repr((seed, scale, sorted(changed.items())))
        if key not in made:
            torch.manual_seed(seed)
            model = Lfm2ForCausalLM(Lfm2Config(**{**SMALL, **changed}))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "norm" in name:
                        parameter.uniform_(0.5, 1.5)
                    elif "bias" in name:
                        parameter.normal_(std=0.5)
                    elif "conv.conv" in name:
                        parameter.normal_(std=0.7)
                    else:
                        parameter.mul_(scale)
            folder = tmp_path_factory.mktemp("random")
            model.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def breaking(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the small checkpoint so that a token, or any token, breaks a text from there on.

    Their embedding is NaN, beside a head of its own: what comes before keeps its logits.
    """

    def make(token: int | slice) -> Path:
        folder = tmp_path_factory.mktemp("breaking")
        for file in tiny.iterdir():
            if file.suffix in (".json", ".jinja"):
                shutil.copy(file, folder)
        weights = load_file(tiny / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.embed_tokens.weight"][token] = float("nan")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture(scope="session")
def pair() -> Callable[..., Pair]:
    """Loads a folder in both classes, by default in float32 on the CPU."""

    def load(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Pair:
        from transformers import Lfm2ForCausalLM

        theirs = Lfm2ForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        return theirs, lfm2_fast.load(folder, device="cpu", dtype=dtype, **kwargs)

    return load


@pytest.fixture(scope="session")
def within_budget() -> Callable[..., None]:
    """The design's rule for a computed result, largest error against largest error.

    ``exact`` is the ``*_ref`` in float64, and ``plain`` is the same ``*_ref`` in the working dtype.
    The error of ``out`` may be twice that of ``plain``, plus one rounding step of that dtype at the
    size of ``exact``. If ``plain`` overflows, ``out`` is not judged. ``by_row`` judges every row of
    the last axis alone, so that large rows cannot hide errors in small ones.
    """

    def check(
        out: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, *, by_row: bool = False
    ) -> None:
        assert exact.dtype == torch.float64 and exact.isfinite().all()
        assert (out.shape, out.dtype) == (exact.shape, plain.dtype)
        judged = plain.isfinite()
        assert out[judged].isfinite().all(), "NaN or infinity where plain PyTorch has none"
        exact = exact.where(judged, 0)
        error = (out.double().where(judged, 0) - exact).abs()
        allowed = (plain.double().where(judged, 0) - exact).abs()
        size = exact.abs()
        if not by_row:
            error, allowed, size = error.flatten(), allowed.flatten(), size.flatten()
        if not error.numel():
            return
        error, allowed, size = error.amax(-1), allowed.amax(-1), size.amax(-1)
        budget = 2 * allowed + torch.finfo(plain.dtype).eps * size
        worst = (error - budget).argmax()
        assert (error <= budget).all(), (
            f"error {error.flatten()[worst]:.3e}, allowed {budget.flatten()[worst]:.3e} "
            f"(plain PyTorch: {allowed.flatten()[worst]:.3e})"
        )

    return check


@pytest.fixture(
    scope="module",
    params=[torch.float32, torch.bfloat16, torch.float16],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Dtypes of the C++ code."""
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Many threads, so that even small work is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def quick_interpreter() -> Iterator[None]:
    """Make Triton's interpreter skip useless and repeated work."""
    with quickly() if INTERPRETED else nullcontext():
        yield


@pytest.fixture(scope="session")
def kernel_device(quick_interpreter: None) -> torch.device:
    """Device of Triton kernels: the GPU, or the CPU with the interpreter."""
    return torch.device("cpu" if INTERPRETED else "cuda")


# The interpreter's arithmetic in bfloat16 is wrong.
@pytest.fixture(
    scope="session",
    params=[torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED),
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def kernel_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype that Triton kernels are tested in."""
    return request.param


@pytest.fixture(scope="module", params=["in_order", "reversed"] if INTERPRETED else ["on_gpu"])
def grid_order(request: pytest.FixtureRequest) -> Iterator[None]:
    """Order of programs in the interpreter, which runs them one by one: forward, then backward."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reversed":
            from triton.runtime.interpreter import interpreter_builder as builder

            forward = builder.set_grid_idx

            def backward(*place: int) -> None:
                forward(*(n - 1 - i for n, i in zip(builder.grid_dim, place, strict=True)))

            patch.setattr(builder, "set_grid_idx", backward)
        yield


@pytest.fixture(scope="session")
def framed() -> Callable[[torch.Tensor], torch.Tensor]:
    """Copies a tensor into the middle of a larger one, which is NaN around it.

    So its rows have gaps and any alignment. ``intact`` checks that the frame is unchanged.
    """

    def frame(tensor: torch.Tensor) -> torch.Tensor:
        shape = [n + 2 for n in tensor.shape]
        whole = torch.full(shape, float("nan"), dtype=tensor.dtype, device=tensor.device)
        inside = whole[tuple(slice(1, -1) for _ in shape)]
        return inside.copy_(tensor)

    return frame


@pytest.fixture(scope="session")
def intact() -> Callable[[torch.Tensor], bool]:
    """Return True if the NaN around a ``framed`` tensor is untouched."""

    def check(inside: torch.Tensor) -> bool:
        assert inside._base is not None
        whole = inside._base.clone()
        whole[tuple(slice(1, -1) for _ in whole.shape)] = float("nan")
        return bool(whole.isnan().all())

    return check


@pytest.fixture(scope="session")
def paged() -> Callable[..., KVPages]:
    """Lays ``k, v [slots, kv_heads, longest, D]`` out in pages, in a random or a given order.

    What no sequence holds, the rows from ``lengths[slot]`` on and two pages more, is NaN, infinite
    or huge.
    """

    def lay_out(
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: Sequence[int],
        page_size: int,
        order: Sequence[int] | None = None,
    ) -> KVPages:
        slots, kv_heads, longest, head_dim = k.shape
        per_slot = -(-longest // page_size)
        order = order or torch.randperm(slots * per_slot + 2).tolist()
        table = torch.tensor(order[: slots * per_slot]).view(slots, per_slot)
        limit = torch.finfo(k.dtype).max
        nothing = torch.tensor([float("nan"), float("inf"), -float("inf"), limit]).to(k)
        shape = (len(order), kv_heads, page_size, head_dim)
        pages = KVPages(*(nothing[torch.randint(4, shape)] for _ in "kv"), table.int().to(k.device))
        for slot, length in enumerate(lengths):
            for i, first in enumerate(range(0, length, page_size)):
                rows = slice(first, min(first + page_size, length))
                pages.k[table[slot, i], :, : rows.stop - first] = k[slot, :, rows]
                pages.v[table[slot, i], :, : rows.stop - first] = v[slot, :, rows]
        return pages

    return lay_out


@pytest.fixture(scope="session")
def same_bits() -> Callable[[torch.Tensor, torch.Tensor], bool]:
    """Return True if two tensors are bit-identical, NaN included."""

    def check(a: torch.Tensor, b: torch.Tensor) -> bool:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        whole = {2: torch.int16, 4: torch.int32}[a.element_size()]
        return torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))

    return check


class Recorded:
    """Stand-in for a CUDA graph: a replay runs the captured work again."""

    def __init__(self, graphs: Graphs, body: Callable[[], None]) -> None:
        self.body = body
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.body()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graphs]:
    """Every ``Graphs`` object that is made, with stand-ins for CUDA's captures."""
    made: list[Graphs] = []
    init = StepBuffers.__init__

    def with_graphs(self: StepBuffers, model: Any, cache: Any, **options: Any) -> None:
        init(self, model, cache, Recorded, **options)
        assert self.graphs is not None
        made.append(self.graphs)

    monkeypatch.setattr(StepBuffers, "__init__", with_graphs)
    return made


@pytest.fixture(scope="session")
def as_close_to_fp32() -> Callable[..., None]:
    """Assert the design's rule for 16 bits: ``ours`` is at most 1.1 times as far off as ``theirs``.

    The distance to the float32 model ``exact`` is the mean KL divergence, and the number of
    different most likely tokens. The second depends on the chance number of near-ties. So
    ``batches`` of ids ``[B, T]`` are read until the sums keep to the rule, and all of them before
    it fails.
    """

    def distance(logits: torch.Tensor, exact: torch.Tensor) -> tuple[float, int]:
        p, q = exact.double().log_softmax(-1), logits.double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).mean()
        return kl.item(), int((logits.argmax(-1) != exact.argmax(-1)).sum())

    def check(exact: Any, theirs: Any, ours: Any, batches: Iterable[torch.Tensor]) -> None:
        our_misses = their_misses = 0
        for ids in batches:
            with torch.no_grad():
                logits = exact(ids).logits
                their_kl, theirs_missed = distance(theirs(ids).logits, logits)
            our_kl, ours_missed = distance(ours(ids).logits, logits)
            assert our_kl <= 1.1 * their_kl
            our_misses += ours_missed
            their_misses += theirs_missed
            if our_misses <= 1.1 * their_misses + 1:
                return
        raise AssertionError(f"likeliest tokens missed: {our_misses}, Hugging Face {their_misses}")

    return check


@pytest.fixture(scope="session")
def true_350m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of LFM2-350M's published shape in bf16, with random weights."""
    folder = tmp_path_factory.mktemp("350m")
    published = ROOT / "tests" / "data" / "LFM2-350M.json"
    shutil.copy(published, folder / "config.json")
    # Drawn once and repeated, at no whole number of rows: to draw them all takes seconds.
    noise = torch.empty(2**22 + 1, dtype=torch.bfloat16)
    noise.normal_(std=0.04, generator=torch.Generator().manual_seed(0))
    weights = {}
    for fused in fusion_table(lfm2_fast.Config.from_file(published)).values():
        for part in fused.parts:
            count = math.prod(part.shape)
            made = noise.repeat(-(-count // len(noise)))[:count].reshape(part.shape).contiguous()
            weights[part.name] = made.fill_(1) if fused.is_norm else made
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
