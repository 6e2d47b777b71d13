"""What ``info`` tells of a checkpoint, against what loading it takes; and how it is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lfm2_fast import info


@pytest.mark.parametrize("kind", ["conv", "full_attention"])
def test_layers_of_one_kind_alone_are_told(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    raw = json.loads((tiny / "config.json").read_text())
    changed = {**raw, "layer_types": [kind] * raw["num_hidden_layers"]}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    info.show(info.checkpoint(str(tmp_path)))
    name = "cache_bytes_per_token" if kind == "conv" else "conv_bytes_per_sequence"
    assert f"model.{name}: 0 bytes\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "said"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (2.5e9, "2.5 GB")]
)
def test_bytes_have_units(value: float, said: str) -> None:
    assert info.readable("bytes", value) == said
