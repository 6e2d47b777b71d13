"""Adapters that a server has from its start, and those that clients load and unload."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lfm2_fast
from bench.cpu.adapters import write_adapter


def test_adapters_are_models_by_name(
    serving: Callable, client: Callable, tiny: Path, tmp_path: Path
) -> None:
    config = lfm2_fast.Config.from_file(tiny / "config.json")
    paths = [write_adapter(tmp_path / str(n), config, 4, n, std=0.15) for n in range(2)]
    served = serving(adapters={"first": paths[0]}, load_adapters=True, served_model_name="base")
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
    answers = {name: body["choices"][0]["text"] for name, body in texts.items()}
    assert len(set(answers.values())) == 3, "the adapters change nothing"
    # Each in its own company, and after the others: no page of another adapter is taken.
    for name, path in zip(("first", "second"), paths, strict=True):
        alone = lfm2_fast.load(tiny, device="cpu", dtype="float32", adapter=path)
        assert serving(alone).complete().body["choices"][0]["text"] == answers[name]
        assert served.complete(model=name).body["choices"][0]["text"] == answers[name]
    assert served("/v1/unload_lora_adapter", {"lora_name": "second"}).status == 200
    served.refused(served.complete(model="second"), "model", "model_not_found", 404)
    lost = {"lora_name": "third", "lora_path": str(tmp_path)}
    message = served.refused(served("/v1/load_lora_adapter", lost), "lora_path", "invalid_value")
    assert "adapter_config.json" in message
    lost["lora_path"] = "a" * 300
    message = served.refused(served("/v1/load_lora_adapter", lost), "lora_path", "invalid_value")
    assert "cannot be read" in message
    # Without the option no client loads anything.
    client.refused(client("/v1/load_lora_adapter", asked), None, "unsupported_endpoint", 404)
