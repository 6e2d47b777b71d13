"""The model as a GPU runs it, on one that stands in: its tokens, devices, graphs and waits.

Each call is a usual one. Its result is that of plain PyTorch on the CPU.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LogitsProcessor

import lfm2_fast
from lfm2_fast.cache.page_memory import PAGE_SIZE
from lfm2_fast.cli.evaluation import evaluate
from lfm2_fast.engine import speculation
from lfm2_fast.engine.captured_prompt import SIZES
from lfm2_fast.engine.decode import MULTI_STEP_ROWS, DecodeLoop, Launch
from lfm2_fast.engine.graphs import Graphs, capture_cuda
from lfm2_fast.engine.model_runner import ModelRunner
from lfm2_fast.text.conversation import Conversation
from tests.engine.stand_in_gpu import GPU, OnGpu, Refused, StandInGpu

ROOT = Path(__file__).resolve().parents[2]
Model = lfm2_fast.Lfm2ForCausalLM
pytestmark = [
    pytest.mark.skipif(
        os.environ["TRITON_INTERPRET"] != "1", reason="there is a GPU, which needs no stand-in"
    ),
    pytest.mark.filterwarnings("ignore:overflow"),  # the interpreter's, where a draw is made
]


# The interpreter takes its time for every layer and every head of keys.
FEW = {
    "num_hidden_layers": 2,
    "layer_types": ["conv", "full_attention"],
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.fixture(scope="module")
def folder(random_checkpoint: Callable[..., Path]) -> Path:
    return random_checkpoint(**FEW)


@pytest.fixture(scope="module")
def device(folder: Path, quick_interpreter: None) -> Iterator[StandInGpu]:
    with StandInGpu() as gpu:
        yield gpu


@pytest.fixture
def gpu(device: StandInGpu) -> StandInGpu:
    """The device, on which nothing has happened yet."""
    device.waits.clear()
    device.replays = 0
    return device


def both(folder: Path, **options: Any) -> tuple[Model, Model]:
    """Return the model on the GPU, and in plain PyTorch on the CPU."""
    ours = lfm2_fast.load(folder, dtype="float32", **options)
    assert ours.device == GPU
    on_cpu = {**options, "device": "cpu", "backend": "eager"}
    return ours, lfm2_fast.load(folder, dtype="float32", **on_cpu)


@pytest.fixture(scope="module")
def models(folder: Path, device: StandInGpu) -> tuple[Model, Model]:
    found = both(folder)
    assert found[0].ops.name == "triton"
    return found


class Favour(LogitsProcessor):
    """Makes its own tensors where the scores are, as transformers' processors do."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert input_ids.device == scores.device
        favoured = torch.arange(scores.shape[-1], device=scores.device) % 2 == 0
        return scores.where(favoured, scores - 5)


