"""Server with a drafter: the same texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lfm2_fast
from bench.cpu.drafters import write_drafter


def test_a_drafter_changes_no_answer(
    serving: Callable, client: Callable, tiny: Path, tmp_path: Path
) -> None:
    config = lfm2_fast.Config.from_file(tiny / "config.json")
    drafted = serving(drafter=write_drafter(tmp_path / "drafter", config))
    assert drafted.server.app.state.service.engine.engine.model.drafter is not None
    asked = {"prompt": "The server keeps", "max_tokens": 12}
    first, second = (each.complete(**asked).body["choices"] for each in (client, drafted))
    assert first == second
