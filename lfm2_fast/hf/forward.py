"""Hugging Face's forward calls: padded or packed ids in, hidden states or logits out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from lfm2_fast.cache.batch import host_by_default
from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.hf.outputs import BaseModelOutput, CausalLMOutput
from lfm2_fast.hf.packing import Packed, pack
from lfm2_fast.hf.pretrained import INFERENCE, Lfm2PreTrainedModel

# Arguments of Hugging Face's forward that say what is so anyway, each with why.
NO_EFFECT = {
    "cu_seq_lens_k": "keys are those of the queries",
    "max_length_q": "it follows from cu_seq_lens_q",
    "max_length_k": "it follows from cu_seq_lens_q",
    "output_router_logits": "the model has no experts",
    "cache_position": "the cache knows its length",
}


def check_forward_args(others: Mapping[str, Any], *, packed: bool) -> None:
    """Check arguments that a forward call does not use; ``packed`` says that rows may be packed.

    Raises ValueError for what is not supported and TypeError for a name that nobody knows.
    """
    for name, value in others.items():
        if name == "seq_idx" and (packed or value is None):
            continue  # it repeats what cu_seq_lens_q or position_ids say
        if name == "seq_idx":
            raise ValueError("seq_idx alone is not supported: give cu_seq_lens_q or position_ids")
        if name == "is_causal" and value is False:
            raise ValueError("is_causal=False is not supported: the model is causal")
        if name not in NO_EFFECT and name != "is_causal":
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")


class _Run:
    """One forward pass: the packed inputs, and what came out of the blocks."""

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
        if output_attentions:
            raise ValueError(
                "output_attentions=True is not supported: attention is fused and its weights are "
                "never written; use transformers' class with attn_implementation='eager'"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        self.network = model.network
        if input_ids is not None:
            self.like = check_ids(model, input_ids)
        else:
            assert inputs_embeds is not None
            self.like = _check_embeds(model, inputs_embeds)
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
        """Run the blocks and count the tokens in the cache; the residual stream ``[T, H]``."""
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
        self, collected: list[torch.Tensor] | None, last: torch.Tensor
    ) -> tuple[torch.Tensor, ...] | None:
        """Return every layer's output, padded as the call was; the last one is normed."""
        if collected is None:
            return None
        every = self.columns(0)
        return tuple(self.packed.unpack(each, every) for each in [*collected[:-1], last])

    def kept_cache(self, use_cache: bool | None) -> Cache | None:
        """Return the cache for the answer, if it was asked for and is of further use."""
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
    output_hidden_states: bool | None = None,
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
    collected: list[torch.Tensor] | None = [] if wanted else None
    last = run.network.last_norm(run.blocks(collected))
    return BaseModelOutput(
        last_hidden_state=run.packed.unpack(last, run.columns(0)),
        past_key_values=run.kept_cache(use_cache),
        hidden_states=run.hidden_states(collected, last),
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
    output_hidden_states: bool | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> CausalLMOutput:
    """Return logits of ``[B, T]`` tokens, continuing ``past_key_values`` where given.

    Tokens are ``input_ids [B, T]`` or ``inputs_embeds [B, T, H]``. ``attention_mask``, ``[B, T]``
    or the longer one of a whole conversation whose last T columns count, marks padding on the left
    or the right with zeros; logits there are zeros. ``position_ids`` may say what the mask implies,
    or restart at 0 within a row: then the row holds several sequences, as ``cu_seq_lens_q [S + 1]``
    says of a single row. ``logits_to_keep`` keeps the last so many columns, or those of an index
    tensor; 0 keeps all. ``labels [B, T]`` ask for the loss: the mean cross-entropy of the next
    token, -100 left out, or its sum over ``num_items_in_batch``. ``output_hidden_states`` asks for
    every layer's output. Raises ValueError, naming the argument, for ids out of range, a mask with
    holes, positions that fit neither, a cache of another batch size, and what is not supported.
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
    collected: list[torch.Tensor] | None = [] if _wanted(model, output_hidden_states) else None
    x = run.blocks(collected)
    states = None
    if collected is not None:
        states = run.hidden_states(collected, run.network.last_norm(x))
    logits = run.packed.unpack(run.network.logits(x, run.packed.places(columns)), columns)
    loss = None
    if labels is not None:
        loss = causal_loss(logits, labels, num_items_in_batch)
    return CausalLMOutput(
        loss=loss,
        logits=logits,
        past_key_values=run.kept_cache(use_cache),
        hidden_states=states,
    )


def _wanted(model: Lfm2PreTrainedModel, output_hidden_states: bool | None) -> bool:
    if output_hidden_states is None:
        return bool(getattr(model.config, "output_hidden_states", False))
    return output_hidden_states


def causal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Return the cross-entropy in nats of ``labels [B, T]`` shifted by one, from float32 logits.

    As Hugging Face's loss for causal models: the mean over labels that are not ``ignore_index``, or
    the sum over ``num_items_in_batch``.
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, the logits {tuple(logits.shape[:2])}; with "
            "labels, leave logits_to_keep out"
        )
    targets = F.pad(labels.to(logits.device), (0, 1), value=ignore_index)[:, 1:].flatten()
    how = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), targets, ignore_index=ignore_index, reduction=how
    )
    if num_items_in_batch is None:
        return loss
    return loss / torch.as_tensor(num_items_in_batch, device=loss.device)


class _NoBackward(torch.autograd.Function):
    """The identity, whose backward pass says that there is none."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(f"backward() is not supported: {INFERENCE}")


def refuse_backward(loss: torch.Tensor) -> torch.Tensor:
    """Return ``loss`` such that its ``backward()`` raises RuntimeError, saying what to do."""
    return _NoBackward.apply(loss, torch.zeros((), requires_grad=True))


def check_ids(model: Lfm2PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """``input_ids`` on the model's device. Raises ValueError unless ``[B, T]`` and in range."""
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
    return input_ids.to(model.device, torch.int64)


def _check_embeds(model: Lfm2PreTrainedModel, embeds: torch.Tensor) -> torch.Tensor:
    hidden = model.network.config.hidden_size
    if embeds.dim() != 3 or embeds.shape[2] != hidden or not embeds.is_floating_point():
        raise ValueError(
            f"inputs_embeds must be numbers of shape [batch, tokens, {hidden}], got "
            f"{tuple(embeds.shape)} of {embeds.dtype}"
        )
    return embeds.to(model.device, model.dtype)
