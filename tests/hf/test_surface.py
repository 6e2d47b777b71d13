"""The tables of docs/usage/huggingface.md against transformers' own class and ours."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import lfm2_fast
from lfm2_fast.hf.surface import REFUSED_NAMES

PAGE = Path(__file__).parents[2] / "docs" / "usage" / "huggingface.md"


def table(title: str) -> dict[str, str]:
    """Return what the page says of each name in the table under a title."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", text, re.MULTILINE))


def test_from_pretrained() -> None:
    from transformers import PreTrainedModel

    theirs = set(inspect.signature(PreTrainedModel.from_pretrained).parameters)
    code = inspect.getsource(PreTrainedModel.from_pretrained)
    theirs |= set(re.findall(r"""kwargs\.pop\(\s*["'](\w+)["']""", code))
    assert theirs <= table("`from_pretrained`").keys()


def test_forward() -> None:
    from transformers import Lfm2ForCausalLM, Lfm2Model
    from transformers.utils import TransformersKwargs

    theirs = set(TransformersKwargs.__annotations__)
    for kind in (Lfm2ForCausalLM, Lfm2Model):
        theirs |= set(inspect.signature(inspect.unwrap(kind.forward)).parameters)
    told = table("`forward`")
    assert theirs - {"self"} <= told.keys()
    ours = set(inspect.signature(lfm2_fast.Lfm2ForCausalLM.forward).parameters)
    same = {name for name, said in told.items() if said == "same"}
    assert same - {"is_causal"} <= ours


def test_save_pretrained() -> None:
    from transformers import PreTrainedModel

    theirs = set(inspect.signature(PreTrainedModel.save_pretrained).parameters) - {"self"}
    told = table("`save_pretrained`")
    assert theirs <= told.keys()
    ours = set(inspect.signature(lfm2_fast.Lfm2ForCausalLM.save_pretrained).parameters)
    assert {name for name, said in told.items() if said == "same"} <= ours


def test_every_public_name(tiny: Path) -> None:
    from transformers import Lfm2ForCausalLM

    usual = set(dir(torch.nn.Module))
    theirs = {n for n in dir(Lfm2ForCausalLM) if not n.startswith("_")} - usual
    told = table("Methods and attributes")
    assert theirs <= told.keys()
    model = lfm2_fast.load(tiny, device="cpu")
    for name, said in told.items():
        if said == "refused":
            with pytest.raises(AttributeError, match=f"{name} is not supported by lfm2_fast: "):
                getattr(model, name)
        else:
            assert said == "same" and hasattr(model, name), name
    assert REFUSED_NAMES.keys() == {name for name, said in told.items() if said == "refused"}
    with pytest.raises(AttributeError, match="'Lfm2ForCausalLM' object has no attribute 'laod'"):
        _ = model.laod


def test_small_things_that_clients_read(tiny: Path) -> None:
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32")
    assert model.num_parameters() == model.get_memory_footprint() // 4
    assert model.num_parameters(only_trainable=True) == 0
    embedding, ids = model.get_input_embeddings(), torch.tensor([[3, 4]])
    assert torch.equal(embedding(ids), embedding.weight[ids])
    states = model.model(ids).last_hidden_state
    logits = model.get_output_embeddings()(states)
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-5, atol=1e-4)
    assert model.base_model.dtype == model.get_decoder().dtype == torch.float32
    model.add_model_tags("a")
    model.add_model_tags(["b", "a"])
    assert model.model_tags == ["a", "b"]
    model.set_attn_implementation("eager")
    assert model.half().dtype == torch.float16 and model(ids).logits.dtype == torch.float16
