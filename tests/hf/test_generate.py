"""generate() against Hugging Face's on trained weights, in float32, and what only we promise."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lfm2_fast
from lfm2_fast.engine import model_runner
from lfm2_fast.engine.model_runner import run_batch
from lfm2_fast.engine.step_buffers import StepBuffers
from lfm2_fast.hf import generate_loop

PROMPTS = [
    "The first argument",
    "Return a list of",
    "If the optional parameter is not given, the default value is used, and",
    "A",
]


@pytest.fixture(scope="module")
def greedy_text(models, batch) -> torch.Tensor:
    """New tokens ``[B, 40]`` of greedy decoding."""
    made = models[0].generate(**batch, max_new_tokens=40, do_sample=False, eos_token_id=-1)
    return made[:, batch["input_ids"].shape[1] :]


def common_token(text: torch.Tensor, at: int) -> int:
    """A token that greedy decoding writes in some rows after ``at`` steps, to stop them by."""
    return int(text[:, at:].flatten().mode().values)


GREEDY: dict[str, dict[str, Any]] = {
    "plain": {"max_new_tokens": 20},
    "max_length": {"max_length": 30},
    "default_length": {},
    "penalty": {"max_new_tokens": 20, "repetition_penalty": 1.3},
    "reward": {"max_new_tokens": 20, "repetition_penalty": 0.9},
    "min_new_tokens": {"max_new_tokens": 20, "min_new_tokens": 13, "eos": True},
    "several_eos": {"max_new_tokens": 20, "eos": True},
    "min_above_max": {"max_new_tokens": 6, "min_new_tokens": 9, "eos": True},
    "other_pad": {"max_new_tokens": 20, "eos": True, "pad_token_id": 5},
    "all_at_once": {
        "max_new_tokens": 20,
        "min_new_tokens": 3,
        "repetition_penalty": 1.1,
        "eos": True,
    },
}


def resolve(kwargs: dict[str, Any], text: torch.Tensor) -> dict[str, Any]:
    """Replace the wish for an early stop by token ids that do occur."""
    kwargs = dict(kwargs)
    if kwargs.pop("eos", False):
        kwargs["eos_token_id"] = [7, common_token(text, 2), common_token(text, 9)]
    return kwargs


@pytest.mark.filterwarnings("ignore:min_new_tokens=9 is more than max_new_tokens=6")
@pytest.mark.parametrize("way", GREEDY)
def test_greedy_equals_hugging_face(models, batch, greedy_text, way: str) -> None:
    kwargs = resolve(GREEDY[way], greedy_text)
    theirs, ours = models
    forms = [batch]
    if way in ("plain", "other_pad"):  # the mask is inferred
        forms.append({"input_ids": batch["input_ids"]})
    for inputs in forms:
        expected = theirs.generate(**inputs, do_sample=False, **kwargs)
        assert torch.equal(ours.generate(**inputs, **kwargs), expected)


def test_rows_equal_each_alone(ours, tokenizer, batch) -> None:
    kwargs = {"max_new_tokens": 30, "eos_token_id": None}
    together = ours.generate(**batch, **kwargs)[:, batch["input_ids"].shape[1] :]
    for prompt, row in zip(PROMPTS, together, strict=True):
        alone = tokenizer(prompt, return_tensors="pt").input_ids
        assert torch.equal(ours.generate(alone, **kwargs)[0, alone.shape[1] :], row)


def test_right_padding_changes_no_token(ours, tokenizer, batch) -> None:
    right = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="right")
    width = right.input_ids.shape[1]
    expected = ours.generate(**batch, max_new_tokens=20)[:, width:]
    assert torch.equal(ours.generate(**right, max_new_tokens=20)[:, width:], expected)


def test_every_form_of_prompt(ours, tokenizer, batch) -> None:
    encoding = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    expected = ours.generate(**batch, max_new_tokens=5)
    rows = tokenizer(PROMPTS).input_ids
    assert len({len(row) for row in rows}) > 2
    unpadded = tokenizer(PROMPTS)
    for form in (encoding, dict(encoding), unpadded, rows, [tuple(row) for row in rows]):
        assert torch.equal(ours.generate(form, max_new_tokens=5), expected)
    one = torch.tensor(rows[0])
    for form in (rows[0], one, one[None], one[None].int(), [rows[0]]):
        assert torch.equal(ours.generate(form, max_new_tokens=5)[0], expected[0][-len(one) - 5 :])
    bos = ours.generate(max_new_tokens=4)
    assert bos.shape == (1, 5) and bos[0, 0] == 1
    assert ours.generate(input_ids=one[None], max_new_tokens=1).shape == (1, len(one) + 1)


@pytest.mark.parametrize("size", ["tiny", pytest.param("true_350m", marks=pytest.mark.nightly)])
def test_the_drop_in_snippet(tokenizer, size: str, request: pytest.FixtureRequest) -> None:
    """The snippet runs on trained weights and at LFM2-350M's shape, with the small tokenizer."""
    model_id = str(request.getfixturevalue(size))
    model = lfm2_fast.load(model_id, device_map="auto", dtype="bfloat16")
    input_ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is a list?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        tokenize=True,
    )
    sampling = {"do_sample": True, "temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05}
    kwargs = {**sampling, "max_new_tokens": 48 if size == "tiny" else 6}
    torch.manual_seed(0)
    output = model.generate(input_ids, **kwargs)
    if size == "tiny":
        text = tokenizer.decode(output[0])
        assert text.startswith("<|startoftext|><|im_start|>user\nWhat is a list?<|im_end|>")
    assert input_ids["input_ids"].shape[1] < output.shape[1]
    for form in ({"input_ids": input_ids["input_ids"]}, dict(input_ids)):
        torch.manual_seed(0)
        assert torch.equal(model.generate(**form, **kwargs), output)


def test_seeds_repeat_and_differ(ours, batch) -> None:
    def sample(**kwargs: Any) -> torch.Tensor:
        return ours.generate(**batch, do_sample=True, max_new_tokens=20, **kwargs)

    torch.manual_seed(5)
    first, second = sample(), sample()
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(sample(), first) and torch.equal(sample(), second)
    assert torch.equal(sample(seed=9), sample(seed=9))
    assert not torch.equal(sample(seed=9), sample(seed=10))
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(sample(generator=generators[0]), sample(generator=generators[1]))


def test_top_k_one_is_greedy(ours, batch) -> None:
    greedy = ours.generate(**batch, max_new_tokens=20)
    sampled = ours.generate(**batch, max_new_tokens=20, do_sample=True, top_k=1)
    assert torch.equal(sampled, greedy)


def test_a_top_k_beyond_the_vocabulary_keeps_all_tokens(ours, batch) -> None:
    def sample(top_k: int) -> torch.Tensor:
        return ours.generate(**batch, max_new_tokens=20, do_sample=True, seed=3, top_k=top_k)

    assert torch.equal(sample(10**20), sample(0))


def test_a_row_draws_the_same_in_any_batch(ours, tokenizer) -> None:
    """A draw depends on seed, row and position only, not on when other rows stop."""
    ids = tokenizer(PROMPTS[:1], return_tensors="pt").input_ids
    alone = ours.generate(ids, do_sample=True, max_new_tokens=30, seed=4)
    many = ours.generate(ids.repeat(3, 1), do_sample=True, max_new_tokens=30, seed=4)
    assert torch.equal(alone[0], many[0, : alone.shape[1]])
    assert not torch.equal(many[0], many[1])


def test_num_return_sequences(ours, tokenizer) -> None:
    ids = tokenizer(PROMPTS, return_tensors="pt", padding=True).input_ids
    kwargs = {"do_sample": True, "max_new_tokens": 12, "seed": 8}
    returned = ours.generate(ids, num_return_sequences=3, **kwargs)
    repeated = ours.generate(ids.repeat_interleave(3, 0), **kwargs)
    assert torch.equal(returned, repeated)


def test_stop_strings_equal_hugging_face(models, tokenizer, batch) -> None:
    theirs, ours = models
    written = ours.generate(**batch, max_new_tokens=40)
    words = tokenizer.decode(written[0, batch["input_ids"].shape[1] :]).split()
    for strings in (words[4], [words[4], words[9]]):
        kwargs = {"max_new_tokens": 40, "stop_strings": strings, "tokenizer": tokenizer}
        expected = theirs.generate(**batch, do_sample=False, **kwargs)
        assert expected.shape[1] <= written.shape[1]
        assert torch.equal(ours.generate(**batch, **kwargs), expected)


def test_callers_processors_and_criteria_equal_hugging_face(models, batch, greedy_text) -> None:
    from transformers import NoRepeatNGramLogitsProcessor, StoppingCriteria
    from transformers.generation import SuppressTokensLogitsProcessor

    theirs, ours = models
    often = common_token(greedy_text, 3)

    class Stop(StoppingCriteria):
        """Stops a row when it has written a token twice; looks at the whole text."""

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            assert scores is None and ids.shape[0] == len(PROMPTS)
            last = ids[:, -1:]
            return (ids[:, batch["input_ids"].shape[1] :] == last).sum(-1) > 2

    for processors in ([NoRepeatNGramLogitsProcessor(2)], [SuppressTokensLogitsProcessor([often])]):
        kwargs = {
            "max_new_tokens": 40,
            "logits_processor": processors,
            "stopping_criteria": [Stop()],
            "repetition_penalty": 1.05,
        }
        expected = theirs.generate(**batch, do_sample=False, **kwargs)
        assert torch.equal(ours.generate(**batch, **kwargs), expected)


@pytest.mark.slow
def test_callers_processors_replace_those_of_arguments(models, batch, greedy_text) -> None:
    """The rule is Hugging Face's. Its warning is a log line."""
    from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

    theirs, ours = models
    width, eos = batch["input_ids"].shape[1], common_token(greedy_text, 2)
    longer = MinNewTokensLengthLogitsProcessor(width, 20, eos)
    for processor, argument in (
        (RepetitionPenaltyLogitsProcessor(1.3), {"repetition_penalty": 1.2}),
        (longer, {"min_new_tokens": 5, "eos_token_id": eos}),
    ):
        kwargs = {"max_new_tokens": 30, "logits_processor": [processor], **argument}
        expected = theirs.generate(**batch, do_sample=False, **kwargs)
        with pytest.warns(UserWarning, match=type(processor).__name__):
            assert torch.equal(ours.generate(**batch, **kwargs), expected)


def test_transition_scores_equal_hugging_faces(models, batch) -> None:
    theirs, ours = models
    wanted = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 8}
    written = ours.generate(**batch, **wanted, eos_token_id=None)
    for normalize in (False, True):
        arguments = (written.sequences, written.scores, None, normalize)
        expected = theirs.compute_transition_scores(*arguments)
        got = ours.compute_transition_scores(*arguments)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_criterion_may_answer_for_all_rows(ours, batch) -> None:
    def stop(ids: torch.Tensor, scores: tuple[torch.Tensor, ...]) -> bool:
        assert len(scores) == ids.shape[1] - batch["input_ids"].shape[1]
        return ids.shape[1] >= batch["input_ids"].shape[1] + 3

    kwargs = {"return_dict_in_generate": True, "output_scores": True}
    output = ours.generate(**batch, max_new_tokens=40, stopping_criteria=[stop], **kwargs)
    assert output.sequences.shape[1] == batch["input_ids"].shape[1] + 3


