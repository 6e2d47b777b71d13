"""PrefixAffinity: prompts go where their beginning is, unless that replica has much to do."""

from __future__ import annotations

import json
import random
from typing import Any

from lfm2_fast.cluster.prefix_affinity import BLOCK, PrefixAffinity, blocks_of

IDLE = {"a": 0, "b": 0, "c": 0, "d": 0}


def body(*texts: str, **fields: Any) -> bytes:
    messages = [{"role": "user", "content": text} for text in texts]
    return json.dumps({"messages": messages, **fields}).encode()


def test_a_grown_conversation_begins_with_the_same_blocks() -> None:
    first = blocks_of(body("x" * 700))
    grown = blocks_of(body("x" * 700, "y" * 700))
    assert len(first) == 2 and len(grown) == 5 and grown[:2] == first
    assert blocks_of(body("z" + "x" * 700))[0] != first[0]
    # Sampling is not part of a prompt; the adapter and the tenant are.
    assert blocks_of(body("x" * 700, temperature=0.5)) == first
    assert not {*blocks_of(body("x" * 700, model="b"))} & {*first}
    assert not {*blocks_of(body("x" * 700, cache_salt="b"))} & {*first}


def test_every_kind_of_prompt_has_blocks_and_no_other_body_has() -> None:
    for name in ("prompt", "input"):
        assert len(blocks_of(json.dumps({name: "x" * 2 * BLOCK}).encode())) == 2
    assert blocks_of(json.dumps({"prompt": [12345] * 200}).encode())
    for wrong in (b"", b"{", b"[1]", b"5", b"{}", b"\xff", b'{"prompt": "\\ud800"}', b"[" * 10**5):
        assert blocks_of(wrong) == ()


def test_a_prompt_follows_its_longest_beginning() -> None:
    affinity = PrefixAffinity(request_cost=4)
    affinity.note([1, 2, 3], "b")
    affinity.note([1, 2], "c")
    assert affinity.rank([1, 2, 3, 4], IDLE)[:2] == ["b", "c"]
    # The chain counts, not a block that stands elsewhere.
    affinity.note([9, 3, 4, 5], "d")
    assert affinity.rank([1, 2, 3, 4], IDLE)[0] == "b"
    assert affinity.rank([1, 2, 3, 4], {"a": 0, "c": 0})[0] == "c"


def test_much_work_outweighs_a_prefix() -> None:
    affinity = PrefixAffinity(request_cost=4)
    affinity.note(range(9), "b")
    assert affinity.rank(range(20), {**IDLE, "b": 2})[0] == "b"
    assert affinity.rank(range(20), {**IDLE, "b": 3})[0] != "b"


def test_strange_prompts_go_to_the_idle_and_routers_agree() -> None:
    one, other = PrefixAffinity(), PrefixAffinity()
    assert one.rank([7], {"a": 1, "b": 0, "c": 1})[0] == "b"
    chosen = [one.rank([block], IDLE) for block in range(400)]
    assert chosen == [other.rank([block], dict(reversed(IDLE.items()))) for block in range(400)]
    counts = [sum(order[0] == name for order in chosen) for name in IDLE]
    assert min(counts) > 60
    # A replica that leaves moves its own prompts alone.
    left = {name: 0 for name in IDLE if name != "d"}
    for block, order in enumerate(chosen):
        assert one.rank([block], left)[0] == next(name for name in order if name != "d")


def test_old_blocks_are_forgotten_ends_first() -> None:
    affinity = PrefixAffinity(capacity=4)
    affinity.note([1, 2, 3], "b")
    affinity.note([11, 12], "c")
    assert affinity._held([1, 2, 3], IDLE)["b"] == 2 and affinity._held([11, 12], IDLE)["c"] == 2
    affinity.note([1], "b")
    affinity.note([21, 22], "c")
    assert affinity._held([1, 2, 3], IDLE)["b"] == 1


def test_conversations_stay_where_they_are() -> None:
    """Nearly all simulated turns find their prefix; by chance every fourth would."""
    affinity, draw = PrefixAffinity(), random.Random(0)
    homes: dict[int, str] = {}
    hits = turns = 0
    for _ in range(2000):
        user = draw.randrange(40)
        # A system prompt that all have in common, then a text of their own.
        blocks = [1, 2, *(100 * user + place for place in range(3, 24))]
        loads = {name: draw.randrange(4) for name in IDLE}
        chosen = affinity.rank(blocks, loads)[0]
        affinity.note(blocks, chosen)
        turns += user in homes
        hits += homes.get(user) == chosen
        homes[user] = chosen
    assert hits > 0.95 * turns
