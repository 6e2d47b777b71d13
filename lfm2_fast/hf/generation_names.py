"""Names of ``generate``'s arguments: supported, run by transformers, without effect, or refused.

``docs/usage/huggingface.md`` has the same in a table, and a test compares the two.
"""

from __future__ import annotations

from typing import Any

# Hugging Face's defaults, where they are not None.
DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "num_return_sequences": 1,
    "num_beams": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "output_scores": False,
    "output_logits": False,
    "output_hidden_states": False,
    "token_healing": False,
    "return_dict_in_generate": False,
}
SUPPORTED = {
    *DEFAULTS,
    "min_p",
    "max_length",
    "max_new_tokens",
    "min_new_tokens",
    "stop_strings",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "max_time",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
}
# Arguments that no config has: functions and tensors, for transformers' logits processors.
OF_THE_CALL = ("prefix_allowed_tokens_fn", "negative_prompt_ids", "negative_prompt_attention_mask")
# Arguments of transformers' logits processors, each with its values without effect.
PROCESSED: dict[str, tuple[Any, ...]] = {
    "min_length": (0,),
    "typical_p": (1.0,),
    "top_h": (),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "renormalize_logits": (False,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": (),
    "guidance_scale": (1, 1.0),
    "watermarking_config": (),
}
SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")
BEAMS_ONLY = ("length_penalty", "early_stopping")
# Names in PROCESSED of filters. Greedy decoding does not use them.
FILTERS = {"typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"}

_CACHE = "the cache is this package's own"
_COMPILED = "the kernels are compiled already"
_ASSISTED = "drafts change no token, and are as long as they save time"
_GROUPS = "it is a setting of beam groups, of which there are none"
# Arguments that change no token here, each with its values without effect, and the reason.
WITHOUT_EFFECT: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_cache": ((True,), "the cache is always used, with the same tokens"),
    "cache_implementation": ((), _CACHE),
    "cache_config": ((), _CACHE),
    "max_cache_len": ((), _CACHE),
    "low_memory": ((False,), "beams share the pages of the cache"),
    "diversity_penalty": ((0.0,), _GROUPS),
    "prefill_chunk_size": ((), "prompts run in chunks already"),
    "compile_config": ((), _COMPILED),
    "disable_compile": ((False, True), _COMPILED),
    "continuous_batching_config": ((), "requests are batched continuously already"),
    "decoder_start_token_id": ((), "the model has no encoder"),
    "trust_remote_code": ((False,), "nothing of a checkpoint is ever executed"),
    "transformers_version": ((), "it is a note"),
    "is_assistant": ((False,), _ASSISTED),
    "num_assistant_tokens": ((20,), _ASSISTED),
    "num_assistant_tokens_schedule": (("constant",), _ASSISTED),
    "assistant_confidence_threshold": ((0.4,), _ASSISTED),
    "assistant_lookbehind": ((10,), _ASSISTED),
    "assistant_ensemble_weight": ((), _ASSISTED),
    "target_lookbehind": ((10,), _ASSISTED),
    "speculation_type": ((), _ASSISTED),
}

_CONSTRAINED = "use prefix_allowed_tokens_fn or a logits_processor"
# Arguments that are not supported, each with its values without effect, and advice.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beam_groups": ((1,), "use num_beams, with do_sample=True for texts that differ"),
    "constraints": ((), _CONSTRAINED),
    "force_words_ids": ((), _CONSTRAINED),
    "penalty_alpha": ((), "use repetition_penalty or no_repeat_ngram_size against repetition"),
    "dola_layers": ((), "use repetition_penalty, or transformers' class"),
    "use_mtp": ((False,), "the model has no heads for several tokens: leave it out"),
    "output_attentions": (
        (False,),
        "attention is fused: use transformers' class with attn_implementation='eager'",
    ),
    "assistant_tokenizer": ((), "give an assistant_model with the model's own tokenizer"),
    "assistant_early_exit": ((), "give an assistant_model, or prompt_lookup_num_tokens"),
    "custom_generate": ((), "call your own function with the model"),
    "synced_gpus": ((False,), "the model lies on one device"),
    "position_ids": ((), "leave it out: positions follow from attention_mask"),
    "token_type_ids": ((), "leave it out: the model has no token types"),
    "labels": ((), "call the model itself for a loss"),
    "logits_to_keep": ((1,), "use output_logits, or call the model itself"),
    "use_model_defaults": ((), "pass None for a default that is not wanted"),
}
KNOWN = {*SUPPORTED, *PROCESSED, *WITHOUT_EFFECT, *REFUSED}