@pytest.mark.slow
def test_scores_and_logits_equal_hugging_face(models, batch, greedy_text) -> None:
    from transformers.generation import GenerateDecoderOnlyOutput

    theirs, ours = models
    kwargs = resolve({"max_new_tokens": 25, "eos": True, "repetition_penalty": 1.2}, greedy_text)
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = theirs.generate(**batch, do_sample=False, **kwargs, **wanted)
    got = ours.generate(**batch, **kwargs, **wanted)
    assert isinstance(got, GenerateDecoderOnlyOutput)
    assert torch.equal(got.sequences, expected.sequences)
    new = expected.sequences[:, batch["input_ids"].shape[1] :]
    stops = torch.isin(new, torch.tensor(kwargs["eos_token_id"])).int()
    running = (stops.cumsum(1) - stops) == 0
    for kind in ("scores", "logits"):
        assert len(got[kind]) == len(expected[kind]) == new.shape[1]
        for step, (mine, other) in enumerate(zip(got[kind], expected[kind], strict=True)):
            live = running[:, step]
            torch.testing.assert_close(mine[live], other[live], rtol=1e-4, atol=1e-4)
            assert not mine[~live].any()
    assert not running.all(), "no row stopped early: the test shows nothing"
    bare = ours.generate(**batch, max_new_tokens=2, return_dict_in_generate=True)
    assert bare.scores is None and bare.logits is None


