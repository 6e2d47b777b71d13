"""Commands for Ray where Ray is missing, and arguments that are refused before it starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lfm2_fast.__main__ import main

pytest.importorskip("fastapi", reason="the extra 'server' is not installed")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_without_the_extra_the_error_has_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for options in (["--replicas", 2], ["--max-replicas", 2], ["--ray-address", "auto"]):
        assert "pip install 'lfm2-fast[server,ray]'" in refused(capsys, "serve", "x", *options)
    lines = tmp_path / "x.jsonl"
    lines.touch()
    err = refused(capsys, "batch", "x", lines, "--output", tmp_path / "y", "--ray")
    assert "pip install 'lfm2-fast[server,ray]'" in err


def test_options_of_batch_belong_together(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = tmp_path / "x.jsonl"
    lines.touch()
    call = ("batch", "x", lines, "--output", tmp_path / "y")
    assert "--shard 1/2 has no effect with --ray" in refused(
        capsys, *call, "--ray", "--shard", "1/2"
    )
    assert "--replicas is for --ray" in refused(capsys, *call, "--replicas", 2)