class Sink:
    """A streamer that keeps what it gets, which must be on the host."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def put(self, tokens: torch.Tensor) -> None:
        assert not isinstance(tokens, OnGpu)
        self.seen.append(tokens.tolist())

    def end(self) -> None: ...


# Steps in the interpreter are slow: few tokens, and as few rows as show it.
ONE, TWO = [[1, 50, 60, 70, 80]], [[1, 40, 41], [1, 50, 60, 70, 80]]
MANY = [[1, 20 + i, 30 + i] for i in range(MULTI_STEP_ROWS + 1)]
PADDED = torch.tensor([[0, 0, 1, 40, 41], [1, 50, 60, 70, 80]])
LONG = [[2 + i % 300 for i in range(SIZES[0] + 9)]]
DRAWN = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01}


def write(prompts: Any, **arguments: Any) -> Callable[[Model], Any]:
    """A call of ``generate`` for nine tokens that nothing ends, by default."""
    given = {"max_new_tokens": 9, "eos_token_id": [], "do_sample": False, **arguments}
    return lambda model: model.generate(prompts, **given)


def moved(model: Model) -> Any:
    """Prompts and mask where the model is, as people send them there."""
    ids = PADDED.to(model.device)
    return write(ids, attention_mask=(ids != 0).long(), max_new_tokens=3)(model)


def plainly(model: Model, prompts: Any) -> list[list[int]]:
    """Text of plain PyTorch, which needs no interpreter."""
    plain = lfm2_fast.load(model.name_or_path, device="cpu", dtype="float32", backend="eager")
    return write(prompts)(plain)[:, len(prompts[0]) :].tolist()


def ended(model: Model) -> Any:
    """Rows end one after another, while steps are running."""
    texts = plainly(model, MANY)
    ends = [texts[0][2], texts[1][5], texts[-1][8]]
    return write(MANY, eos_token_id=ends)(model)


def streamed(model: Model) -> Any:
    """A streamer gets every token of a text that ends while steps are running."""
    third = plainly(model, ONE)[0][3]
    sink = Sink()
    text = write(ONE, eos_token_id=[third], streamer=sink)(model)
    assert [token for (token,) in sink.seen[1:]] == text[0, len(ONE[0]) :].tolist()
    return text


def detailed(model: Model) -> Any:
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    found = write(TWO, **asked, max_new_tokens=5)(model)
    model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    return torch.stack(found.logits)


def continued(model: Model, times: int = 1) -> Any:
    """A cache carries on, and outgrows what was captured on it."""
    cache = model.new_cache(1)
    text = write(torch.arange(2, PAGE_SIZE - 2)[None], past_key_values=cache)(model)
    for _ in range(times):
        more = torch.cat([text.cpu(), torch.tensor([[55, 56]])], 1)
        text = write(more, past_key_values=cache)(model)
    return text


def stepped(model: Model) -> Any:
    """Continue as transformers does: with the cache of a forward pass, a token at a time."""
    out = model(torch.tensor(ONE), use_cache=True)
    return model(torch.tensor([[7]]), past_key_values=out.past_key_values).logits


def decoded(model: Model) -> Any:
    decoder = ModelRunner(model.network, model.new_cache(3))
    decoder.prefill(TWO, [0, 2])
    return torch.cat([decoder.step([5, 6], [0, 2]) for _ in range(4)])


def hooked(model: Model) -> Any:
    """A layer's hooks wait for the device, and replace its output, once in each step."""
    seen: list[float] = []
    layer = model.model.layers[0]
    hooks = (
        layer.register_forward_hook(lambda mod, args, out: seen.append(float(out.norm()))),
        layer.register_forward_hook(lambda mod, args, out: out * -1.5),
    )
    try:
        texts = [write(prompts, max_new_tokens=4)(model)[:, -4:] for prompts in (ONE, LONG)]
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) == 2 * 4 and min(seen) > 0
    return torch.cat(texts)


def embedded(model: Model) -> Any:
    """A prompt of embeddings, and the hidden states of its steps."""
    embeds = model.get_input_embeddings()(torch.tensor(ONE).to(model.device))
    asked = {"return_dict_in_generate": True, "output_hidden_states": True, "max_new_tokens": 3}
    found = write(None, inputs_embeds=embeds, **asked)(model)
    return torch.cat([layer for step in found.hidden_states for layer in step], 1)


def batched(model: Model) -> Any:
    """Prompts with their own settings, two rows at a time, one of them with a processor."""
    prompts = [*TWO, {"prompt": ONE[0], "suppress_tokens": list(range(2, 200))}]
    common = {"max_new_tokens": 4, "eos_token_id": [], "do_sample": False}
    answers = lfm2_fast.generate_batch(model, prompts, max_batch_size=2, **common)
    return torch.tensor([answer.tokens for answer in answers])


