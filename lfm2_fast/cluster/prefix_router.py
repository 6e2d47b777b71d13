"""PrefixRouter: Ray Serve's request router that follows PrefixAffinity. Needs Ray."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from lfm2_fast.cluster.prefix_affinity import REQUEST_COST, PrefixAffinity, blocks_of


class PrefixRouter(RequestRouter):
    """Router whose requests have a body of OpenAI's as the second argument.

    Each router knows the requests that it has sent, not those of others.
    """

    def initialize_state(self, request_cost: float = REQUEST_COST) -> None:
        """Prepare the router. Ray Serve calls it with the keyword arguments of its config."""
        self._affinity = PrefixAffinity(request_cost)
        # By request: its replica, None before one is chosen, and its blocks.
        self._sent: dict[str, tuple[str | None, tuple[int, ...]]] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the replicas in the order in which they are tried."""
        if pending_request is None:
            return [list(candidate_replicas)]
        # All replicas are in the answer, so the next try may wait.
        pending_request.routing_context.should_backoff = True
        id = pending_request.metadata.internal_request_id
        if id in self._sent:
            blocks = self._sent.pop(id)[1]
        else:
            blocks = blocks_of(pending_request.args[1])
            pending_request.future.add_done_callback(lambda future: self._left(id, future))
        found = {each.replica_id.unique_id: each for each in candidate_replicas}
        loads = dict.fromkeys(found, 0)
        for replica, _ in list(self._sent.values()):
            if replica in loads:
                loads[replica] += 1
        order = self._affinity.rank(blocks, loads)
        # Requests that are routed meanwhile must know of this one.
        self._sent[id] = order[0], blocks
        self._affinity.note(blocks, order[0])
        return [[found[each]] for each in order]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Note which replica took a request."""
        id = pending_request.metadata.internal_request_id
        if id not in self._sent:
            # It has ended already.
            return
        chosen, blocks = self._sent[id]
        self._sent[id] = replica_id.unique_id, blocks
        if chosen != replica_id.unique_id:
            self._affinity.note(blocks, replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Forget a request that has ended."""
        self._ended(internal_request_id)

    def _left(self, id: str, future: Any) -> None:
        if future.cancelled():
            self._ended(id)

    def _ended(self, id: str) -> None:
        self._sent.pop(id, None)
