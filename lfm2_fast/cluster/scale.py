"""Scale: how many replicas a service has, and what Ray reserves for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scale:
    """Number of replicas and the resources of each.

    There are ``replicas``, or between ``min_replicas`` and ``max_replicas``, so that each has about
    ``target_ongoing_requests``; None is the engine's rows. ``cpus_per_replica`` and
    ``gpus_per_replica`` are what Ray reserves; None is one GPU where the device may be one, else
    the replica's share of the cluster's cores. Without ``prefix_routing`` requests go to the less
    busy one of two random replicas. Raises ValueError for numbers that contradict each other.
    """

    replicas: int | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None
    target_ongoing_requests: float | None = None
    cpus_per_replica: float | None = None
    gpus_per_replica: float | None = None
    prefix_routing: bool = True

    def __post_init__(self) -> None:
        low, high = self.min_replicas, self.max_replicas
        if self.replicas is not None and (low, high) != (None, None):
            raise ValueError(
                f"replicas={self.replicas} is a fixed number; leave it out, or leave out "
                "min_replicas and max_replicas"
            )
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_replicas={low} is more than max_replicas={high}")
        if low is not None and high is None:
            raise ValueError(f"min_replicas={low} needs a max_replicas")
        if self.target_ongoing_requests is not None and high is None:
            raise ValueError(
                f"target_ongoing_requests={self.target_ongoing_requests} needs a max_replicas: "
                "without one the number of replicas is fixed"
            )

    @property
    def most(self) -> int:
        """Largest number of replicas."""
        return self.max_replicas or self.replicas or 1

    def number(self, rows: int) -> dict[str, Any]:
        """Return Ray Serve's options for the number of replicas of ``rows`` rows."""
        if self.max_replicas is None:
            return {"num_replicas": self.replicas or 1}
        target = self.target_ongoing_requests or rows
        low = 1 if self.min_replicas is None else self.min_replicas
        scaling = {"min_replicas": low, "max_replicas": self.max_replicas}
        return {"autoscaling_config": {**scaling, "target_ongoing_requests": target}}

    def resources(
        self, device: str, cluster: Mapping[str, float], nodes: Sequence[float] = ()
    ) -> dict[str, float]:
        """Return Ray's resources for a replica on a device, in a cluster with these resources.

        ``nodes`` are the cores of each node, by default one node with all of them.
        """
        gpus = self.gpus_per_replica
        if gpus is None:
            gpus = float(device.startswith("cuda") or device == "auto" and cluster.get("GPU", 0))
            gpus = min(gpus, 1.0)
        cpus = self.cpus_per_replica
        if cpus is None:
            cpus = 1.0 if gpus else self._share(nodes or (cluster.get("CPU", 1.0),))
        return {"num_cpus": cpus, "num_gpus": gpus}

    def _share(self, nodes: Sequence[float]) -> float:
        """Return the most whole cores that every replica can have on a node, or a part of one."""
        for cores in range(int(max(nodes)), 0, -1):
            if sum(int(own // cores) for own in nodes) >= self.most:
                return float(cores)
        return sum(nodes) / self.most

    def memory(self, resources: Mapping[str, float]) -> str:
        """Return the share of the free memory for a replica's pages, where others may be beside it.

        On a CPU all replicas may be on one machine. A GPU is shared by those that reserve a part.
        """
        if gpus := resources["num_gpus"]:
            return f"{int(85 * min(gpus, 1))}%"
        return f"{max(min(25, 75 // self.most), 1)}%"