CALLS: dict[str, Callable[[Model], Any]] = {
    "greedy": write(TWO),
    "alone": write(ONE),
    "captured prompt": write(LONG),
    "penalized": write(TWO, repetition_penalty=1.3),
    "drawn": write(TWO, **DRAWN, seed=3),
    "drawn by torch": lambda model: write(TWO, **DRAWN, generator=torch.Generator().manual_seed(1))(
        model
    ),
    "several": write(ONE, **DRAWN, num_return_sequences=2, repetition_penalty=1.2, seed=2),
    "padded": write(PADDED, attention_mask=(PADDED != 0).long()),
    "moved": moved,
    "more than steps take": write([[1, 9 + i] for i in range(18)], max_new_tokens=3),
    "two at a time": write(MANY, max_batch_size=2, max_new_tokens=5),
    "no fewer": write(TWO, min_new_tokens=5, eos_token_id=list(range(2, 200))),
    "processed": write(TWO, logits_processor=[Favour()]),
    "processed and drawn": write(TWO, logits_processor=[Favour()], **DRAWN, seed=4),
    "ended": ended,
    "streamed": streamed,
    "detailed": detailed,
    "continued": continued,
    "continued twice": lambda model: continued(model, 2),
    "hooked": hooked,
    "beams": write(TWO, num_beams=2, num_return_sequences=2, max_new_tokens=4),
    "embedded": embedded,
    "batched": batched,
    "drafted": lambda model: write(TWO, assistant_model=model)(model),
    "drafted and drawn": lambda model: write(ONE, **DRAWN, seed=5, assistant_model=model)(model),
    "logits": lambda model: model(torch.tensor(ONE).to(model.device)).logits,
    "some logits": lambda model: model(torch.tensor(ONE), logits_to_keep=2).logits,
    "masked logits": lambda model: model(PADDED, attention_mask=PADDED != 0).logits[1],
    "stepped": stepped,
    "decoded": decoded,
    "evaluated": lambda model: torch.tensor(evaluate(model, torch.arange(2, 90), window=20).loss),
}

# What other calls show a part at a time.
COMBINED = {
    "alone", "drawn by torch", "several", "padded", "more than steps take", "two at a time",
    "no fewer", "processed and drawn", "continued twice", "drafted", "drafted and drawn",
}  # fmt: skip


def cases(names: Iterable[str], long: Collection[str]) -> list[Any]:
    """Return the cases of ``names``. Those in ``long`` are for ``make nightly`` only."""
    return [pytest.param(name, marks=pytest.mark.nightly if name in long else ()) for name in names]


def check(call: Callable[[Model], Any], models: tuple[Model, Model]) -> None:
    found, expected = (call(model).cpu() for model in models)
    if expected.is_floating_point():
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", cases(CALLS, COMBINED))
def test_it_gives_what_the_cpu_gives(name: str, models, gpu) -> None:
    check(CALLS[name], models)


@pytest.mark.parametrize("name", ["greedy", "captured prompt", "processed", "logits"])
def test_plain_pytorch_gives_it_too(name: str, folder: Path, gpu) -> None:
    check(CALLS[name], both(folder, backend="eager"))


@pytest.mark.parametrize(
    "name",
    cases(["greedy", "captured prompt", "processed", "logits"], ["captured prompt", "processed"]),
)
def test_eight_bits_do_too(name: str, folder: Path, gpu) -> None:
    check(CALLS[name], both(folder, quantization="int8"))


LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "short_factor": [1.5] * 8,
    "long_factor": [2.0 + i for i in range(8)],
}  # fmt: skip
SCALED = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0},
    "longrope": LONG_ROPE,
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("greedy", "dynamic"),
        ("captured prompt", "longrope"),
        pytest.param("greedy", "longrope", marks=pytest.mark.nightly),
        pytest.param("captured prompt", "dynamic", marks=pytest.mark.nightly),
    ],
)
def test_frequencies_that_follow_from_the_length_are_captured(
    name: str, kind: str, random_checkpoint, gpu: StandInGpu
) -> None:
    """Texts pass the original context while their steps are replayed."""
    scaled = {"max_position_embeddings": 8, "rope_parameters": SCALED[kind]}
    models = both(random_checkpoint(**FEW, **scaled))
    before = gpu.replays
    check(CALLS[name], models)
    assert gpu.replays > before


def test_steps_wait_for_nothing_but_their_tokens(folder: Path, gpu: StandInGpu) -> None:
    """The host waits only for tokens of launches before the newest, in texts of any length."""
    model = lfm2_fast.load(folder, dtype="float32")
    waits, launched = [], []
    launch, unread = DecodeLoop.launch, Launch.unread_tokens

    def noted(steps: DecodeLoop) -> int:
        launched.append("launch")
        return launch(steps)

    def read(in_flight: Launch) -> list[list[int]]:
        launched.append("read")
        return unread(in_flight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeLoop, "launch", noted)
        patch.setattr(Launch, "unread_tokens", read)
        for count in (10, 18):
            gpu.waits.clear()
            write(TWO, max_new_tokens=count)(model)
            # Beside tokens, a capture waits.
            known = ("an event", "synchronize")
            waits.append([each for each in gpu.waits if each not in known])
    assert waits[0] == waits[1] and gpu.replays > 4
    assert launched[:4] == ["launch", "read", "launch", "read"]


