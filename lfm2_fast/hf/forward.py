"""Hugging Face's forward calls: padded or packed ids in, hidden states or logits out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lfm2_fast.cache.batch import host_by_default
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.hf.hooks import check_called
from lfm2_fast.hf.loss import loss_function
from lfm2_fast.hf.outputs import BaseModelOutput, CausalLMOutput, ModelOutput
from lfm2_fast.hf.packing import Packed, pack
from lfm2_fast.hf.pretrained import Lfm2PreTrainedModel

# Arguments of Hugging Face's forward without effect here, each with the reason.
NO_EFFECT = {
    "cu_seq_lens_k": "keys are those of the queries",
    "max_length_q": "it follows from cu_seq_lens_q",
    "max_length_k": "it follows from cu_seq_lens_q",
    "output_router_logits": "the model has no experts",
    "cache_position": "the cache knows its length",
    "seq_idx": "it repeats what `cu_seq_lens_q` or `position_ids` say; alone it is refused",
}
# True for the outputs of all layers, or the indices of wanted ones.
Wanted = bool | int | Sequence[int]
NO_ATTENTIONS = "attention is fused: use transformers' class with attn_implementation='eager'"


def check_forward_args(others: Mapping[str, Any], *, packed: bool) -> None:
    """Check arguments that a forward call does not use. ``packed`` is True if rows may be packed.

    Raises ValueError for an unsupported argument, and TypeError for an unknown name.
    """
    for name, value in others.items():
        if name == "seq_idx" and not packed and value is not None:
            raise ValueError("seq_idx alone is not supported: give cu_seq_lens_q or position_ids")
        if name == "is_causal" and value is False:
            raise ValueError("is_causal=False is not supported: the model is causal")
        if name not in NO_EFFECT and name != "is_causal":
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")


class _Run:
    """One forward pass: the packed inputs, and the results of the blocks."""

    def __init__(
        self,
        model: Lfm2PreTrainedModel,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        cu_seq_lens_q: torch.Tensor | None,
        output_attentions: bool | None,
    ) -> None:
        check_called(model)
        model.network.check_hooks()
        if output_attentions:
            raise ValueError(f"output_attentions=True is not supported: {NO_ATTENTIONS}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        self.network, self.config = model.network, model.config
        if input_ids is not None:
            self.like = check_ids(model, input_ids)
        else:
            assert inputs_embeds is not None
            self.like = check_embeds(model, inputs_embeds)
        self.packed: Packed = pack(
            model, self.like, attention_mask, position_ids, past_key_values, cu_seq_lens_q
        )
        tokens = self.like[self.packed.mask]
        self.tokens = tokens if input_ids is not None else None
        self.embeds = tokens if input_ids is None else None

    def columns(self, keep: int | torch.Tensor) -> torch.Tensor:
        """Return the columns that ``logits_to_keep`` names; 0 is all."""
        device = self.packed.mask.device
        if isinstance(keep, torch.Tensor):
            return keep.to(device)
        return torch.arange(self.like.shape[1], device=device)[-keep:]

    def blocks(self, collected: list[torch.Tensor] | None) -> Any:
        """Run the blocks and count the tokens in the cache; return the stream ``[T, H]``."""
        cache, batch = self.packed.cache, self.packed.batch
        cache.reserve(batch)
        x = self.network.run_blocks(
            self.tokens, batch, cache, embeds=self.embeds, collected=collected
        )
        cache.commit_batch(batch)
        if self.tokens is not None:
            counts = batch.required_host.query_lengths
            cache.record_tokens(batch, (c.tolist() for c in self.tokens.cpu().split(list(counts))))
        return x

    def hidden_states(
        self, collected: list[torch.Tensor], last: torch.Tensor, wanted: Wanted
    ) -> tuple[torch.Tensor | None, ...]:
        """Return every layer's output, padded as the call was; the last one is normed.

        If ``wanted`` has indices, the other layers have None, as in Hugging Face's class.
        """
        every, states = self.columns(0), [*collected[:-1], last]
        chosen = set(range(len(states)))
        if not isinstance(wanted, bool):
            given = [wanted] if isinstance(wanted, int) else wanted
            chosen &= {i + len(states) if i < 0 else i for i in given}
        return tuple(
            self.packed.unpack(each, every) if i in chosen else None
            for i, each in enumerate(states)
        )

    def kept_cache(self, use_cache: bool | None) -> Cache | None:
        """Return the cache for the answer, if the caller wants it and it can be used further.

        Without the caller's choice, the config decides.
        """
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True)
        return None if use_cache is False or self.packed.is_split else self.packed.cache


@torch.no_grad()
@host_by_default()
def forward_base(
    model: Lfm2PreTrainedModel,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: torch.Tensor | None = None,
    use_cache: bool | None = None,
    output_hidden_states: Wanted | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
) -> BaseModelOutput:
    """Return the hidden states of ``[B, T]`` tokens, continuing ``past_key_values`` where given.

    The arguments are those of ``forward``. At padding, hidden states are zeros.
    """
    run = _Run(
        model,
        input_ids,
        inputs_embeds,
        attention_mask,
        position_ids,
        past_key_values,
        cu_seq_lens_q,
        output_attentions,
    )
    wanted = _wanted(model, output_hidden_states)
    collected: list[torch.Tensor] = []
    last = run.network.last_norm(run.blocks(collected if wanted else None))
    return BaseModelOutput(
        last_hidden_state=run.packed.unpack(last, run.columns(0)),
        past_key_values=run.kept_cache(use_cache),
        hidden_states=run.hidden_states(collected, last, wanted) if wanted else None,
    )


@torch.no_grad()
@host_by_default()
def forward(
    model: Lfm2PreTrainedModel,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    output_hidden_states: Wanted | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
) -> CausalLMOutput:
    """Return logits of ``[B, T]`` tokens, continuing ``past_key_values`` where given.

    Tokens are ``input_ids [B, T]`` or ``inputs_embeds [B, T, H]``. ``attention_mask [B, T]`` has
    zeros at padding, on the left or the right; logits there are zeros. It may be the longer mask of
    a whole conversation; its last T columns count. ``position_ids`` may be those that the mask
    implies. If they restart at 0 within a row, the row has several sequences. ``cu_seq_lens_q [S +
    1]`` says the same of a single row. ``logits_to_keep`` is a number of last columns, or a tensor
    of indices; 0 keeps all.

    ``labels [B, T]`` ask for the loss: the mean cross-entropy of the next token, without
    ``ignore_index``, or its sum over ``num_items_in_batch``. ``shift_labels`` are labels that are
    shifted already. ``output_hidden_states`` is True for every layer's output, or has the wanted
    indices; the other layers then have None. Logits and loss may be NaN or infinite, as Hugging
    Face's.

    Raises HookError for a hook that would never be called. Raises ValueError, which names the
    argument, for ids out of range, a mask with holes, other positions, a cache of another batch
    size, or an unsupported argument.
    """
    run = _Run(
        model,
        input_ids,
        inputs_embeds,
        attention_mask,
        position_ids,
        past_key_values,
        cu_seq_lens_q,
        output_attentions,
    )
    columns = run.columns(logits_to_keep)
    wanted = _wanted(model, output_hidden_states)
    collected: list[torch.Tensor] = []
    x = run.blocks(collected if wanted else None)
    states = None
    if wanted:
        states = run.hidden_states(collected, run.network.last_norm(x), wanted)
    logits = run.packed.unpack(run.network.logits(x, run.packed.places(columns)), columns)
    loss = None
    if labels is not None:
        loss = loss_function(logits, labels, None, num_items_in_batch, ignore_index, shift_labels)
    return CausalLMOutput(
        loss=loss,
        logits=logits,
        past_key_values=run.kept_cache(use_cache),
        hidden_states=states,
    )


def _wanted(model: Lfm2PreTrainedModel, output_hidden_states: Wanted | None) -> Wanted:
    if output_hidden_states is None:
        return bool(getattr(model.config, "output_hidden_states", False))
    return output_hidden_states


def as_asked(model: Lfm2PreTrainedModel, answer: ModelOutput, return_dict: bool | None) -> Any:
    """Return the answer of a forward call, as a tuple if the caller or the config wants one."""
    if return_dict is None:
        return_dict = getattr(model.config, "return_dict", True)
    return answer if return_dict else answer.to_tuple()


def check_ids(model: Lfm2PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Return ``input_ids [B, T]`` on the model's device, as int64.

    Raises ValueError for another shape or dtype, and for ids that are not in the vocabulary.
    """
    return checked_ids(model, input_ids).to(model.device, torch.int64)


def checked_ids(model: Lfm2PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Return ``input_ids`` unchanged. Raises ValueError unless ``[B, T]`` and in range."""
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.is_complex():
        raise ValueError(
            "input_ids must be integers of shape [batch, tokens], got "
            f"{tuple(input_ids.shape)} of {input_ids.dtype}"
        )
    vocab_size = model.network.config.vocab_size
    wrong = (input_ids < 0) | (input_ids >= vocab_size)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids[{row}, {column}] is {int(input_ids[row, column])}, but this model's "
            f"vocabulary has {vocab_size} tokens; is the tokenizer another model's?"
        )
    return input_ids


def check_embeds(model: Lfm2PreTrainedModel, embeds: torch.Tensor) -> torch.Tensor:
    """Return ``embeds [B, T, H]`` in the model's dtype, on its device.

    Raises ValueError for another shape, and for integers.
    """
    hidden = model.network.config.hidden_size
    if embeds.dim() != 3 or embeds.shape[2] != hidden or not embeds.is_floating_point():
        raise ValueError(
            f"inputs_embeds must be numbers of shape [batch, tokens, {hidden}], got "
            f"{tuple(embeds.shape)} of {embeds.dtype}"
        )
    return embeds.to(model.device, model.dtype)