def test_rows_that_stopped_cost_nothing(ours, batch, greedy_text, monkeypatch) -> None:
    kwargs = resolve({"max_new_tokens": 25, "eos": True}, greedy_text)
    sizes = []
    run = StepBuffers.run_steps

    def counted(self: StepBuffers, model: Any, cache: Any, count: int, **kwargs: Any) -> None:
        sizes.append(count)
        run(self, model, cache, count, **kwargs)

    monkeypatch.setattr(StepBuffers, "run_steps", counted)
    output = ours.generate(**batch, **kwargs)
    new = output[:, batch["input_ids"].shape[1] :]
    stops = torch.isin(new, torch.tensor(kwargs["eos_token_id"])).int().cumsum(1)
    live = (stops == 0).sum(0).tolist()
    assert sizes == [n for n in live[: new.shape[1] - 1] if n]
    assert sizes[-1] < sizes[0]


def test_streamers(ours, tokenizer, batch, capsys) -> None:
    from transformers import TextIteratorStreamer, TextStreamer

    ids = batch["input_ids"][:1]
    output = ours.generate(ids, max_new_tokens=20)
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    ours.generate(
        ids,
        max_new_tokens=20,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    assert capsys.readouterr().out.strip() == text.strip()
    stream = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = threading.Thread(
        target=ours.generate, args=(ids,), kwargs={"max_new_tokens": 20, "streamer": stream}
    )
    thread.start()
    assert "".join(stream).strip() == text.strip()
    thread.join()


def test_a_failing_criterion_ends_the_stream(ours, tokenizer, batch) -> None:
    """A reader in another thread must not wait for ever."""
    from transformers import TextIteratorStreamer

    stream = TextIteratorStreamer(tokenizer, timeout=20)

    def fail(ids: torch.Tensor, scores: torch.Tensor) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours.generate(batch["input_ids"][:1], streamer=stream, stopping_criteria=[fail])
    assert isinstance("".join(stream), str)


def test_two_threads_do_not_disturb_each_other(ours, batch) -> None:
    ids = batch["input_ids"]
    kwargs = {"do_sample": True, "max_new_tokens": 25}
    expected = [ours.generate(ids, seed=seed, **kwargs) for seed in range(4)]
    results: dict[int, torch.Tensor] = {}

    def work(seed: int) -> None:
        results[seed] = ours.generate(ids, seed=seed, **kwargs)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], expected[seed]) for seed in range(4))


