"""Every row of docs/usage/huggingface.md on arguments, tried on both classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from tests.hf.page import IDS, names, same

pytestmark = pytest.mark.usefixtures("no_grad")

LOAD, FORWARD, SAVE = "`from_pretrained`", "`forward`", "`save_pretrained`"
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def inner(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in a subfolder, another with a variant beside it, each unlike the first."""
    folder = tmp_path_factory.mktemp("outer")
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32")
    model.network.embedding_norm.weight.mul_(0.5)
    model.save_pretrained(folder / "inner")
    model.network.embedding_norm.weight.mul_(0.5)
    model.save_pretrained(folder / "inner", variant="fp8")
    return folder / "inner"


def load_trials(tiny: Path, inner: Path) -> dict[str, dict[str, Any]]:
    """Arguments for each row of ``from_pretrained`` that is the same."""
    from transformers import GenerationConfig, Lfm2Config

    return {
        "pretrained_model_name_or_path": {"pretrained_model_name_or_path": inner},
        "config": {"config": Lfm2Config.from_pretrained(tiny, norm_eps=0.5)},
        "cache_dir": {"cache_dir": inner},
        "force_download": {"force_download": True},
        "local_files_only": {"local_files_only": True},
        "token": {"token": False},
        "revision": {"revision": "main"},
        "subfolder": {"pretrained_model_name_or_path": inner.parent, "subfolder": inner.name},
        "variant": {"pretrained_model_name_or_path": inner, "variant": "fp8"},
        "dtype": {"dtype": torch.float16},
        "torch_dtype": {"dtype": None, "torch_dtype": "float16"},
        "generation_config": {"generation_config": GenerationConfig(max_new_tokens=3)},
        "kwargs": {"use_cache": False, "pad_token_id": 5, "norm_eps": 0.5},
    }


def test_load(tiny: Path, inner: Path) -> None:
    """Tests of the hub's arguments are in tests/weights/test_hub.py, with a hub."""
    from transformers import Lfm2ForCausalLM

    def facts(kind: Any, given: dict[str, Any]) -> list[Any]:
        model = kind.from_pretrained(
            **{"pretrained_model_name_or_path": tiny, "dtype": torch.float32, **given}
        )
        logits = model(IDS[1:]).logits
        config, settings = model.config, model.generation_config
        shown = [config.norm_eps, config.use_cache, config.pad_token_id, settings.max_new_tokens]
        exact = [logits] if model.dtype == torch.float32 else []
        return [model.dtype, model.device, *shown, *exact]

    trials = load_trials(tiny, inner)
    # Theirs need the packages accelerate and bitsandbytes; tests/hf/test_load_args.py has ours, and
    # tests/weights/test_gguf_checkpoint.py those of gguf_file, and tests/hf/test_adapter_lookup.py
    # those of adapter_kwargs.
    elsewhere = {"device_map", "quantization_config", "gguf_file", "adapter_kwargs"}
    assert names(LOAD, "same") == trials.keys() | elsewhere
    plain = facts(Lfm2ForCausalLM, {})
    of_the_hub = {"cache_dir", "force_download", "local_files_only", "token", "revision"}
    for name, given in trials.items():
        ours, theirs = facts(lfm2_fast.Lfm2ForCausalLM, given), facts(Lfm2ForCausalLM, given)
        assert same(ours, theirs), name
        assert same(theirs, plain) == (name in of_the_hub), f"the trial of {name} shows nothing"


def test_a_config_that_was_given_is_not_changed(tiny: Path) -> None:
    config = lfm2_fast.Lfm2Config.from_pretrained(tiny)
    before = config.to_dict()
    model = lfm2_fast.load(tiny, device="cpu", config=config, quantization="int8")
    assert config.to_dict() == before and config is not model.config
    assert model.config.quantization == "int8"


