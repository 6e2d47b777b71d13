"""Adapters that a server has from its start, and those that clients load and unload."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import lfm2_fast
from bench.cpu.adapters import write_adapter
from lfm2_fast.server import run, service
from tests.server.conftest import EXTRA


def test_adapters_are_models_by_name(
    serving: Callable, client: Callable, tiny: Path, tmp_path: Path
) -> None:
    config = lfm2_fast.Config.from_file(tiny / "config.json")
    paths = [write_adapter(tmp_path / str(n), config, 4, n, std=0.15) for n in range(2)]
    limits = {"max_adapters": 2, "max_lora_rank": 4}
    served = serving(
        adapters={"first": paths[0]}, load_adapters=True, served_model_name="base", **limits
    )
    names = [each["id"] for each in served("/v1/models").body["data"]]
    assert names == ["base", "first"]
    assert served("/v1/models/first").body["parent"] == "base"
    texts = {name: served.complete(model=name).body for name in names}
    assert [texts[name]["model"] for name in names] == names
    assert served.chat(model="first").body["model"] == "first"
    asked = {"lora_name": "second", "lora_path": str(paths[1])}
    assert served("/v1/load_lora_adapter", asked).status == 200
    served.refused(served("/v1/load_lora_adapter", asked), "lora_name", "invalid_value")
    texts["second"] = served.complete(model="second").body
    lost = {"lora_name": "third", "lora_path": str(paths[0])}
    message = served.refused(served("/v1/load_lora_adapter", lost), "lora_path", "invalid_value")
    assert "max_adapters=2 are loaded" in message
    answers = {name: body["choices"][0]["text"] for name, body in texts.items()}
    assert len(set(answers.values())) == 3, "the adapters change nothing"
    # Each alone with its adapter, and after the others: no page of another adapter is used.
    for name, path in zip(("first", "second"), paths, strict=True):
        alone = lfm2_fast.load(tiny, device="cpu", dtype="float32", adapter=path)
        assert serving(alone).complete().body["choices"][0]["text"] == answers[name]
        assert served.complete(model=name).body["choices"][0]["text"] == answers[name]
    assert served("/v1/unload_lora_adapter", {"lora_name": "second"}).status == 200
    served.refused(served.complete(model="second"), "model", "model_not_found", 404)
    lost["lora_path"] = str(write_adapter(tmp_path / "large", config, 5, 0))
    message = served.refused(served("/v1/load_lora_adapter", lost), "lora_path", "invalid_value")
    assert "rank 5, and max_lora_rank=4" in message
    lost["lora_path"] = str(tmp_path)
    message = served.refused(served("/v1/load_lora_adapter", lost), "lora_path", "invalid_value")
    assert "adapter_config.json" in message
    lost["lora_path"] = "a" * 300
    message = served.refused(served("/v1/load_lora_adapter", lost), "lora_path", "invalid_value")
    assert "cannot be read" in message
    # Without the option no client loads anything.
    client.refused(client("/v1/load_lora_adapter", asked), None, "unsupported_endpoint", 404)


def test_adapters_come_with_the_hub_options_of_the_base(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Revisions are the base's alone. What clients load is not asked of a hub that is ruled out."""
    pytest.importorskip("fastapi", reason=EXTRA)
    config = lfm2_fast.Config.from_file(tiny / "config.json")
    folder, asked = write_adapter(tmp_path / "adapter", config, 4, 0), []

    def find(name: str, **options: Any) -> Path:
        asked.append((name, options["revision"], options["local_files_only"]))
        return folder

    monkeypatch.setattr(run, "find_adapter", find)
    monkeypatch.setattr(service, "find_adapter", find)
    loading = {"device": "cpu", "revision": "one", "local_files_only": True}
    app = run.create_app(tiny, adapters={"first": "o/first"}, load_adapters=True, **loading)
    with closing(app.state.service) as made:
        asyncio.run(made.load_adapter("second", "o/second"))
        assert made.names[1:] == ["first", "second"]
    assert asked == [("o/first", None, True), ("o/second", None, True)]