@pytest.fixture
def ran(monkeypatch) -> list[int]:
    """Numbers of tokens that each prefill ran, without replayed ones."""
    counts: list[int] = []
    run_chunks = model_runner.ModelRunner.run_chunks

    def counted(self: Any, chunks: Any, slots: Any, replays: Any, ends: Any) -> torch.Tensor:
        counts.append(sum(map(len, chunks)) - sum(replays))
        return run_chunks(self, chunks, slots, replays, ends)

    monkeypatch.setattr(model_runner.ModelRunner, "run_chunks", counted)
    return counts


# The end token would cut short what these tests count.
ENDLESS = {"eos_token_id": None}


def test_a_conversation_does_not_run_again(ours, tokenizer, ran: list[int]) -> None:
    first = tokenizer(PROMPTS[2], return_tensors="pt").input_ids
    cache = ours.new_cache(1)
    answer = ours.generate(first, max_new_tokens=10, **ENDLESS, past_key_values=cache)
    assert cache.lengths == [first.shape[1] + 9] and cache.history[0] == answer[0, :-1].tolist()
    more = tokenizer(" and then the", add_special_tokens=False, return_tensors="pt").input_ids
    turn = torch.cat([answer, more], 1)
    continued = ours.generate(turn, max_new_tokens=10, **ENDLESS, past_key_values=cache)
    assert torch.equal(continued, ours.generate(turn, max_new_tokens=10, **ENDLESS))
    assert ran == [first.shape[1], 1 + more.shape[1], turn.shape[1]]


