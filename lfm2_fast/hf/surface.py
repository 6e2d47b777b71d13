"""Names of Hugging Face's class that ours refuses, each with advice."""

from __future__ import annotations

_TRAINING = "this is for inference: train with transformers' class"
_ADAPTER = "use load_adapter(), set_adapter(None) or unload_adapter()"
_DEVICES = "the model lies on one device"
_HUB = "upload a saved folder with the hub's own command"
_LOOP = "generate() is this package's own loop: call it"
_INSIDE = "it belongs to the inside of transformers' class"
PARTS = "weights are fused: change them in transformers' model, and use from_transformers()"
_DENSE = "load the checkpoint without quantization"
_BODIES = "choose the implementation with load(..., backend=)"

_GROUPS = {
    _TRAINING: """
        activation_checkpointing_disable activation_checkpointing_enable
        disable_input_require_grads enable_input_require_grads gradient_checkpointing
        gradient_checkpointing_disable gradient_checkpointing_enable is_activation_checkpointing""",
    _ADAPTER: """
        active_adapters add_adapter delete_adapter disable_adapters enable_adapters
        enable_peft_hotswap get_adapter_state_dict""",
    _DEVICES: """
        barrier_after_gathered_checkpoint_save ep_plan fsdp_plan fsdp_size
        gather_sharded_state_dict_for_save init_parallel_plans
        is_distributed_loading_by_transformers maybe_distribute_model pp_plan
        prepare_distribute_model save_distributed_checkpoint should_save_on_this_rank
        supports_context_parallel supports_pp_plan supports_tp_plan tp_plan tp_size""",
    _HUB: "push_to_hub register_for_auto_class",
    _LOOP: """
        adjust_generation_fn continuous_batching_context_manager
        destroy_cached_continuous_batching_manager get_compiled_call
        init_continuous_batching load_custom_generate prepare_inputs_for_generation""",
    "call lfm2_fast.generate_batch(model, prompts)": "generate_batch",
    "call generate(..., token_healing=True)": "heal_tokens",
    _INSIDE: """
        all_tied_weights_keys can_record_outputs dummy_inputs get_correct_attn_implementation
        get_correct_experts_implementation get_encoder get_expanded_tied_weights_keys
        get_experts_implementation get_init_context get_parameter_or_buffer get_position_embeddings
        generation_config_class init_weights initialize_weights is_backend_compatible
        is_custom_code is_remote_code loss_type mark_tied_weights_as_initialized
        named_non_persistent_buffers post_init resize_position_embeddings
        retrieve_modules_from_names rotary_emb
        warn_if_padding_and_no_attention_mask""",
    PARTS: "set_decoder set_encoder set_input_embeddings set_output_embeddings",
    _DENSE: "dequantize",
    _BODIES: "kernel_config set_use_kernels use_kernels",
}
REFUSED_NAMES = {name: advice for advice, names in _GROUPS.items() for name in names.split()}
