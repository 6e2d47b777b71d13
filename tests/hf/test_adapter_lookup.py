"""Adapter to merge, found by a checkpoint's name: where transformers looks, and its logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from tests.adapters import IDS, Made, make_adapter

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_adapter(tiny, tmp_path_factory.mktemp("made"), target_modules=["q_proj", "w2"])


def place(name: str, tiny: Path, made: Made, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return a checkpoint with the adapter somewhere, and the arguments that name the place."""
    if name == "alone":
        return made.folder, {}
    shutil.copytree(tiny, folder / "whole")
    if name == "beside weights":
        shutil.copytree(made.folder, folder / "whole", dirs_exist_ok=True)
        # Its own weights count.
        change = {"base_model_name_or_path": "no/such"}
    else:
        shutil.copytree(made.folder, folder / "whole" / "inner")
        return folder / "whole", {"adapter_kwargs": {"subfolder": "inner", "token": None}}
    path = folder / "whole" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return folder / "whole", {}


@pytest.mark.parametrize("name", ["alone", "beside weights", "in a subfolder"])
def test_adapters_are_found_where_transformers_finds_them(
    name: str, tiny: Path, made: Made, tmp_path: Path, registered: None
) -> None:
    """By both classes, and by an Auto class, which names the adapter that it has found."""
    from transformers import AutoModelForCausalLM, Lfm2ForCausalLM

    folder, given = place(name, tiny, made, tmp_path)
    for kind in (Lfm2ForCausalLM, lfm2_fast.Lfm2ForCausalLM, AutoModelForCausalLM):
        model = kind.from_pretrained(folder, dtype=torch.float32, **given)
        made.check(model(IDS).logits)
    assert type(model) is lfm2_fast.Lfm2ForCausalLM


def test_fields_of_the_config_change_the_bases(made: Made) -> None:
    """Both classes read the base's config."""
    from transformers import Lfm2ForCausalLM

    for kind in (Lfm2ForCausalLM, lfm2_fast.Lfm2ForCausalLM):
        model = kind.from_pretrained(made.folder, dtype=torch.float32, use_cache=False)
        assert model.config.use_cache is False
        made.check(model(IDS).logits)


def test_an_adapter_that_a_trainer_saved_with_the_bases_config(
    tiny: Path, made: Made, tmp_path: Path
) -> None:
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    shutil.copy(tiny / "config.json", tmp_path)
    made.check(lfm2_fast.load(tmp_path, device="cpu", dtype="float32")(IDS).logits)


def test_a_named_adapter_in_a_subfolder(tiny: Path, made: Made, registered: None) -> None:
    """Merged and beside the weights; an Auto class's revision is the checkpoint's alone."""
    from transformers import AutoModelForCausalLM

    inner = {"subfolder": made.folder.name}
    given: dict[str, Any] = {"adapter": made.folder.parent, "adapter_kwargs": inner}
    made.check(lfm2_fast.load(tiny, device="cpu", dtype="float32", **given)(IDS).logits)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, **given)
    made.check(model(IDS).logits)
    replaced = {"subfolder": "lost", "adapter_kwargs": inner}
    for options in ({"adapter_kwargs": inner}, inner, replaced):
        model = lfm2_fast.load(tiny, device="cpu", dtype="float32")
        model.load_adapter(made.folder.parent, **options)
        made.check(model(IDS).logits)


def test_arguments_of_adapters_without_effect_are_refused(
    tiny: Path, made: Made, tmp_path: Path
) -> None:
    load = lfm2_fast.Lfm2ForCausalLM.from_pretrained
    with pytest.raises(ValueError, match=r"adapter_kwargs=\{'proxies': .* not supported.*revision"):
        load("no/such", adapter_kwargs={"proxies": {"https": "x"}})
    with pytest.raises(ValueError, match="'rank': 3.* is not supported"):
        lfm2_fast.load(tiny, device="cpu").load_adapter(made.folder, adapter_kwargs={"rank": 3})
    with pytest.raises(lfm2_fast.CheckpointError, match="lost has no adapter_config.json"):
        load(tiny, adapter_kwargs={"subfolder": "lost"})
    for name in ("alone", "beside weights"):
        folder, _ = place(name, tiny, made, tmp_path)
        with pytest.raises(ValueError, match="holds an adapter itself: leave adapter="):
            load(folder, adapter=made.folder)
    with pytest.raises(ValueError, match="holds an adapter itself: leave adapter="):
        load(tiny, adapter=made.folder, adapter_kwargs={"_adapter_model_path": str(made.folder)})
    load(tiny, adapter_kwargs={"token": "x", "force_download": False, "proxies": None})


def test_merged_weights_are_not_saved_beside_their_adapter(made: Made, tmp_path: Path) -> None:
    """Loading that folder would change them once more."""
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    model = lfm2_fast.load(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="holds an adapter.*save into another folder"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
