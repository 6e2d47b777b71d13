"""generate(): Hugging Face's call, arguments and return values, on packed rows.

Rows run at their own lengths and leave when they stop. Only callers see padding.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from lfm2_fast.cache.batch import host_by_default
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.hf.checked_values import callables, whole_number
from lfm2_fast.hf.criteria import resolve_criteria
from lfm2_fast.hf.generate_loop import run_generate_loop
from lfm2_fast.hf.generation_args import resolve_args
from lfm2_fast.hf.generation_names import OF_THE_CALL
from lfm2_fast.hf.hooks import check_generates
from lfm2_fast.hf.pretrained import Lfm2PreTrainedModel
from lfm2_fast.hf.processors import replace_by_processors
from lfm2_fast.hf.prompts import gather_prompts, read_ids
from lfm2_fast.ops.cpu_threads import release_other_threads


# Not in a caller's inference mode either: a cache's tensors must be writable outside of it.
@torch.inference_mode(False)
@torch.no_grad()
@host_by_default()
def generate(
    model: Lfm2PreTrainedModel,
    inputs: Any = None,
    generation_config: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    *,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    max_batch_size: int | None = None,
    assistant_model: Any = None,
    **kwargs: Any,
) -> Any:
    """Continue prompts, as Hugging Face's ``generate`` does.

    ``inputs`` (or ``input_ids``) is a tensor ``[B, T]``, a list of ids, a list of lists of unequal
    lengths, or a tokenizer's result with ids and mask. None starts from the bos token.
    ``attention_mask [B, T]`` has zeros at padding. Without one, the mask follows from the pad
    token, as in Hugging Face's class. ``inputs_embeds [B, T, H]`` replace the ids of a prompt. The
    answer then begins with ``inputs``, or has only the new tokens.

    Parameters come from the call, from ``generation_config`` (transformers' object or a mapping) or
    from the checkpoint's own file. Supported ones for lengths and ends: ``max_new_tokens``,
    ``max_length``, ``min_new_tokens``, ``eos_token_id`` (one or several), ``pad_token_id``,
    ``bos_token_id``, ``stop_strings`` (with ``tokenizer``). For the choice of tokens:
    ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``,
    ``token_healing`` (with ``tokenizer``), ``num_beams`` with ``length_penalty`` and
    ``early_stopping``. For the answer: ``num_return_sequences``, ``return_dict_in_generate`` with
    ``output_scores``, ``output_logits`` and ``output_hidden_states``.

    ``logits_processor`` are Hugging Face's callables over the whole batch ``(input_ids, scores)``,
    with zeros for stopped rows. ``stopping_criteria`` are called in the same way, with the scores
    of all steps, or None without ``output_scores``. ``streamer`` gets the prompt, then every token,
    on the CPU.

    ``past_key_values`` is a cache of this model with one slot per returned row, or per beam.
    ``inputs`` have the whole text; the longest prefix that the cache can restore does not run
    again. Or they have only the new tokens, with an ``attention_mask`` of more columns, which
    counts the tokens in the cache. After the call the cache holds all tokens but the last.

    ``max_batch_size`` limits the rows that are written at the same time. When one stops, the next
    prompt takes its place. The answer is in the order of the prompts. A terminal shows progress.
    Callables and streamers need all rows at the same time.

    ``prompt_lookup_num_tokens``, with ``max_matching_ngram_size``, and ``assistant_model``, a model
    of ``load`` or of transformers with the same vocabulary, draft tokens. They change no text.
    Calls whose Python follows each step run without drafts, and so do steps of beams.

    ``seed`` decides every draw. Without it the seed is drawn from ``generator``, or from torch's
    own generator. With beams and neither of the two, torch's own generator draws as in Hugging
    Face's call: after ``torch.manual_seed`` the texts are the same.

    Returns ids ``[B * num_return_sequences, T + new]`` on the prompts' device. A row begins with
    its prompt, and ``pad_token_id`` follows its end. With ``return_dict_in_generate`` it returns
    transformers' GenerateDecoderOnlyOutput or, with beams, GenerateBeamDecoderOnlyOutput.

    Raises ValueError or TypeError, which name the argument, for one that is out of range, unknown
    or not supported. Raises HookError for a hook that would never be called. Raises
    torch.OutOfMemoryError, with advice, if the memory is too small. Raises LogitsError, a
    RuntimeError with row, token and position, if the best logit of a row is NaN or infinite. A
    cache then holds the tokens that have run.
    """
    with ExitStack() as ending:
        # A web framework may run the next call in another of its threads.
        ending.callback(release_other_threads)
        if streamer is not None:
            # After any failure, also before the first step: a thread may wait for the text.
            ending.callback(streamer.end)
        processors = callables("logits_processor", logits_processor)
        criteria = callables("stopping_criteria", stopping_criteria)
        check_generates(model)
        ids, mask, where = read_ids(model, inputs, attention_mask, kwargs)
        embeds = kwargs.pop("inputs_embeds", None)
        given = {name: kwargs.pop(name, None) for name in OF_THE_CALL}
        of_the_call = {name: value for name, value in given.items() if value is not None}
        asked = resolve_args(
            kwargs, generation_config, model.generation_defaults(), model.network.config.vocab_size
        )
        beams = asked.num_beams > 1
        if beams and streamer is not None:
            raise ValueError(
                f"streamer cannot follow num_beams={asked.num_beams}: the texts change until the "
                "end; leave one of them out"
            )
        if "guidance_scale" in asked.processed and ids is None and embeds is not None:
            if "negative_prompt_ids" not in of_the_call:
                raise ValueError(
                    "guidance_scale needs input_ids or negative_prompt_ids beside inputs_embeds: "
                    "it runs ids of its own"
                )
        prompts = gather_prompts(model, asked, ids, mask, where, embeds, past_key_values, tokenizer)
        width = prompts.ids.shape[1]
        asked = asked.beside_embeddings(prompts.width - width)
        asked, criteria = resolve_criteria(asked, criteria, tokenizer, width)
        if not (asked.processed or of_the_call or beams):
            asked, processors = replace_by_processors(asked, processors)
        assistant = None
        if assistant_model is not None:
            assistant = model.workspace.assistant(assistant_model)
        by_torch = beams and len(prompts) > 0 and seed is None and generator is None
        output = run_generate_loop(
            model,
            asked,
            prompts,
            past_key_values,
            None if by_torch else seed_of(seed, generator),
            processors=processors,
            criteria=criteria,
            streamer=streamer,
            most_rows=max_batch_size,
            of_the_call=of_the_call,
            assistant=assistant,
        )
        output["sequences"] = output["sequences"].to(prompts.device or model.device)
        if not asked.return_dict_in_generate:
            return output["sequences"]
        from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

        return (GenerateBeamDecoderOnlyOutput if beams else GenerateDecoderOnlyOutput)(**output)


def seed_of(seed: int | None, generator: torch.Generator | None) -> int:
    """Return ``seed``, or a number drawn from ``generator``, or from torch's own generator.

    Raises ValueError for both, and for a seed out of range.
    """
    if seed is None:
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    if generator is not None:
        raise ValueError("give seed or generator, not both")
    found = whole_number(seed)
    if found is None:
        raise ValueError(f"seed must be a whole number, got {seed!r}")
    if not 0 <= found < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, got {seed}")
    return found
