"""Lfm2ForCausalLM: the class that people call, with Hugging Face's methods."""

from __future__ import annotations

from typing import Any

import torch

from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.hf.forward import CausalLMOutput, forward
from lfm2_fast.hf.generate import generate
from lfm2_fast.hf.pretrained import Lfm2PreTrainedModel


class Lfm2ForCausalLM(Lfm2PreTrainedModel):
    """An LFM2 language model with ``forward`` and ``generate`` as Hugging Face's class has them."""

    # transformers' pipelines ask a model for these.
    input_modalities = output_modalities = ("text",)

    def can_generate(self) -> bool:
        """Return True: the model has ``generate``."""
        return True

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool = True,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Return logits of ``input_ids [B, T]``; see ``lfm2_fast.hf.forward.forward``."""
        return forward(
            self, input_ids, attention_mask, past_key_values, use_cache, logits_to_keep, return_dict
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue prompts; see ``lfm2_fast.hf.generate.generate`` for the arguments."""
        return generate(self, *args, **kwargs)

    def compute_transition_scores(
        self,
        sequences: torch.Tensor,
        scores: tuple[torch.Tensor, ...],
        beam_indices: None = None,
        normalize_logits: bool = False,
    ) -> torch.Tensor:
        """Return the ``scores`` of the tokens that ``generate`` wrote, ``[B, steps]``.

        ``sequences`` and ``scores`` (or ``logits``) are of its answer. ``normalize_logits`` makes
        log-probabilities of them. Raises ValueError for ``beam_indices``: there are no beams.
        """
        if beam_indices is not None:
            raise ValueError("beam_indices is not supported by lfm2_fast: leave it out")
        each = torch.stack(scores, 1)
        if normalize_logits:
            each = each.log_softmax(-1)
        written = sequences[:, -len(scores) :].to(each.device)
        return each.gather(-1, written[..., None])[..., 0]
