"""generate(): Hugging Face's call, arguments and return values, on packed rows.

Rows run at their own lengths and leave when they stop; padding exists only in what callers see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lfm2_fast.arguments import Arguments, understand
from lfm2_fast.cache import Cache, common_prefix
from lfm2_fast.decoder import Decoder
from lfm2_fast.model import Lfm2ForCausalLM, check_cache, unpadded
from lfm2_fast.sampling import SamplingState, draw, penalize, warp


@torch.no_grad()
def generate(
    model: Lfm2ForCausalLM,
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
    **kwargs: Any,
) -> Any:
    """Continue prompts, as Hugging Face's ``generate`` does.

    ``inputs`` (or ``input_ids``) is a tensor ``[B, T]``, a list of ids, a list of lists of unequal
    lengths, or what a tokenizer returns with ids and mask in it; None starts from the bos token.
    ``attention_mask [B, T]`` marks padding with zeros; without one it is inferred from the pad
    token, as Hugging Face does. Supported parameters, from the call, from ``generation_config``
    (transformers' object or a mapping) or from the checkpoint's own file: ``max_new_tokens``,
    ``max_length``, ``min_new_tokens``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``,
    ``min_p``, ``repetition_penalty``, ``eos_token_id`` (one or several), ``pad_token_id``,
    ``bos_token_id``, ``num_return_sequences``, ``stop_strings`` (with ``tokenizer``),
    ``return_dict_in_generate`` with ``output_scores`` and ``output_logits``.

    ``logits_processor`` is Hugging Face's callables over the whole batch ``(input_ids, scores)``,
    where rows that have stopped have zeros; ``stopping_criteria`` likewise, with the scores of all
    steps, or None unless ``output_scores`` is asked for. ``streamer`` gets the prompt, then every
    token, on the CPU. ``past_key_values`` is a cache of this model with one
    slot per returned row; ``inputs`` still hold the whole text, of which the longest prefix that
    the cache can restore is not run again, and the cache then holds all but the last token.
    ``seed``, else a number drawn from ``generator``, else from torch's own generator, decides
    every draw.

    Returns ids ``[B * num_return_sequences, T + new]`` on the prompts' device, the prompt first and
    rows that stopped early filled up with ``pad_token_id``; or, with ``return_dict_in_generate``,
    transformers' GenerateDecoderOnlyOutput. Raises ValueError or TypeError, naming the argument,
    for what is out of range, unknown or not supported.
    """
    ids, mask, where = _prompts(model, inputs, attention_mask, kwargs)
    asked = understand(
        kwargs, generation_config, model.generation_defaults(), model.config.vocab_size
    )
    if ids is None:
        if asked.bos_token_id is None:
            raise ValueError("generate() needs input_ids: the checkpoint names no bos_token_id")
        ids = torch.tensor([[asked.bos_token_id]])
    if mask is None:
        mask = _inferred_mask(ids, asked)
    ids = model.check_ids(ids)
    mask = unpadded(ids, mask.to(ids.device))
    empty = (~mask.any(-1)).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"input_ids row {empty[0]} has no tokens; every row needs one at least")
    run = _Run(model, asked, ids, mask, past_key_values, _seed(seed, generator))
    output = run.loop(
        list(logits_processor or ()),
        _criteria(asked, stopping_criteria, tokenizer),
        streamer,
    )
    output["sequences"] = output["sequences"].to(where or model.device)
    if not asked.return_dict_in_generate:
        return output["sequences"]
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(**output)


class _Run:
    """One call of generate: its rows, its cache, and what has been written so far."""

    def __init__(
        self,
        model: Lfm2ForCausalLM,
        asked: Arguments,
        ids: torch.Tensor,
        mask: torch.Tensor,
        cache: Cache | None,
        seed: int,
    ) -> None:
        self.asked = asked
        self.copies = asked.num_return_sequences
        rows, self.width = ids.shape[0] * self.copies, ids.shape[1]
        self.prompts = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        self.budget = asked.new_tokens(self.width, model.max_length)
        longest = max(map(len, self.prompts), default=0)
        if longest + self.budget > model.max_length:
            raise ValueError(
                f"a prompt of {longest} tokens and {self.budget} new ones do not fit into the "
                f"context of {model.max_length}; lower max_new_tokens (or load with a larger "
                "max_length, if the model allows it)"
            )
        if cache is None:
            cache = model.new_cache(rows)
        check_cache(cache, rows)
        if longest + self.budget > cache.max_length:
            raise ValueError(
                f"past_key_values has a max_length of {cache.max_length}, but a prompt of "
                f"{longest} tokens and {self.budget} new ones need {longest + self.budget}"
            )
        self.model = model
        self.cache = cache
        self.decoder = Decoder(model, cache)
        device = model.device
        lengths = torch.tensor([len(p) for p in self.prompts], device=device)
        self.eos = torch.tensor(asked.eos_token_id, dtype=torch.int64, device=device)
        self.text = torch.full((rows, self.width + self.budget), asked.pad_token_id, device=device)
        self.text[:, : self.width] = ids.repeat_interleave(self.copies, 0)
        seen = None
        if asked.sampling.repetition_penalty != 1.0:
            marks = torch.zeros(len(self.prompts), model.config.vocab_size + 1, device=device)
            # Padding marks a column of its own, which is then cut off: it must not be penalised.
            marks.scatter_(1, ids.masked_fill(~mask, model.config.vocab_size), 1)
            seen = marks[:, :-1].bool().repeat_interleave(self.copies, 0)
        self.state = SamplingState(
            [asked.sampling] * rows,
            device=device,
            seed=seed,
            positions=lengths.repeat_interleave(self.copies),
            seen=seen,
        )

    def loop(self, processors: list[Any], criteria: list[Any], streamer: Any) -> dict[str, Any]:
        """Write until every row has stopped; the fields of Hugging Face's output."""
        asked, rows = self.asked, len(self.text)
        kept_scores: list[torch.Tensor] = []
        kept_logits: list[torch.Tensor] = []
        shown = asked.output_scores or asked.output_logits
        live = list(range(rows))
        written = 0
        if streamer is not None:
            streamer.put(self.text[:, : self.width].cpu())
        try:
            logits = self._prefill() if rows else None
            while live and written < self.budget:
                assert logits is not None
                here = torch.tensor(live, device=self.text.device)
                if processors or shown or written < asked.min_new_tokens:
                    logits = logits.float()
                    scores = self._process(logits, here, written, processors)
                    tokens = self._choose(scores)
                    if asked.output_logits:
                        kept_logits.append(self._whole(logits, here))
                    if asked.output_scores:
                        kept_scores.append(self._whole(scores, here))
                else:
                    tokens = self.model.ops.sample(logits, self.state)
                column = self.width + written
                self.text[here, column] = tokens
                written += 1
                if streamer is not None:
                    streamer.put(self.text[:, column].cpu())
                stop = torch.isin(tokens, self.eos)
                past = tuple(kept_scores) if asked.output_scores and criteria else None
                for criterion in criteria:
                    verdict = torch.as_tensor(criterion(self.text[:, : column + 1], past))
                    stop |= verdict.to(stop.device).expand(rows)[here]
                going = [row for row, end in zip(live, stop.tolist(), strict=True) if not end]
                if len(going) < len(live):
                    self.state = self.state.pick([live.index(row) for row in going])
                if going and written < self.budget:
                    told = dict(zip(live, tokens.tolist(), strict=True))
                    logits = self.decoder.step([told[row] for row in going], going)
                live = going
        finally:
            if streamer is not None:
                streamer.end()
        return {
            "sequences": self.text[:, : self.width + written],
            "scores": tuple(kept_scores) if asked.output_scores else None,
            "logits": tuple(kept_logits) if asked.output_logits else None,
            "past_key_values": self.cache,
        }

    def _prefill(self) -> torch.Tensor:
        """Run what the cache does not hold of each prompt, once for all its copies."""
        slots = [row * self.copies for row in range(len(self.prompts))]
        rest = []
        for prompt, slot in zip(self.prompts, slots, strict=True):
            # The last token runs in any case: its logits are what comes next.
            held = self.cache.resume(slot, common_prefix(prompt[:-1], self.cache.history[slot]))
            rest.append(prompt[held:])
        logits = self.decoder.prefill(rest, slots)
        for slot in slots:
            for copy in range(slot + 1, slot + self.copies):
                self.cache.copy(slot, copy)
        return logits.repeat_interleave(self.copies, 0)

    def _process(
        self, logits: torch.Tensor, here: torch.Tensor, written: int, processors: list[Any]
    ) -> torch.Tensor:
        """Logits of the live rows -> scores, in Hugging Face's order."""
        scores, state = logits, self.state
        if state.seen is not None:
            scores = penalize(scores, state.seen, state.repetition_penalty)
        if written < self.asked.min_new_tokens:
            scores = scores.index_fill(1, self.eos, -torch.inf)
        if processors:
            whole, text = self._whole(scores, here), self.text[:, : self.width + written]
            for processor in processors:
                whole = processor(text, whole)
            scores = whole[here]
        return warp(scores, state) if state.all_drawn else scores

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Tokens of processed scores, marked in the state as ``Ops.sample`` marks its own."""
        state = self.state
        tokens = draw(scores, state.uniforms()) if state.all_drawn else scores.argmax(-1)
        state.advance(tokens)
        return tokens

    def _whole(self, values: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        """``values`` of the live rows among zeros for those that have stopped."""
        whole = values.new_zeros(len(self.text), values.shape[1])
        whole[here] = values
        return whole


def _prompts(
    model: Lfm2ForCausalLM, inputs: Any, attention_mask: Any, kwargs: dict[str, Any]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.device | None]:
    """Ids ``[B, T]``, mask and the caller's device, from whatever form the prompts came in."""
    if "input_ids" in kwargs:
        if inputs is not None:
            raise ValueError("give the prompts as inputs or as input_ids, not both")
        inputs = kwargs.pop("input_ids")
    if isinstance(inputs, Mapping) or hasattr(inputs, "input_ids"):
        if attention_mask is None:
            attention_mask = inputs.get("attention_mask")
        inputs = inputs["input_ids"]
    if inputs is None:
        return None, None, None
    mask = attention_mask
    if isinstance(mask, Sequence):
        rows = mask if mask and isinstance(mask[0], Sequence) else [mask]
        mask = _left_padded(rows, 0)[0]
    if isinstance(inputs, torch.Tensor):
        ids = inputs
    elif isinstance(inputs, str) or not isinstance(inputs, Sequence):
        raise ValueError(
            f"input_ids must be token ids (a tensor, or lists), got {type(inputs).__name__}; "
            "use the checkpoint's tokenizer to make them from text"
        )
    elif inputs and isinstance(inputs[0], Sequence):
        ids, left = _left_padded(inputs, model.config.pad_token_id or 0)
        mask = left if mask is None else mask
    else:
        ids = torch.tensor([list(inputs)], dtype=torch.int64)
    if ids.dim() == 1:
        ids = ids[None]
    if mask is not None and mask.dim() == 1:
        mask = mask[None]
    return ids, mask, inputs.device if isinstance(inputs, torch.Tensor) else None


def _left_padded(
    rows: Sequence[Sequence[int]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        if row:
            ids[i, -len(row) :] = torch.tensor(list(row), dtype=torch.int64)
            mask[i, -len(row) :] = 1
    return ids, mask


def _inferred_mask(ids: torch.Tensor, asked: Arguments) -> torch.Tensor:
    """Hugging Face's guess: the pad token is padding, unless it also ends texts."""
    if asked.pad_token_id in asked.eos_token_id:
        return torch.ones_like(ids)
    return ids != asked.pad_token_id


def _seed(seed: int | None, generator: torch.Generator | None) -> int:
    if seed is None:
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    if generator is not None:
        raise ValueError("give seed or generator, not both")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, got {seed}")
    return seed


def _criteria(asked: Arguments, stopping_criteria: Any, tokenizer: Any) -> list[Any]:
    criteria = list(stopping_criteria or ())
    if asked.stop_strings:
        if tokenizer is None:
            raise ValueError("stop_strings needs the tokenizer: pass tokenizer=...")
        from transformers import StopStringCriteria

        criteria.append(StopStringCriteria(tokenizer, list(asked.stop_strings)))
    return criteria