# Arguments for each row of ``forward`` that is the same, all but those that have a test below.
FORWARDS: dict[str, dict[str, Any]] = {
    "input_ids": {},
    "inputs_embeds": {"inputs_embeds": True},
    "attention_mask": {"attention_mask": MASK},
    "position_ids": {"position_ids": torch.arange(6)[None]},
    "labels": {"labels": IDS},
    "num_items_in_batch": {"labels": IDS, "num_items_in_batch": 4},
    "ignore_index": {"labels": IDS, "ignore_index": 1},
    "shift_labels": {"labels": IDS, "shift_labels": IDS},
    "use_cache": {"use_cache": False},
    "logits_to_keep": {"logits_to_keep": 2},
    "output_hidden_states": {"output_hidden_states": True},
    "output_hidden_states=-1": {"output_hidden_states": -1},
    "output_hidden_states=[1, 5]": {"output_hidden_states": [1, 5, -99]},
    "return_dict": {"return_dict": False},
    "is_causal": {"is_causal": True},
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forward(models: tuple[Any, Any], name: str) -> None:
    from transformers.utils import output_capturing

    if "=" in name and not hasattr(output_capturing, "selected_hidden_states"):
        pytest.skip("transformers is older than indices of hidden states")
    answers = []
    for model in models:
        given = {"input_ids": IDS, **FORWARDS[name]}
        if given.pop("inputs_embeds", None):
            given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids"))
        answers.append(model(**given))
    theirs, ours = answers
    if name == "return_dict":
        assert type(ours) is type(theirs) is tuple and len(ours) == len(theirs) == 2
        assert same(ours[0], theirs[0])
        return
    assert list(ours) == list(theirs)
    shown = FORWARDS[name].get("attention_mask", torch.ones_like(IDS)).bool()
    if name == "logits_to_keep":
        shown = shown[:, -2:]
    assert same(ours.logits[shown], theirs.logits[shown])
    assert (ours.loss is None) == (theirs.loss is None)
    assert theirs.loss is None or same(ours.loss, theirs.loss)
    assert same(ours.hidden_states or (), theirs.hidden_states or ())


def test_forward_on_a_cache(models: tuple[Any, Any]) -> None:
    answers = []
    for model in models:
        cache = model(IDS[:, :4]).past_key_values
        answers.append(model(IDS[:, 4:], past_key_values=cache).logits)
    assert same(*answers[::-1])


def test_forward_of_packed_rows(models: tuple[Any, Any]) -> None:
    """Theirs takes ``cu_seq_lens_q`` with flash attention alone: here they are the parts alone."""
    theirs, ours = models
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    expected = torch.cat([theirs(IDS[:1, :2]).logits, theirs(IDS[:1, 2:]).logits], 1)
    assert same(ours(IDS[:1], cu_seq_lens_q=bounds).logits, expected)


def test_forward_of_the_config(tiny: Path, pair: Callable) -> None:
    """Arguments that the call does not set come from the config."""
    theirs, ours = (model.model for model in pair(tiny))
    for name, value in (("use_cache", False), ("output_hidden_states", True)):
        for model in (theirs, ours):
            setattr(model.config, name, value)
        assert list(ours(IDS)) == list(theirs(IDS)), name
        assert list(ours(IDS)) != ["last_hidden_state", "past_key_values"]
    for model in (theirs, ours):
        model.config.return_dict = False
    assert type(ours(IDS)) is type(theirs(IDS)) is tuple
    assert "last_hidden_state" in ours(IDS, return_dict=True)


def test_forward_has_a_trial_for_each_row(models: tuple[Any, Any]) -> None:
    tried = {name.partition("=")[0] for name in FORWARDS}
    assert names(FORWARD, "same") == tried | {"past_key_values", "cu_seq_lens_q"}
    _, ours = models
    plain = ours(IDS[:1]).logits
    lengths = torch.tensor([0, 6], dtype=torch.int32)
    for name in names(FORWARD, "accepted"):
        value = {"max_length_q": 6, "max_length_k": 6, "output_router_logits": True}.get(name)
        given = {name: lengths if value is None else value}
        if name == "seq_idx":
            with pytest.raises(ValueError, match="seq_idx alone is not supported"):
                ours(IDS[:1], **given)
            given["cu_seq_lens_q"] = lengths
        assert torch.equal(ours(IDS[:1], **given).logits, plain), name
    with pytest.raises(ValueError, match="output_attentions=True is not supported: .*: use"):
        ours(IDS, output_attentions=True)
    with pytest.raises(TypeError, match="'new'"):
        ours(IDS, new=None)


def saved(folder: Path) -> dict[str, Any]:
    """Return the tensors of a folder by name, and the names of its files under ""."""
    from safetensors.torch import load_file

    files = sorted(file.name for file in folder.iterdir())
    found: dict[str, Any] = {"": files}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_save(models: tuple[Any, Any], tmp_path: Path) -> None:
    state = {k: 2 * v for k, v in models[0].state_dict().items() if k != "lm_head.weight"}
    trials: dict[str, dict[str, Any]] = {
        "save_directory": {},
        "is_main_process": {"is_main_process": True},
        "state_dict": {"state_dict": state},
        "max_shard_size": {"max_shard_size": "4MB"},
        "variant": {"variant": "fp8"},
        "safe_serialization": {"safe_serialization": True},
    }
    assert names(SAVE, "same") == trials.keys()
    for name, given in trials.items():
        found = []
        for i, model in enumerate(models):
            folder = tmp_path / f"{name}{i}"
            model.save_pretrained(folder, **given)
            found.append(saved(folder))
        theirs, ours = found
        assert ours[""] == theirs[""], name
        assert ours.keys() == theirs.keys() and len(ours) > 50
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if key)
    models[1].save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    for name in names(SAVE, "accepted"):
        models[1].save_pretrained(tmp_path / "accepted", **{name: "something"})
    assert len(saved(tmp_path / "accepted")) == len(ours)
