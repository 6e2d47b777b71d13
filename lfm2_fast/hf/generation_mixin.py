"""Private methods of transformers' GenerationMixin, checked before this package uses them."""

from __future__ import annotations

import inspect
from typing import Any

# Versions of transformers on which tests of beams and logits processors were run.
KNOWN = ("5.20.2", "5.23.0")
# User -> methods that it calls or replaces, each with the parameters that are passed by name.
METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "logits processors of arguments": {
        "_get_logits_processor": (
            "input_ids_seq_length", "encoder_input_ids", "logits_processor", "device",
            "model_kwargs", "prefix_allowed_tokens_fn", "negative_prompt_ids",
            "negative_prompt_attention_mask",
        ),
    },
    "num_beams": {
        "_beam_search": ("logits_processor", "stopping_criteria", "generation_config"),
        "_prefill": (),
        "_update_model_kwargs_for_generation": (),
        "_beam_search_has_unfinished_sequences": (),
        "_get_top_k_continuations": ("accumulated_log_probs", "do_sample", "beams_to_keep"),
    },
}  # fmt: skip


def generation_mixin(user: str) -> Any:
    """Return transformers' class for ``user``, a key of METHODS.

    Raises RuntimeError where a method is missing or takes other parameters.
    """
    from transformers import GenerationMixin

    for name, parameters in METHODS[user].items():
        method = getattr(GenerationMixin, name, None)
        if method is None:
            raise RuntimeError(f"GenerationMixin has no {name}: {_advice(user)}")
        missing = [p for p in parameters if p not in inspect.signature(method).parameters]
        if missing:
            raise RuntimeError(f"GenerationMixin.{name} takes no {missing[0]}: {_advice(user)}")
    return GenerationMixin


def not_known(user: str, name: str) -> AttributeError:
    """Return the error for an attribute that transformers' methods for ``user`` need and lack."""
    return AttributeError(f"GenerationMixin asks its model for {name}: {_advice(user)}")


def _advice(user: str) -> str:
    from transformers import __version__

    return (
        f"{user} cannot run on transformers {__version__}, which lfm2_fast does not know; install "
        f"transformers=={KNOWN[-1]}, or leave it out"
    )
