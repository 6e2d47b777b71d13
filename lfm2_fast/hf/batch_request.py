"""Requests of ``generate_batch``: a prompt and its settings -> a request; its answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lfm2_fast.engine.request import Hook, Request
from lfm2_fast.hf.checked_values import callables, whole_number
from lfm2_fast.hf.criteria import stop_criterion
from lfm2_fast.hf.generate import seed_of
from lfm2_fast.hf.generation_args import GenerationArgs, resolve_args
from lfm2_fast.hf.generation_names import OF_THE_CALL
from lfm2_fast.hf.pretrained import Lfm2PreTrainedModel
from lfm2_fast.hf.processors import logits_processors
from lfm2_fast.ops.sampling import SamplingParams

# Arguments of generate that follow all rows of a call, or shape its prompts or its answer.
NEEDS_ALL_ROWS = {
    *OF_THE_CALL,
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "past_key_values",
    "stopping_criteria",
    "streamer",
    "num_beams",
    "max_time",
    "assistant_model",
    "guidance_scale",
    "watermarking_config",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_hidden_states",
    "token_healing",
}


@dataclass
class Generated:
    """Answers to one prompt of ``generate_batch``.

    ``index`` is the prompt's place, ``prompt`` its token ids. ``sequences`` are the new tokens of
    each continuation, end token included, and ``finish_reasons`` "stop" or "length" of each.
    ``texts`` are the decoded sequences, None without a tokenizer. ``error`` is set if the prompt
    failed. The other fields may be empty then.
    """

    index: int
    prompt: list[int] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)
    finish_reasons: list[str | None] = field(default_factory=list)
    texts: list[str] | None = None
    error: Exception | None = None

    @property
    def tokens(self) -> list[int]:
        """New tokens of the first continuation."""
        return self.sequences[0]

    @property
    def text(self) -> str:
        """Text of the first continuation. Raises ValueError without a tokenizer."""
        if self.texts is None:
            raise ValueError("there is no text: pass tokenizer= to generate_batch()")
        return self.texts[0]

    @property
    def finish_reason(self) -> str | None:
        """Reason why the first continuation ended."""
        return self.finish_reasons[0]


class Maker:
    """Makes requests for ``model``. ``settings`` are the defaults of all prompts.

    ``seed`` decides the draws of prompts without their own seed. Their rows are counted in the
    order of the prompts.
    """

    def __init__(
        self,
        model: Lfm2PreTrainedModel,
        tokenizer: Any,
        settings: Mapping[str, Any],
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.settings, self.seed = model, tokenizer, settings, seed
        self.asked = self._resolved(settings)
        self._criteria: dict[tuple[str, ...], Any] = {}
        self._rows = 0

    def request(self, item: Any, most: int, made: Generated) -> Request:
        """Return the request of a prompt, and note its tokens and continuations in ``made``.

        The context has at most ``most`` tokens. Raises ValueError or TypeError for an argument that
        is not supported, and for a prompt that does not fit.
        """
        own: Mapping[str, Any] = {}
        if isinstance(item, Mapping):
            if "prompt" not in item:
                raise ValueError(f"a mapping needs a 'prompt', got {sorted(map(str, item))}")
            own = {name: value for name, value in item.items() if name != "prompt"}
            item = item["prompt"]
        asked, seed = self.asked, None
        if own:
            wrong = sorted(NEEDS_ALL_ROWS & own.keys())
            if wrong:
                raise ValueError(f"{wrong[0]} is not supported for one prompt: call generate()")
            given = dict(own)
            wanted = given.pop("seed", None)
            seed = None if wanted is None else seed_of(wanted, None)
            asked = self._resolved({**self.settings, **given})
        prompt = self._ids(item)
        made.prompt = prompt
        budget = asked.new_tokens(len(prompt), most)
        if len(prompt) + budget > most:
            raise ValueError(
                f"{len(prompt)} tokens and {budget} new ones do not fit into {most} tokens of "
                "context; shorten the prompt, lower max_new_tokens, or give more memory if the "
                "model's context is longer"
            )
        hook = self._hook(asked, prompt, budget, {**self.settings, **own}.get("logits_processor"))
        count = asked.num_return_sequences
        request = Request(
            prompt,
            asked.sampling if hook is None else SamplingParams(asked.sampling.do_sample),
            asked.eos_token_id,
            budget,
            min_tokens=min(asked.min_new_tokens, budget) if hook is None else 0,
            stop=self._stop(asked, prompt) if asked.stop_strings else None,
            seed=self.seed if seed is None else seed,
            first_row=self._rows if seed is None else 0,
            n=count,
            hook=hook,
            prompt_lookup=asked.prompt_lookup_num_tokens,
            lookup_ngram=asked.max_matching_ngram_size,
        )
        request.check(self.model.network.config.vocab_size, most)
        self._rows += count if seed is None else 0
        made.sequences = [[] for _ in range(count)]
        made.finish_reasons = [None] * count
        return request

    def decoded(self, made: Generated) -> Generated:
        """Return an answer with its texts, if there is a tokenizer."""
        if self.tokenizer is None:
            return made
        decode = self.tokenizer.decode
        texts = [decode(tokens, skip_special_tokens=True) for tokens in made.sequences]
        return replace(made, texts=texts)

    def _resolved(self, settings: Mapping[str, Any]) -> GenerationArgs:
        given = {name: value for name, value in settings.items() if name != "logits_processor"}
        config = given.pop("generation_config", None)
        vocab_size = self.model.network.config.vocab_size
        asked = resolve_args(given, config, self.model.generation_defaults(), vocab_size)
        of_config = {
            "num_beams": asked.num_beams > 1,
            "max_time": asked.max_time < math.inf,
            "return_dict_in_generate": asked.return_dict_in_generate,
            "token_healing": asked.token_healing,
        }
        wrong = [name for name, is_asked in of_config.items() if is_asked]
        wrong += sorted(NEEDS_ALL_ROWS & asked.processed.keys())
        if wrong:
            raise ValueError(
                f"{wrong[0]} of generation_config is not supported by generate_batch(): "
                "call generate()"
            )
        if asked.stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings needs the tokenizer: pass tokenizer=...")
        return asked

    def _ids(self, item: Any) -> list[int]:
        if isinstance(item, torch.Tensor):
            if item.dim() != 1 or item.is_floating_point():
                raise ValueError(
                    f"a prompt must be token ids [T], got {tuple(item.shape)} of {item.dtype}"
                )
            return item.tolist()
        messages = isinstance(item, Sequence) and bool(item) and isinstance(item[0], Mapping)
        if isinstance(item, str) or messages:
            if self.tokenizer is None:
                kind = "a conversation" if messages else "a text"
                raise ValueError(f"{kind} needs the tokenizer: pass tokenizer=...")
            if messages:
                found = self.tokenizer.apply_chat_template(
                    item, add_generation_prompt=True, return_dict=True
                )
            else:
                found = self.tokenizer(item)
            return list(found["input_ids"])
        if not isinstance(item, Sequence) or isinstance(item, bytes):
            raise TypeError(
                "a prompt must be token ids, a text, a conversation or a mapping with a 'prompt', "
                f"not {type(item).__name__}"
            )
        ids = [whole_number(token) for token in item]
        if None in ids:
            wrong = item[ids.index(None)]
            raise ValueError(f"a prompt must be token ids, got {wrong!r} among them")
        return [token for token in ids if token is not None]

    def _hook(
        self, asked: GenerationArgs, prompt: list[int], budget: int, passed: Any
    ) -> Hook | None:
        """Return transformers' processors of one row, in its order, if there are any."""
        processors = callables("logits_processor", passed)
        if not asked.processed and not processors:
            return None
        device = self.model.device
        ids = torch.tensor([prompt], device=device)
        chain = logits_processors(
            self.model, asked, ids, torch.ones_like(ids), budget, processors, {}
        )

        def hook(text: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
            return chain(torch.tensor([list(text)], device=device), logits[None])[0]  # type: ignore[operator]

        return hook

    def _stop(self, asked: GenerationArgs, prompt: list[int]) -> Callable[[Sequence[int]], bool]:
        """Return a function that looks for stop strings at the end of a text."""
        if asked.stop_strings not in self._criteria:
            self._criteria[asked.stop_strings] = stop_criterion(asked, self.tokenizer)
        criterion = self._criteria[asked.stop_strings]

        def stop(written: Sequence[int]) -> bool:
            end = [*prompt, *written][-criterion.maximum_token_len :]
            return bool(criterion(torch.tensor([end]), None))

        return stop
