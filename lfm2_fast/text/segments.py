"""Segments: a stream of text taken apart into answer, thinking and tool calls."""

from __future__ import annotations

from typing import Literal, NamedTuple

from lfm2_fast.text.markers import CALL_PAIR, THINKING_PAIRS, overlap

Kind = Literal["answer", "thinking", "tool call"]
ANSWER: Kind = "answer"

# Opening marker -> what closes it, and what stands between. Thinking can only begin a text, and
# tool calls stand in the answer: where another passage mentions a marker, it is text.
PASSAGES: dict[str, tuple[str, Kind]] = {
    **{opener: (closer, "thinking") for opener, closer in THINKING_PAIRS},
    CALL_PAIR[0]: (CALL_PAIR[1], "tool call"),
}
TOOL_CALL = CALL_PAIR[0]
THINKING = tuple(opener for opener, _ in THINKING_PAIRS)
MARKERS = frozenset(PASSAGES) | {closer for closer, _ in PASSAGES.values()}


class Segment(NamedTuple):
    """A piece of text, what it is, and whether it begins a new passage of its kind.

    ``last`` says that the passage was closed by its marker; there is no text with it.
    """

    kind: Kind
    text: str
    first: bool
    last: bool = False


class Splitter:
    """Takes a stream of text apart into segments; how it is cut into pieces makes no difference.

    Markers are dropped, and so is white space at either end of a passage. Text begins as an answer,
    unless ``inside`` is the marker with which the prompt already opened something.
    """

    def __init__(self, inside: str | None = None) -> None:
        self._held = ""
        self._may_think = inside is None
        self._turn(inside, "")

    def feed(self, text: str) -> list[Segment]:
        """The segments that ``text`` completes; what could become a marker is held back."""
        self._held += text
        if self._may_think:
            self._held = self._held.lstrip()
            opener = next((m for m in THINKING if self._held.startswith(m)), None)
            if opener is not None:
                self._turn(opener, self._held[len(opener) :])
            elif any(marker.startswith(self._held) for marker in THINKING):
                return []
            self._may_think = False
        segments: list[Segment] = []
        while (at := self._held.find(marker := self.closer or TOOL_CALL)) >= 0:
            segments += self._passed(self._held[:at])
            if self._begun and marker == self.closer:
                segments.append(Segment(self.kind, "", False, last=True))
            self._turn(marker if marker in PASSAGES else None, self._held[at + len(marker) :])
        whole = len(self._held) - overlap(self._held, marker)
        segments += self._passed(self._held[:whole])
        self._held = self._held[whole:]
        return segments

    def close(self) -> list[Segment]:
        """The end of the text: what was held back was no marker after all."""
        held, self._held = self._held, ""
        return self._passed(held)

    def _turn(self, opener: str | None, rest: str) -> None:
        """Go on with ``rest`` in what ``opener`` opens, or in the answer."""
        self.closer, self.kind = PASSAGES[opener] if opener else ("", ANSWER)
        self._held, self._space, self._begun = rest, "", False

    def _passed(self, text: str) -> list[Segment]:
        text = self._space + text
        if not self._begun:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if not shown:
            return []
        first, self._begun = not self._begun, True
        return [Segment(self.kind, shown, first)]
