"""Stop strings, parts and choices, without a server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the extra 'server' is not installed")

from lfm2_fast.engine.request import Event  # noqa: E402
from lfm2_fast.server.errors import ApiError  # noqa: E402
from lfm2_fast.server.output import Choice, StopText  # noqa: E402
from lfm2_fast.text.reply_parser import Delta  # noqa: E402

LETTERS = st.text("ab", min_size=1, max_size=3)


class Spelled:
    """A parser whose tokens are letters, of thinking where they are large."""

    reasoning_tokens = 0

    def feed(self, token_ids):
        made = "".join(map(chr, token_ids))
        return [Delta("reasoning" if made.isupper() else "text", made)]

    def finish(self):
        return [Delta("text", "!")]


def events(text: str, reason: str | None = "length") -> list[Event]:
    made = [Event(1, 0, ord(letter)) for letter in text[:-1]]
    return [*made, Event(1, 0, ord(text[-1]), reason)]


@given(st.lists(LETTERS, min_size=1, max_size=3), st.text("ab", max_size=12), st.data())
def test_a_text_ends_at_the_same_place_however_it_is_cut(stops, text, data) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for keep in (False, True):
        one, many = StopText(stops, keep), StopText(stops, keep)
        whole = one.feed(text) + one.finish()
        assert "".join([*map(many.feed, pieces), many.finish()]) == whole
        ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))]
        assert one.found is many.found is bool(ends)
        cut = text[: ends[0]] if ends else text
        longest = max((len(stop) for stop in stops if ends and cut.endswith(stop)), default=0)
        assert whole == (cut if keep else cut[: len(cut) - longest])


def test_stop_strings_look_at_the_answer_alone() -> None:
    choice = Choice(0, Spelled(), stops=["b"])
    part = choice.take(events("ABcAb"))
    assert [(d.kind, d.text) for d in part.deltas] == [
        ("reasoning", "A"),
        ("reasoning", "B"),
        ("text", "c"),
        ("reasoning", "A"),
    ]
    assert part.finish_reason == "stop" and choice.done and choice.tokens == 5


def test_end_tokens_are_no_text() -> None:
    for keep in (False, True):
        choice = Choice(0, Spelled(), ends={ord("z")}, keep_stop=keep)
        part = choice.take(events("az", "stop"))
        assert part.text == ("az!" if keep else "a!")
        assert choice.tokens == 2 and part.finish_reason == "stop"


def test_a_failed_request_is_an_error() -> None:
    for event, status in (
        (Event(1, 0, None, "error", error=ValueError("no")), 400),
        (Event(1, 0, None, "error", error=RuntimeError("no")), 500),
        (Event(1, 0, None, "deadline"), 504),
        (Event(1, 0, None, "cancelled"), 503),
    ):
        with pytest.raises(ApiError) as raised:
            Choice(0, Spelled()).take([event])
        assert raised.value.status == status


def test_nothing_after_the_end_counts() -> None:
    choice = Choice(0, Spelled(), stops=["b"])
    assert choice.take(events("ab", None)).finish_reason == "stop"
    part = choice.take(events("cc"))
    assert (part.text, part.finish_reason, choice.tokens) == ("", None, 2)
