"""PrefixAffinity: the replica that holds most of a prompt, unless it has much more to do."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b

# Bytes of a block: about the 64 tokens of a page, the prefix cache's unit.
BLOCK = 256
# Blocks that one running request outweighs: a prefill of 256 tokens.
REQUEST_COST = 4
# Blocks that are remembered, about 30 MB.
CAPACITY = 1 << 17
# Fields of a body that decide with whom the first page of its prompt is shared.
_SALT = ("model", "cache_salt")
# Fields of a body in the order in which they stand in a prompt.
_TEXT = ("tools", "instructions", "messages", "input", "prompt")


def blocks_of(body: bytes) -> tuple[int, ...]:
    """Return the hash chain of a request's prompt, one hash for each full block.

    Two bodies have as many hashes in common as their prompts have blocks. A conversation that has
    grown begins with the hashes of the shorter one. A body that is not a request has no hashes.
    """
    try:
        fields = json.loads(body)
        if not isinstance(fields, dict):
            return ()
        text = json.dumps([fields[name] for name in _TEXT if fields.get(name)], ensure_ascii=False)
        data = text.encode()
    except (ValueError, RecursionError):
        return ()
    salt = repr([fields.get(name) for name in _SALT]).encode(errors="replace")
    link = blake2b(salt, digest_size=8).digest()
    chain = []
    for start in range(0, len(data) - BLOCK + 1, BLOCK):
        link = blake2b(link + data[start : start + BLOCK], digest_size=8).digest()
        chain.append(int.from_bytes(link, "big"))
    return tuple(chain)


class PrefixAffinity:
    """Record of the blocks that each replica got, and the order of replicas for a prompt.

    The cost of a replica is the number of blocks that it does not hold, and ``request_cost`` blocks
    for each request that it runs. Independent routers break ties alike, by rendezvous hashing.
    """

    def __init__(self, request_cost: float = REQUEST_COST, capacity: int = CAPACITY) -> None:
        self._cost, self._capacity = request_cost, capacity
        self._holders: OrderedDict[int, set[str]] = OrderedDict()

    def rank(self, blocks: Sequence[int], loads: Mapping[str, int]) -> list[str]:
        """Return the replicas of ``loads``, which has their running requests, best first."""
        held = self._held(blocks, loads)
        tie = blocks[0] if blocks else random.getrandbits(64)

        def key(replica: str) -> tuple[float, bytes]:
            lot = blake2b(f"{tie} {replica}".encode(), digest_size=8).digest()
            return self._cost * loads[replica] - held[replica], lot

        return sorted(loads, key=key)

    def _held(self, blocks: Sequence[int], replicas: Collection[str]) -> dict[str, int]:
        """Return how many leading blocks each replica holds."""
        held = dict.fromkeys(replicas, 0)
        holding = set(replicas)
        for place, block in enumerate(blocks, 1):
            holding &= self._holders.get(block, set())
            if not holding:
                break
            held.update(dict.fromkeys(holding, place))
        return held

    def note(self, blocks: Sequence[int], replica: str) -> None:
        """Remember that a replica gets these blocks; the least recently noted are forgotten."""
        # Backwards, so that the end of a prompt is forgotten before its beginning.
        for block in reversed(blocks):
            self._holders.setdefault(block, set()).add(replica)
            self._holders.move_to_end(block)
        while len(self._holders) > self._capacity:
            self._holders.popitem(last=False)