ADD = torch.ops.aten.add.Tensor


def test_a_failed_capture_is_reported_once_and_does_no_harm(gpu: StandInGpu, caplog) -> None:
    """The work runs uncaptured from then on; other work is captured as before."""
    total, ones = torch.zeros(2, device="cuda"), torch.ones(2, device="cuda")
    graphs, stream = Graphs(GPU, capture_cuda), torch.cuda.current_stream()
    gpu.failing = (ADD,)
    try:
        for runs in range(1, 5):
            graphs.run("fails", lambda: total.copy_(total + ones))
            assert total.tolist() == [runs, runs] and torch.cuda.current_stream() is stream
    finally:
        gpu.failing = ()
    assert gc.isenabled() and "fails" not in graphs and gpu.replays == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not permitted when stream is capturing" in caplog.text
    for _ in range(3):
        graphs.run("works", lambda: total.copy_(total * 2))
    assert total.tolist() == [32, 32] and gpu.replays == 2


def test_steps_whose_capture_fails_give_the_same_tokens(folder: Path, gpu: StandInGpu) -> None:
    models = both(folder)
    gpu.failing = (torch.ops.aten.slice.Tensor,)
    try:
        check(CALLS["alone"], models)
    finally:
        gpu.failing = ()
    assert gpu.replays == 0


def test_a_thread_without_a_handle_captures_what_another_has_run(gpu: StandInGpu) -> None:
    """A product that a thread of a pool has warmed up, and the next thread captures."""
    graphs = Graphs(GPU, capture_cuda)
    one = torch.eye(2, device="cuda")
    found: list[Any] = []

    def work() -> None:
        with gpu.in_thread():
            graphs.run("product", lambda: one.copy_(one @ one * 2))
            found.append("product" in graphs)

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [False, True] and one.tolist() == [[8, 0], [0, 8]]


@pytest.mark.parametrize("name", cases(["alone", "drawn", "processed"], ["drawn"]))
def test_a_row_without_a_token_is_reported(name: str, random_checkpoint, gpu: StandInGpu) -> None:
    """The error has the row's number and position, although steps run ahead. Later calls work."""
    ours, plain = both(random_checkpoint(**FEW, tie_word_embeddings=False))
    text = CALLS[name](plain)[-1].tolist()
    broken = next(place for place in range(8, 14) if text[place] not in text[:place])
    number = 0 if name == "alone" else 1
    ours.network.embed_tokens.weight.data[text[broken]] = torch.nan
    message = f"^row {number} .* new token {broken - 3}, at position {broken + 1}: "
    for _ in range(2):
        with pytest.raises(lfm2_fast.LogitsError, match=message):
            CALLS[name](ours)
    check(write([text[:broken]], max_new_tokens=1), (ours, plain))


