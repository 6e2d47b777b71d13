"""Every row of docs/usage/huggingface.md on methods and attributes, tried on both classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lfm2_fast import HookError
from tests.hf.page import IDS, names, same

pytestmark = pytest.mark.usefixtures("no_grad")

METHODS, TORCH = "Methods and attributes", "Methods of torch's `Module`"

# What each method or attribute that is the same gives, as something that can be compared.
ANSWERS: dict[str, Callable[[Any], Any]] = {
    "add_model_tags": lambda m: [m.add_model_tags(["a", "b"]), sorted(m.model_tags)],
    "base_model": lambda m: m.base_model(IDS).last_hidden_state,
    "base_model_prefix": lambda m: m.base_model_prefix,
    "can_generate": lambda m: [m.can_generate(), type(m).can_generate()],
    "compute_transition_scores": lambda m: transition_scores(m),
    "config": lambda m: [m.config.hidden_size, m.config.layer_types, m.config.eos_token_id],
    "config_class": lambda m: [m.config_class.__name__, m.config_class.model_type],
    "device": lambda m: m.device,
    "dtype": lambda m: m.dtype,
    "embed_tokens": lambda m: [m.embed_tokens.weight, m.embed_tokens(IDS)],
    "layers": lambda m: [len(m.layers), m.layers[0].operator_norm.weight],
    "embedding_norm": lambda m: [m.embedding_norm.weight, m.embedding_norm(m.embed_tokens(IDS))],
    "forward": lambda m: m.forward(IDS)[0],
    "from_pretrained": lambda m: type(m).from_pretrained(m.name_or_path)(IDS)[0].dtype,
    "generate": lambda m: m.generate(IDS, max_new_tokens=4, do_sample=False),
    "generation_config": lambda m: m.generation_config.to_dict(),
    "get_decoder": lambda m: m.get_decoder()(IDS).last_hidden_state,
    "get_input_embeddings": lambda m: m.get_input_embeddings()(IDS),
    "get_memory_footprint": lambda m: m.get_memory_footprint(return_buffers=False),
    "get_output_embeddings": lambda m: (m.get_output_embeddings() or m.embed_tokens).weight,
    "input_modalities": lambda m: m.input_modalities,
    "is_gradient_checkpointing": lambda m: m.is_gradient_checkpointing,
    "lm_head": lambda m: m.lm_head(m.get_input_embeddings()(IDS)),
    "loss_function": lambda m: losses(m),
    "main_input_name": lambda m: m.main_input_name,
    "model": lambda m: m.model(IDS).last_hidden_state,
    "model_tags": lambda m: type(m).model_tags,
    "name_or_path": lambda m: str(m.name_or_path),
    "num_parameters": lambda m: [m.num_parameters(), m.num_parameters(exclude_embeddings=True)],
    "output_modalities": lambda m: m.output_modalities,
    "padding_idx": lambda m: m.padding_idx,
    "resize_token_embeddings": lambda m: resized(m),
    "save_pretrained": lambda m: m.save_pretrained.__name__,
    "tie_weights": lambda m: [m.tie_weights(), m.lm_head.weight is m.model.embed_tokens.weight],
    "vocab_size": lambda m: m.vocab_size,
}
OF_THE_BASE = {"embed_tokens", "embedding_norm", "layers", "padding_idx"}
OF_THE_HEAD = {
    "compute_transition_scores",
    "generate",
    "generation_config",
    "lm_head",
    "model",
    "output_modalities",
    "tie_weights",
}


def losses(model: Any) -> list[torch.Tensor]:
    logits, size = model.get_input_embeddings()(IDS), model.config.hidden_size
    labels = IDS % 50
    return [
        model.loss_function(logits, labels, size),
        model.loss_function(logits, labels, size, num_items_in_batch=3, ignore_index=8),
        model.loss_function(logits, labels=None, vocab_size=size, shift_labels=labels),
    ]


def transition_scores(model: Any) -> torch.Tensor:
    kwargs = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 2}
    answer = model.generate(IDS, do_sample=False, **kwargs)
    return model.compute_transition_scores(answer.sequences, answer.logits, normalize_logits=True)


def resized(model: Any) -> list[Any]:
    size = model.config.vocab_size
    made = model.resize_token_embeddings(size + 3, pad_to_multiple_of=8)
    grown = [len(made.weight), model.config.vocab_size, model.vocab_size]
    model.resize_token_embeddings(size)
    return [*grown, model.get_input_embeddings().weight, model.vocab_size]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("name", ANSWERS)
def test_methods(models: tuple[Any, Any], name: str) -> None:
    if name not in OF_THE_BASE:
        assert same(ANSWERS[name](models[1]), ANSWERS[name](models[0]))
    if name not in OF_THE_HEAD:
        assert same(ANSWERS[name](models[1].model), ANSWERS[name](models[0].model))
    for model in (*models, *(model.model for model in models)):
        there = name not in (OF_THE_BASE if hasattr(model, "lm_head") else OF_THE_HEAD)
        assert not there or hasattr(model, name)


def test_methods_have_a_trial_each(models: tuple[Any, Any]) -> None:
    # tests/hf/test_adapters.py has the trials of these, beside PEFT.
    of_adapters = {"load_adapter", "set_adapter"}
    assert names(METHODS, "same") - of_adapters == ANSWERS.keys()
    theirs, ours = models
    plain = ours(IDS).logits
    accepted = {
        "set_attn_implementation": lambda: ours.set_attn_implementation("eager"),
        "set_experts_implementation": lambda: ours.set_experts_implementation("eager"),
        "supports_gradient_checkpointing": lambda: ours.supports_gradient_checkpointing or None,
    }
    assert names(METHODS, "accepted") == accepted.keys()
    for call in accepted.values():
        assert call() is None and torch.equal(ours(IDS).logits, plain)
    for model, name in ((ours, "lm_head"), (ours.model, "embed_tokens")):
        with pytest.raises(AttributeError, match=f"{name} cannot be replaced: .*transformers"):
            setattr(model, name, torch.nn.Linear(2, 2))


def test_methods_of_torch(tiny: Path, pair: Callable) -> None:
    theirs, ours = pair(tiny)
    for each in names(TORCH, "same", "own", "accepted") - {"T_destination", "dump_patches"}:
        assert hasattr(ours, each), each
    casts = {
        "cpu": lambda m: m.cpu(),
        "to": lambda m: m.to("cpu", torch.float64),
        "float": lambda m: m.float(),
        "double": lambda m: m.double(),
        "type": lambda m: m.type(torch.float32),
        "bfloat16": lambda m: m.bfloat16(),
        "half": lambda m: m.half(),
    }
    for name, cast in casts.items():
        assert cast(ours) is ours and cast(theirs) is theirs
        found, expected = ours(IDS).logits, theirs(IDS).logits
        assert found.dtype == expected.dtype, name
        assert found.dtype.itemsize == 2 or same(found, expected), name
    _, ours = pair(tiny)
    assert ours.eval() is ours and ours.training is theirs.eval().training is False
    with pytest.raises(RuntimeError, match="for inference"):
        ours.train()
    assert ours.train(False) is ours
    plain = ours(IDS).logits
    ours.zero_grad()
    ours.requires_grad_(True)
    seen: list[Any] = []
    hooks = [
        ours.register_forward_hook(lambda *args: seen.append(args[2].logits)),
        ours.register_forward_pre_hook(lambda *args: seen.append(args[1])),
    ]
    with torch.enable_grad():
        logits = ours(IDS).logits
    assert torch.equal(logits, plain) and not logits.requires_grad
    assert len(seen) == 2 and seen[0] == (IDS,) and torch.equal(seen[1], logits)
    for hook in hooks:
        hook.remove()
    for register in (ours.register_full_backward_hook, ours.register_full_backward_pre_hook):
        hook = register(lambda *_: seen.append(1))
        with pytest.raises(HookError, match="nothing runs backward"):
            ours(IDS)
        hook.remove()
    state = ours.state_dict()
    assert all(name.startswith("network.") for name in state)
    assert {name for name, _ in ours.named_parameters()} < state.keys()
    ours.load_state_dict(state)
    assert {name.partition(".")[0] for name, _ in ours.named_modules()} == {"", "network"}


@pytest.mark.slow
def test_compile_of_torch_changes_no_answer(tiny: Path, pair: Callable) -> None:
    _, ours = pair(tiny)
    plain = ours(IDS).logits
    ours.compile(backend="eager")
    assert same(ours(IDS).logits, plain)
