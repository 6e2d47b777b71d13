"""Lfm2ForCausalLM and Lfm2Model: the public classes, with Hugging Face's methods."""

from __future__ import annotations

from typing import Any

import torch

from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.hf.compiling import uncompiled
from lfm2_fast.hf.forward import (
    Wanted,
    as_asked,
    check_forward_args,
    forward,
    forward_base,
)
from lfm2_fast.hf.generate import generate
from lfm2_fast.hf.loss import loss_function, refuse_backward
from lfm2_fast.hf.outputs import BaseModelOutput, CausalLMOutput
from lfm2_fast.hf.pretrained import Lfm2PreTrainedModel
from lfm2_fast.hf.workspace import Workspace
from lfm2_fast.weights.formats import Projection


class Lfm2Model(Lfm2PreTrainedModel):
    """LFM2 model without its head: ``forward`` gives hidden states."""

    loss_function = staticmethod(loss_function)

    @property
    def embed_tokens(self) -> Projection:
        """Embedding: ``weight [V, H]``, called with ids it gives their rows."""
        return self.network.embed_tokens

    @property
    def embedding_norm(self) -> torch.nn.Module:
        """Norm after the last block: ``weight [H]``."""
        return self.network.embedding_norm

    @property
    def padding_idx(self) -> int | None:
        """Token id of padding, as the config says it."""
        return self.config.pad_token_id

    @property
    def layers(self) -> torch.nn.ModuleList:
        """Layers, which may have forward hooks; a hook sees packed tokens, ``[T, H]``."""
        return self.network.layers

    def get_output_embeddings(self) -> None:
        """Return None: there is no head."""
        return None

    @uncompiled
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        *,
        output_hidden_states: Wanted | None = None,
        output_attentions: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Return the hidden states of ``[B, T]`` tokens; see ``lfm2_fast.hf.forward.forward``."""
        packed = cu_seq_lens_q is not None or position_ids is not None
        check_forward_args(others, packed=packed)
        answer = forward_base(
            self,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_attentions,
            cu_seq_lens_q,
        )
        return as_asked(self, answer, return_dict)


class Lfm2ForCausalLM(Lfm2PreTrainedModel):
    """LFM2 language model with ``forward`` and ``generate`` as Hugging Face's class has them."""

    output_modalities = ("text",)
    loss_function = staticmethod(loss_function)

    @property
    def model(self) -> Lfm2Model:
        """Model without its head, on the same weights."""
        base = self.__dict__.get("_base")
        if base is None:
            base = Lfm2Model.__new__(Lfm2Model)
            torch.nn.Module.__init__(base)
            base._modules = self._modules
            # Without nn.Module's own __setattr__, which would add it to the modules with weights.
            self.__dict__["_base"] = base
        names = ("config", "max_length", "model_tags", "name_or_path", "training", "_generation")
        base.__dict__.update({name: getattr(self, name) for name in names})
        base.__dict__["workspace"] = Workspace()
        return base

    @property
    def lm_head(self) -> torch.nn.Module:
        """Head: ``weight [V, H]``."""
        return self.network.lm_head

    @uncompiled
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        *,
        output_hidden_states: Wanted | None = None,
        output_attentions: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Return logits of ``[B, T]`` tokens; see ``lfm2_fast.hf.forward.forward``."""
        packed = cu_seq_lens_q is not None or position_ids is not None
        check_forward_args(others, packed=packed)
        answer = forward(
            self,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            labels,
            use_cache,
            logits_to_keep,
            output_hidden_states,
            output_attentions,
            cu_seq_lens_q,
            num_items_in_batch,
            ignore_index,
            shift_labels,
        )
        if answer.loss is not None and torch.is_grad_enabled():
            answer.loss = refuse_backward(answer.loss)
        return as_asked(self, answer, return_dict)

    @uncompiled
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue prompts; see ``lfm2_fast.hf.generate.generate`` for the arguments."""
        return generate(self, *args, **kwargs)

    def compute_transition_scores(
        self,
        sequences: torch.Tensor,
        scores: tuple[torch.Tensor, ...],
        beam_indices: torch.Tensor | None = None,
        normalize_logits: bool = False,
    ) -> torch.Tensor:
        """Return the ``scores`` of the tokens that ``generate`` wrote, ``[B, steps]``.

        ``sequences``, ``scores`` (or ``logits``) and, with beams, ``beam_indices`` are of its
        answer. ``normalize_logits`` makes log-probabilities of them.
        """
        from transformers import GenerationMixin

        return GenerationMixin.compute_transition_scores(
            self, sequences, scores, beam_indices, normalize_logits
        )
