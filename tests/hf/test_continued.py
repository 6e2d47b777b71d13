"""Caches that callers fill, padding inside rows, and calls that are refused."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer

import lfm2_fast

FIRST = "The with statement is used to wrap the execution of a block. To create a"
MORE = " new table with the"


def ids_of(tokenizer: Any, text: str, **options: Any) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt", **options).input_ids


def test_a_filled_cache_and_only_the_new_ids(models, tokenizer) -> None:
    """A mask for all tokens shows, as in Hugging Face's class, that the ids are new ones."""
    first, more = ids_of(tokenizer, FIRST), ids_of(tokenizer, MORE, add_special_tokens=False)
    mask = torch.ones(1, first.shape[1] + more.shape[1], dtype=torch.long)
    found = []
    for model in models:
        cache = model(first, use_cache=True).past_key_values
        found.append(
            model.generate(more, attention_mask=mask, past_key_values=cache, max_new_tokens=8)
        )
        assert cache.get_seq_length() == mask.shape[1] + 7
    assert torch.equal(*found)
    whole = models[1].generate(torch.cat([first, more], 1), max_new_tokens=8)
    assert torch.equal(whole[:, first.shape[1] :], found[1])


def test_tokens_in_the_cache_alone_are_not_penalized(models, tokenizer) -> None:
    """The result is Hugging Face's, also with other arguments."""
    first, more = ids_of(tokenizer, FIRST), ids_of(tokenizer, MORE, add_special_tokens=False)
    mask = torch.ones(1, first.shape[1] + more.shape[1], dtype=torch.long)
    kwargs = {"repetition_penalty": 1.5, "max_new_tokens": 8, "do_sample": False}
    found = []
    for model in models:
        cache = model(first, use_cache=True).past_key_values
        call = {"attention_mask": mask, "past_key_values": cache, **kwargs}
        found.append(model.generate(more, **call))
    assert torch.equal(*found[::-1])
    whole = models[1].generate(torch.cat([first, more], 1), **kwargs)
    assert whole[0, first.shape[1] :].tolist() != found[1][0].tolist()


def test_several_rows_go_on_from_their_own_lengths(ours, tokenizer) -> None:
    texts = [FIRST, "A list"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    more = ids_of(tokenizer, MORE, add_special_tokens=False).repeat(2, 1)
    cache = ours.new_cache(2)
    ours(**batch, past_key_values=cache)
    mask = torch.cat([batch.attention_mask, torch.ones_like(more)], 1)
    found = ours.generate(more, attention_mask=mask, past_key_values=cache, max_new_tokens=6)
    for row, text in enumerate(texts):
        whole = torch.cat([ids_of(tokenizer, text), more[:1]], 1)
        assert torch.equal(ours.generate(whole, max_new_tokens=6)[0, -6:], found[row, -6:])


def test_a_second_turn_of_a_padded_batch(ours, tokenizer) -> None:
    """Padding stands inside the rows then; each is as alone."""
    batch = tokenizer([FIRST, "A list"], return_tensors="pt", padding=True)
    end = int(ours.generate(**batch, max_new_tokens=9)[1, batch.input_ids.shape[1] + 1])
    cache = ours.new_cache(2)
    first = ours.generate(**batch, max_new_tokens=9, eos_token_id=[end], past_key_values=cache)
    assert (first[1] == end).any()
    width = batch.input_ids.shape[1]
    written = torch.cat([torch.ones(2, 1), (first[:, width:-1] != end).cumprod(1)], 1).long()
    more = ids_of(tokenizer, MORE, add_special_tokens=False).repeat(2, 1)
    ids = torch.cat([first, more], 1)
    mask = torch.cat([batch.attention_mask, written, torch.ones_like(more)], 1)
    assert int((mask[1] == 0).sum()) > int((batch.attention_mask[1] == 0).sum())
    found = ours.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6)
    for row in range(2):
        alone = ours.generate(ids[row, mask[row] != 0][None], max_new_tokens=6)
        assert torch.equal(found[row, -6:], alone[0, -6:])


def test_a_cache_that_does_not_fit_the_mask_is_refused(ours, tokenizer) -> None:
    first, more = ids_of(tokenizer, FIRST), ids_of(tokenizer, MORE, add_special_tokens=False)
    cache = ours.new_cache(1)
    ours(first[:, :5], past_key_values=cache)
    mask = torch.ones(1, first.shape[1] + more.shape[1])
    call = {"attention_mask": mask, "past_key_values": cache, "max_new_tokens": 2}
    with pytest.raises(ValueError, match=r"row 0 has \d+ tokens before.*holds 5; pass the whole"):
        ours.generate(more, **call)
    cache = ours.new_cache(1)
    ours(inputs_embeds=ours.get_input_embeddings()(first), past_key_values=cache)
    with pytest.raises(ValueError, match="does not know the ids of the .* inputs_embeds"):
        ours.generate(more, **{**call, "past_key_values": cache})


def test_transformers_own_cache_is_refused_by_name(models, tokenizer) -> None:
    """Empty, or filled by its class: it would be neither read nor filled."""
    ids = ids_of(tokenizer, FIRST)
    theirs, ours = models
    filled = theirs(ids, use_cache=True).past_key_values
    assert isinstance(filled, DynamicCache)
    told = r"cache of model.new_cache\(\), not DynamicCache: give model.new_cache\(1\)"
    for cache in (DynamicCache(), filled):
        for call in (ours.generate, ours, ours.model):
            with pytest.raises(TypeError, match=told):
                call(ids, past_key_values=cache)
        with pytest.raises(TypeError, match=told.replace("1", "3")):
            ours.generate(ids, past_key_values=cache, num_beams=3)