def test_an_edited_answer_runs_from_the_edit_on(ours, tokenizer, ran: list[int]) -> None:
    """The conv rows inside the old answer are gone: a few tokens run again to restore them."""
    first = tokenizer(PROMPTS[2], return_tensors="pt").input_ids
    cache = ours.new_cache(1)
    answer = ours.generate(first, max_new_tokens=20, **ENDLESS, past_key_values=cache)
    edited = answer.clone()
    edited[0, first.shape[1] + 8] += 1
    for text in (edited, first[:, :4]):
        again = ours.generate(text, max_new_tokens=10, **ENDLESS, past_key_values=cache)
        assert torch.equal(again, ours.generate(text, max_new_tokens=10, **ENDLESS))
    assert ran[1] == edited.shape[1] - first.shape[1] - 8, "the prompt was run again"
    assert ran[3] == 1


def test_the_same_prompt_again(ours, tokenizer) -> None:
    ids = tokenizer(PROMPTS[2], return_tensors="pt").input_ids
    expected = ours.generate(ids, max_new_tokens=10, **ENDLESS)
    cache = ours(ids).past_key_values
    for _ in range(2):
        assert torch.equal(
            ours.generate(ids, max_new_tokens=10, **ENDLESS, past_key_values=cache), expected
        )


def test_a_batch_keeps_its_cache(ours, tokenizer, batch, ran: list[int]) -> None:
    output = ours.generate(**batch, max_new_tokens=8, **ENDLESS, return_dict_in_generate=True)
    mask = torch.cat([batch["attention_mask"], torch.ones(len(PROMPTS), 8).long()], 1)
    again = {"attention_mask": mask, "max_new_tokens": 8, **ENDLESS}
    continued = ours.generate(output.sequences, past_key_values=output.past_key_values, **again)
    assert torch.equal(continued, ours.generate(output.sequences, **again))
    assert ran[1] == len(PROMPTS)


def test_unrecorded_tokens_in_the_cache_are_run_again(ours, tokenizer) -> None:

    ids = tokenizer(PROMPTS[2], return_tensors="pt").input_ids
    cache = ours.new_cache(1)
    wrong = torch.tensor([9, 10, 11])
    run_batch(ours.network, wrong, cache.next_batch([3], [0], "cpu"), cache)
    expected = ours.generate(ids, max_new_tokens=10)
    assert torch.equal(ours.generate(ids, max_new_tokens=10, past_key_values=cache), expected)


