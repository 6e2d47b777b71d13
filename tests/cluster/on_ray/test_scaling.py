"""Throughput and prefix hits of replicas, whose steps are sleeps so that cores are no limit."""

from __future__ import annotations

from typing import Any

from bench.cluster.hits import measured
from bench.cluster.scaling import throughput


def test_throughput_grows_with_the_replicas(simulated: Any) -> None:
    one = throughput(simulated, 1, seconds=8)
    # Four rows, ten steps a second.
    assert 30 < one <= 41
    for number in (2, 4):
        assert throughput(simulated, number, seconds=8) >= 0.85 * number * one


def test_routing_by_prefix_has_more_hits_than_the_plain_choice(simulated: Any) -> None:
    found = [measured(simulated, choice, users=8, turns=5) for choice in (True, False)]
    by_prefix, plain = (each["hit_rate"] for each in found)
    print(found)
    # A conversation that never leaves its replica finds 0.60: the whole pages of its earlier turns.
    # By chance it was 0.49.
    assert by_prefix > 0.57 and by_prefix > plain
