"""Scale: numbers of replicas, and what each asks of Ray."""

from __future__ import annotations

from typing import Any

import pytest

from lfm2_fast.cluster.scale import Scale


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"replicas": 2, "max_replicas": 3}, "replicas=2 is a fixed number"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas=3 is more than max_replicas=2"),
        ({"min_replicas": 3}, "min_replicas=3 needs a max_replicas"),
        ({"replicas": 2, "target_ongoing_requests": 3}, "=3 needs a max_replicas"),
    ],
    ids=str,
)
def test_numbers_that_contradict_each_other_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scale(**wrong)


def test_the_number_is_fixed_or_follows_the_requests() -> None:
    assert Scale().number(16) == {"num_replicas": 1}
    assert Scale(replicas=3).number(16) == {"num_replicas": 3}
    scaling = Scale(max_replicas=4).number(16)["autoscaling_config"]
    assert scaling == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 16}
    scaling = Scale(min_replicas=0, max_replicas=4, target_ongoing_requests=5).number(16)
    assert scaling["autoscaling_config"]["min_replicas"] == 0
    assert scaling["autoscaling_config"]["target_ongoing_requests"] == 5


def test_a_replica_gets_a_gpu_or_its_share_of_the_cores() -> None:
    machine = {"CPU": 16.0, "GPU": 8.0}
    one_gpu = {"num_cpus": 1.0, "num_gpus": 1.0}
    assert Scale(replicas=8).resources("auto", machine) == one_gpu
    assert Scale(replicas=8).resources("cuda", {}) == one_gpu
    assert Scale(replicas=3).resources("cpu", machine) == {"num_cpus": 5.0, "num_gpus": 0.0}
    assert Scale(replicas=3).resources("auto", {"CPU": 16}) == {"num_cpus": 5.0, "num_gpus": 0.0}
    assert Scale(replicas=4).resources("cpu", {"CPU": 2}) == {"num_cpus": 0.5, "num_gpus": 0.0}
    # A replica lies on one node.
    two, three = {"CPU": 16.0}, {"CPU": 12.0}
    assert Scale().resources("cpu", two, (8.0, 8.0))["num_cpus"] == 8
    assert Scale(replicas=2).resources("cpu", three, (4.0, 4.0, 4.0))["num_cpus"] == 4
    assert Scale(replicas=3).resources("cpu", two, (12.0, 4.0))["num_cpus"] == 4
    given = Scale(replicas=4, cpus_per_replica=0, gpus_per_replica=0.5)
    assert given.resources("cpu", machine) == {"num_cpus": 0, "num_gpus": 0.5}


def test_replicas_beside_each_other_share_the_memory() -> None:
    assert Scale().memory({"num_gpus": 0}) == "25%"
    assert Scale(replicas=8).memory({"num_gpus": 0}) == "9%"
    assert Scale(max_replicas=200).memory({"num_gpus": 0}) == "1%"
    assert Scale(replicas=8).memory({"num_gpus": 1}) == "85%"
    assert Scale(replicas=8).memory({"num_gpus": 0.25}) == "21%"