def test_long_prompts_run_in_chunks(ours, tiny: Path, tokenizer, monkeypatch) -> None:
    text = (tiny / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids
    long, short = ids[:, :500], ids[:, 500:700]
    expected = [ours.generate(p, max_new_tokens=5)[0, -5:] for p in (long, short)]
    monkeypatch.setattr(generate_loop, "CHUNK", 64)
    for prompt, tail in zip((long, short), expected, strict=True):
        assert torch.equal(ours.generate(prompt, max_new_tokens=5)[0, -5:], tail)
    both = ours.generate([long[0].tolist(), short[0].tolist()], max_new_tokens=5)[:, -5:]
    assert torch.equal(both, torch.stack(expected))


def test_generation_config_is_merged_as_hugging_face_does(models, batch) -> None:
    from transformers import GenerationConfig

    theirs, ours = models
    given = GenerationConfig(max_new_tokens=9, repetition_penalty=1.2, eos_token_id=[7])
    expected = theirs.generate(**batch, generation_config=given, do_sample=False)
    assert torch.equal(ours.generate(**batch, generation_config=given), expected)
    assert torch.equal(ours.generate(**batch, generation_config=given.to_dict()), expected)
    shorter = ours.generate(**batch, generation_config=given, max_new_tokens=3)
    assert torch.equal(shorter, expected[:, : shorter.shape[1]])
    assert shorter.shape[1] == batch["input_ids"].shape[1] + 3


def test_the_checkpoints_generation_config_is_the_default(tiny: Path, batch) -> None:
    model = lfm2_fast.load(tiny, device="cpu")
    assert model.generation_config.eos_token_id == 7
    model.generation_config.max_new_tokens = 3
    width = batch["input_ids"].shape[1]
    assert model.generate(**batch).shape[1] == width + 3
    assert model.generate(**batch, max_new_tokens=2).shape[1] == width + 2


def test_none_switches_a_parameter_off(models, batch) -> None:
    theirs, ours = models
    kwargs = {"max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(**batch, do_sample=False, **kwargs)
    assert torch.equal(ours.generate(**batch, **kwargs), expected)


SAMPLED = {"do_sample": True}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({**SAMPLED, "temperature": 0.0}, ValueError, "temperature must be above 0, got 0.0; for"),
    ({**SAMPLED, "temperature": "warm"}, ValueError, "temperature must be a number"),
    ({**SAMPLED, "temperature": float("nan")}, ValueError, "temperature must be a number"),
    ({"past_key_values": object()}, TypeError, "past_key_values must be a cache"),
    ({"top_k": -1}, ValueError, "top_k must be a whole number of at least 0"),
    ({"top_k": 1.5}, ValueError, "top_k must be a whole number"),
    ({"top_p": 1.5}, ValueError, "top_p must be from 0 to 1, got 1.5"),
    ({"min_p": -0.1}, ValueError, "min_p must be from 0 to 1"),
    ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be above 0"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a whole number of at least 1"),
    ({"max_length": 2}, ValueError, "max_length=2 leaves nothing to write"),
    ({"max_new_tokens": 10**6}, ValueError, "do not fit into the context of"),
    ({"eos_token_id": 10**9}, ValueError, "eos_token_id must be token ids from 0 to"),
    ({"eos_token_id": -1}, ValueError, "got -1; None is for no such token"),
    ({"pad_token_id": -1}, ValueError, "pad_token_id must be token ids from 0 to"),
    ({"num_return_sequences": 2}, ValueError, "needs do_sample=True or num_beams: greedy"),
    ({"do_sample": "yes"}, ValueError, "do_sample must be True or False"),
    ({"stop_strings": "x"}, ValueError, "stop_strings needs the tokenizer"),
    ({"stop_strings": [""]}, ValueError, "stop_strings must be a string"),
    ({"seed": -1}, ValueError, "seed must be from 0"),
    ({"seed": "a"}, ValueError, "seed must be a whole number"),
    ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed or generator, not both"),
    ({"num_beam_groups": 4}, ValueError, "num_beam_groups=4 is not supported by lfm2_fast"),
    ({"penalty_alpha": 0.6}, ValueError, "penalty_alpha=0.6 is not supported"),
    ({"max_time": -1.0}, ValueError, "max_time must be above 0"),
    ({"output_attentions": True}, ValueError, "output_attentions=True is not supported"),
    ({"assistant_model": object()}, TypeError, "assistant_model must be a model of load"),
    ({"prompt_lookup_num_tokens": 0}, ValueError, "prompt_lookup_num_tokens must be a whole"),
    ({"generation_config": {"dola_layers": 2}}, ValueError, "dola_layers=2 is not supported"),
    ({"generation_config": 3}, ValueError, "generation_config must be"),
    ({"max_tokens": 5}, TypeError, "unexpected keyword argument 'max_tokens'"),
    ({"input_ids": [1]}, ValueError, "as inputs or as input_ids, not both"),
    ({"attention_mask": torch.zeros(4, 99)}, ValueError, "row 0 has no tokens"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), BAD, ids=[b[2][:40] for b in BAD])