def test_several_threads_have_streamers_of_their_own(ours, tokenizer) -> None:
    prompts = ["The first argument", "Return a list of", "A", FIRST]
    alone = [
        tokenizer.decode(ours.generate(ids_of(tokenizer, text), max_new_tokens=12)[0])
        for text in prompts
    ]
    streamers = [TextIteratorStreamer(tokenizer, timeout=60) for _ in prompts]
    threads = [
        threading.Thread(
            target=ours.generate,
            args=(ids_of(tokenizer, text),),
            kwargs={"max_new_tokens": 12, "streamer": streamer},
        )
        for text, streamer in zip(prompts, streamers, strict=True)
    ]
    for thread in threads:
        thread.start()
    assert ["".join(streamer) for streamer in streamers] == alone
    for thread in threads:
        thread.join()


def test_dropped_context_is_reported(ours, tokenizer) -> None:
    first, more = ids_of(tokenizer, FIRST), ids_of(tokenizer, MORE, add_special_tokens=False)
    cache = ours.new_cache(1)
    ours(first, past_key_values=cache)
    with pytest.warns(UserWarning, match="holds 17 tokens with which the prompt of row 0 does not"):
        ours.generate(more, past_key_values=cache, max_new_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.generate(first, past_key_values=ours.new_cache(1), max_new_tokens=2)


@pytest.mark.parametrize(
    "wrong",
    [{"penalty_alpha": 0.6}, {"max_new_tokens": 10**6}, {"nonsense": 1}, {"num_beams": 2}],
    ids=str,
)
def test_a_refused_call_ends_its_streamer(ours, tokenizer, wrong: dict[str, Any]) -> None:
    """A reader in another thread would wait for ever."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)
    errors: list[Exception] = []

    def call() -> None:
        try:
            ours.generate([[1, 2]], streamer=streamer, **{"max_new_tokens": 2, **wrong})
        except (ValueError, TypeError) as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert "".join(streamer) == ""
    thread.join()
    assert len(errors) == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["one", "two"], "a list of str; use the checkpoint's tokenizer"),
        ([{"role": "user", "content": "a"}], "a list of dict; use the tokenizer's apply_chat"),
        ([torch.tensor([1, 2]), torch.tensor([3])], "a list of Tensor; stack tensors"),
    ],
    ids=["texts", "messages", "tensors"],
)
def test_wrong_inputs_are_named(ours, inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.generate(inputs, max_new_tokens=2)


def test_a_model_in_an_argument_takes_no_page(models) -> None:
    with pytest.raises(ValueError, match="^assistant_tokenizer=<Lfm2ForCausalLM> is not") as told:
        models[1].generate([[1]], assistant_tokenizer=models[0])
    assert len(str(told.value).splitlines()) == 1


def test_criteria_are_asked_after_the_first_token_too(models, tokenizer) -> None:
    """The criteria also get the last token, with its scores."""
    ids = ids_of(tokenizer, FIRST)
    lengths: dict[str, list[int]] = {}
    for name, model in zip(("theirs", "ours"), models, strict=True):
        seen = lengths.setdefault(name, [])

        def stop(text: torch.Tensor, scores: Any, seen: list[int] = seen, **_: Any) -> torch.Tensor:
            seen.append(text.shape[1])
            return torch.ones(len(text), dtype=torch.bool)

        made = model.generate(ids, max_new_tokens=8, stopping_criteria=[stop], do_sample=False)
        assert made.shape[1] == ids.shape[1] + 1
    assert lengths["ours"] == lengths["theirs"] == [ids.shape[1] + 1]
    ours = models[1]
    first = tokenizer.decode(ours.generate(ids, max_new_tokens=1)[0, -1])
    made = ours.generate(ids, max_new_tokens=8, stop_strings=[first], tokenizer=tokenizer)
    assert made.shape[1] == ids.shape[1] + 1


def test_processors_of_the_other_rows_look_up_no_missing_token(ours) -> None:
    def breaks(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert int(ids.min()) >= 0
        scores[0] = torch.nan
        return scores

    with pytest.raises(lfm2_fast.LogitsError, match="^row 0 has no token"):
        ours.generate([[1, 40], [1, 50]], max_new_tokens=5, logits_processor=[breaks])


@pytest.mark.parametrize("copies", [1, 2])
def test_a_cache_that_is_nearly_full_and_a_processor(ours, copies: int) -> None:
    cache = ours.new_cache(2, 256)
    ids = torch.arange(200)[None] % 90 + 5
    ids = ids if copies == 2 else ids.repeat(2, 1)
    call = {"past_key_values": cache, "output_scores": True, "return_dict_in_generate": True}
    drawn = {"do_sample": copies == 2, "num_return_sequences": copies, "seed": 1}
    for _ in range(2):
        made = ours.generate(ids, max_new_tokens=56, eos_token_id=None, **call, **drawn)
        assert made.sequences.shape == (2, 256) and len(made.scores) == 56


def test_a_streamed_text_ignores_no_argument(ours, tokenizer) -> None:
    from lfm2_fast.text.conversation import stream_answer

    for wrong in ({"num_return_sequences": 3, "do_sample": True}, {"no_repeat_ngram_size": 2}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is not supported for one"):
            stream_answer(ours, tokenizer, [1, 2], print, max_new_tokens=2, arguments=wrong)