# The small real checkpoint has six layers, which the interpreter takes half a minute for.
@pytest.mark.parametrize("trained", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_a_conversation(trained: bool, tiny: Path, random_checkpoint, gpu: StandInGpu) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    folder = tiny if trained else random_checkpoint(**FEW, vocab_size=len(tokenizer))
    texts = []
    for options in ({}, {"device": "cpu", "backend": "eager"}):
        model = lfm2_fast.load(folder, dtype="float32", **options)
        conversation = Conversation(
            model, tokenizer, max_new_tokens=5, arguments={"do_sample": False}
        )
        asked = ("What is a list?", "And a tuple?")
        texts.append([conversation.ask(each, lambda segment: None).text for each in asked])
    assert texts[0] == texts[1] and all(texts[0])


def test_a_saved_model_is_loaded_again(models, tmp_path: Path, gpu: StandInGpu) -> None:
    ours, plain = models
    ours.save_pretrained(tmp_path)
    again = lfm2_fast.load(tmp_path, device="cpu", backend="eager")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def captured(body: Callable[[], Any]) -> Any:
    graph = capture_cuda(Graphs(GPU, capture_cuda), body)
    graph.replay()
    return graph


def test_both_devices_in_an_operation_are_refused(gpu: StandInGpu) -> None:
    here, there = torch.ones(2), torch.ones(2, device="cuda")
    for body in (
        lambda: here + there,
        lambda: torch.where(here > 0, there, there),
        lambda: there.index_select(0, torch.tensor(1)),
        lambda: torch.stack([there[0], torch.tensor(1.0)]),
    ):
        with pytest.raises(Refused, match="tensors of both devices"):
            body()
    with pytest.raises(NotImplementedError, match="in place"):
        there.unsqueeze_(0)
    assert (there + torch.tensor(1.0)).tolist() == [2, 2]
    assert there[torch.tensor([0])].device == GPU


def test_waiting_is_seen_and_while_captured_refused(gpu: StandInGpu) -> None:
    ones = torch.ones(2, device="cuda")
    bodies: list[Callable[[], Any]] = [
        ones.tolist,
        lambda: ones[0].item(),
        lambda: ones[ones > 0],
        lambda: ones.cpu(),
        lambda: torch.cuda.synchronize(),
    ]
    for body in bodies:
        gpu.waits.clear()
        body()
        assert gpu.waits
        with pytest.raises(Refused, match="while work is captured"):
            captured(body)
    with pytest.raises(Refused, match="not pinned"):
        captured(lambda: ones.copy_(torch.zeros(2), non_blocking=True))


def test_a_graph_knows_what_it_was_captured_with_and_keeps_nothing(gpu: StandInGpu) -> None:
    total, step, made = torch.zeros(2, device="cuda"), torch.tensor(1.0), []

    def body() -> None:
        made.append(total + step)
        total.copy_(made[-1])

    graph = captured(body)
    assert total.tolist() == [1, 1]
    step.fill_(100)
    graph.replay()
    assert total.tolist() == [2, 2] and made[0].tolist() == [2, 2]
    made.clear()
    inner = graph.made[0]
    graph.replay()
    assert total.tolist() == [3, 3] and inner.isnan().all()


def test_a_graph_may_read_pinned_memory(gpu: StandInGpu) -> None:
    host = torch.tensor([1.0, 2.0, 3.0], pin_memory=True)
    ours = torch.zeros(2, device="cuda")
    graph = captured(lambda: ours.copy_(host[1:], non_blocking=True))
    host += 5
    graph.replay()
    assert ours.tolist() == [7, 8]


def test_nothing_is_left_of_it() -> None:
    """Afterwards torch is as before, its permanent state included; in a process of its own."""
    code = """
import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _get_current_dispatch_mode
from tests.engine.stand_in_gpu import StandInGpu

def state():
    return (torch.tensor, torch.version.cuda, torch.cuda.is_available(), torch.cuda.CUDAGraph,
            torch._C._only_lift_cpu_tensors(), _get_current_dispatch_mode())

before = state()
with StandInGpu():
    assert state() != before
    with torch.device("meta"):
        torch.ones(1)
assert state() == before and torch.tensor in _device_constructors()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_verified_step_is_one_graph_for_each_length(models, gpu, monkeypatch) -> None:
    """Captured once, it is replayed for each draft of its length; drafts are right here."""
    ours, plain = models
    answer = write(ONE, max_new_tokens=13)(plain)[0, len(ONE[0]) :].tolist()

    class Known:
        def __init__(self, *_: Any) -> None:
            self.place = 0

        def follow(self, prompt: Any, written: Sequence[int]) -> None:
            self.place = len(written)

        def find(self) -> tuple[int, int]:
            return self.place, 4

        def draft(self, place: int, count: int) -> list[int]:
            return answer[place : place + count]

    monkeypatch.setattr(speculation, "PromptLookup", Known)
    lengths = iter([1, 3] * 20)
    monkeypatch.setattr(speculation, "draft_lengths", lambda *_: [next(lengths)])
    engine = lfm2_fast.Engine(ours, max_rows=1)
    engine.add(lfm2_fast.Request(ONE[0], max_tokens=13, prompt_lookup=7))
    tokens = []
    while engine.busy:
        tokens += [event.token for event in engine.step()]
    drafts = engine.decode.buffers._drafts
    assert drafts is not None and drafts.graphs is not None
    assert sorted(key[1] for key in drafts.graphs._graphs) == [2, 4]
    assert min(graph.replays for graph in drafts.graphs._graphs.values()) == 1
    assert engine.statistics.accepted == engine.statistics.drafted == 8
    assert tokens == answer