def test_bad_arguments_are_named(ours, batch, kwargs, error, message: str) -> None:
    with pytest.raises(error, match=message):
        ours.generate(batch["input_ids"], **kwargs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("text", "use the checkpoint's tokenizer"),
        (b"text", "got bytes; use the checkpoint's tokenizer"),
        ([[1, 2], []], "row 1 has no tokens"),
        ([[1, 10**7]], r"input_ids\[0, 1\] is 10000000"),
        (torch.zeros(1, 2), "must be integers"),
        (torch.zeros(1, 2, 3).long(), r"shape \[batch, tokens\]"),
    ],
)
def test_bad_prompts_are_named(ours, inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.generate(inputs, max_new_tokens=2)


def test_a_cache_that_does_not_fit_is_named(ours, batch) -> None:
    ids = batch["input_ids"]
    with pytest.raises(ValueError, match="holds 2 sequences, but 4 rows"):
        ours.generate(ids, past_key_values=ours.new_cache(2))
    with pytest.raises(ValueError, match="max_length of 10"):
        ours.generate(ids, past_key_values=ours.new_cache(4, 10), max_new_tokens=20)


def test_a_cache_of_another_model_is_named(ours, tiny: Path, random_checkpoint) -> None:
    wide = lfm2_fast.load(tiny, device="cpu", dtype="float64")
    other = lfm2_fast.load(random_checkpoint(), device="cpu", dtype="float32")
    for model in (wide, other):
        with pytest.raises(ValueError, match="of another model, dtype or device"):
            ours.generate([1, 40], past_key_values=model.new_cache(1), max_new_tokens=2)
        with pytest.raises(ValueError, match="of another model, dtype or device"):
            ours(torch.tensor([[1, 40]]), past_key_values=model.new_cache(1))


def test_the_mask_is_inferred_as_hugging_face_does(models) -> None:
    """Without a named pad token nothing is padding; with one inside a row, the caller is asked."""
    theirs, ours = models
    ids = torch.tensor([[0, 40, 0, 41, 42]])
    kwargs = {"max_new_tokens": 8, "eos_token_id": None}
    expected = theirs.generate(ids, do_sample=False, pad_token_id=None, **kwargs)
    assert torch.equal(ours.generate(ids, pad_token_id=None, **kwargs), expected)
    with pytest.raises(ValueError, match="zeros between tokens.*pad_token_id=0 .*attention_mask"):
        ours.generate(ids, pad_token_id=0, **kwargs)
    whole = ours.generate(ids, pad_token_id=0, attention_mask=torch.ones_like(ids), **kwargs)
    assert torch.equal(whole, expected)


LARGEST_SEEDS = (2**64 - 1, np.uint64(2**64 - 1))


def test_integers_of_every_library_are_integers(ours) -> None:
    kwargs = {"max_new_tokens": np.int64(4), "eos_token_id": [np.int32(7)], "top_k": np.int8(3)}
    kwargs |= {"suppress_tokens": [], "seed": np.int64(1), "do_sample": True}
    assert ours.generate([1, 40], **kwargs).shape[1] <= 6
    largest = [ours.generate([1, 40], **kwargs | {"seed": seed}) for seed in LARGEST_SEEDS]
    assert all(torch.equal(each, largest[0]) for each in largest)


def test_torchs_default_device_changes_nothing(tiny: Path) -> None:
    """Nothing is made where ``torch.set_default_device`` says, be it on another device."""
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32", quantization="int8")
    prompts, kwargs = [[1, 40, 41], list(range(1, 60))], {"max_new_tokens": 8, "seed": 1}
    expected = model.generate(prompts, do_sample=True, **kwargs)
    ids = torch.tensor([[1, 40, 41]])
    logits = model(ids).logits
    with torch.device("meta"):
        assert torch.equal(model.generate(prompts, do_sample=True, **kwargs), expected)
        assert torch.equal(model(ids).logits, logits)


def test_a_generation_config_of_none_is_an_empty_one(tiny: Path) -> None:
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32")
    model.generation_config = None
    assert model.generate([1, 40], max_new_tokens=2, do_sample=False).shape == (1, 4)


def test_sampling_arguments_of_greedy_decoding_warn(ours, batch) -> None:
    with pytest.warns(UserWarning, match="temperature, top_k without do_sample=True") as seen:
        ours.generate(batch["input_ids"], temperature=0.5, top_k=3, max_new_tokens=1)
    assert [each.filename for each in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.generate(batch["input_ids"], max_new_tokens=1, num_beams=1, use_cache=True)


def test_an_empty_batch(ours) -> None:
    ids = torch.empty(0, 3, dtype=torch.long)
    for kwargs in ({}, {"num_beams": 2}, {"output_hidden_states": True}):
        assert ours.generate(ids, max_new_tokens=2, **kwargs).shape == (0, 3)
    assert ours.generate(inputs_embeds=torch.empty(0, 3, 192), max_new_tokens=2).shape == (0, 0)


FILE = [
    ({"use_cache": False}, {}),
    ({"early_stopping": True, "length_penalty": 2.0}, {}),
    ({"typical_p": 0.5, "epsilon_cutoff": 0.1}, {"do_sample": False}),
    ({"cache_implementation": "static"}, {}),
    ({"max_length": 10**7}, {"max_new_tokens": None, "eos_token_id": 7}),
]


@pytest.mark.parametrize(("file", "call"), FILE, ids=str)
def test_settings_without_effect_in_the_checkpoints_file_stop_no_call(
    tiny: Path, tmp_path: Path, file: dict[str, Any], call: dict[str, Any]
) -> None:
    """The caller did not write it, and no token depends on it."""
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32", max_length=40)
    ids = torch.tensor([[1, 40, 41]])
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    model.generation_config = {**model.generation_defaults(), **file}
    found = model.generate(ids, **{"max_new_tokens": 5, "do_sample": False, **call})
    assert torch.equal(found[:, : expected.shape[1]], expected)


def test_an_error_of_the_checkpoints_settings_names_their_file(tiny: Path) -> None:
    model = lfm2_fast.load(tiny, device="cpu")
    model.generation_config = {"penalty_alpha": 0.6}
    ids = torch.tensor([[1, 40, 41]])
    with pytest.raises(ValueError, match=r"generation_config\.json: pass penalty_alpha=None"):
        model.generate(ids, max_new_tokens=2)
    assert model.generate(ids, max_new_tokens=2, penalty_alpha=None).shape == (1, 5)
    with pytest.warns(UserWarning, match="use_cache=False has no effect here"):
        model.generate(ids, max_new_tokens=2, penalty_alpha=None, use_cache=False)
