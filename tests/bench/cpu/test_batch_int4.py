"""The rate of llama.cpp's steps: prompts and first tokens are not in it."""

from __future__ import annotations

import pytest

from bench.cpu.batch_int4 import server_rate
from bench.cpu.peers import Workload


class Server:
    """Takes 3 seconds for prompts and first tokens, and a quarter for each further step."""

    def together(self, prompts: list[list[int]], new: int) -> float:
        assert len(prompts) == 8 and all(len(ids) == 64 for ids in prompts)
        assert len({tuple(ids) for ids in prompts}) == 8
        return 3 + (new - 1) / 4


def test_only_steps_count() -> None:
    assert server_rate(Server(), Workload(8, 64, 16)) == pytest.approx(8 * 4)
