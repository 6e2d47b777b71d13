"""ReplyParser: a reply's token ids -> text, thinking and tool calls, piece by piece."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lfm2_fast.text.markers import Marker, markers_of, open_passage, overlap, writes_xml
from lfm2_fast.text.token_stream import TokenDecoder
from lfm2_fast.text.tool_calls import Call, read_calls
from lfm2_fast.text.xml_calls import read_xml_calls

# Text that may begin calls without markers, and all beginnings of this text.
_BARE = re.compile(r"\s*(?:\[\s*(?:[^\W\d][\w.-]*\s*\(|\{\s*[\"']name[\"'])|<function=)")
_MAY_BE_BARE = re.compile(
    r"\s*(?:\[\s*(?:[^\W\d][\w.-]*\s*|\{\s*(?:[\"'](?:n|na|nam|name|name[\"'])?)?)?"
    r"|<(?:f|fu|fun|func|funct|functi|functio|function)?)?"
)


State = Literal["answer", "thinking", "call"]


@dataclass(frozen=True)
class Delta:
    """Piece of a reply: some text, some thinking, or a whole tool call.

    A tool call has an ``index`` among the reply's calls, an ``id``, the tool's ``name``, and
    ``arguments``, the text of a JSON object.
    """

    kind: Literal["text", "reasoning", "tool_call"]
    text: str = ""
    index: int = 0
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class ReplyParser:
    """Splits a reply: ``feed`` it token ids one after another, then ``finish`` it.

    The result does not depend on how the ids are grouped into calls. A marker that is a token
    counts only as this token; text with the same letters stays text.

    With ``tools`` the calls of tools become deltas, each when its passage closes. Other text in a
    passage of calls becomes text. Without ``tools`` calls are text. ``functions`` are the clients'
    tools, with schemas that give the types of arguments in XML. ``thinking`` is True if the reply
    begins inside of thinking. None takes that from ``prompt_ids``, and False treats thinking as
    text.

    Other special tokens are dropped, and so is white space beside markers. No input raises an
    exception. ``reasoning_tokens`` counts the tokens of thinking.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        tools: bool,
        thinking: bool | None,
        prompt_ids: Sequence[int],
        functions: Sequence[Mapping[str, Any]] = (),
        new_id: Callable[[], str] = lambda: f"call_{secrets.token_hex(12)}",
    ) -> None:
        self.reasoning_tokens = 0
        self._tools, self._thinks, self._new_id = tools, thinking is not False, new_id
        self._xml = writes_xml(tokenizer)
        self._schemas = _schemas(functions)
        markers = markers_of(tokenizer)
        active = [m for m in markers if (self._thinks if m.kind == "thinking" else tools)]
        self._by_id = {m.id: m for m in active if m.id is not None}
        self._spelled = {m.text: m for m in active if m.id is None}
        self._closers = {m.partner: m.text for m in markers if m.closes}
        self._scan = re.compile("|".join(map(re.escape, self._spelled)) or r"(?!)")
        kept = {m.id for m in markers if m.kind == "thinking"} | self._by_id.keys()
        added = tokenizer.added_tokens_decoder.items()
        self._dropped = {id for id, token in added if token.special} - kept
        self._decoder = TokenDecoder(tokenizer)
        opened, said = open_passage(tokenizer, prompt_ids, active)
        self._state: State = "answer"
        self._opener: Marker | None = None
        if thinking or (opened is not None and opened.kind == "thinking"):
            self._state, self._opener = "thinking", opened
        elif opened is not None:
            self._state = "call"
        self._may_think = self._state == "answer" and thinking is None
        self._may_be_bare = self._state == "answer" and tools
        self._fresh = self._state != "answer" and not said  # white space is dropped here
        self._text = ""  # perhaps the beginning of a marker that is not a token
        self._held = ""  # of the passage, not yet returned
        self._body = [said] if self._state == "call" else []  # of calls
        self._last: list[Call] = []  # calls of the passage before
        self._count = 0

    @property
    def closer(self) -> str:
        """Marker that would end the open thinking; empty outside of thinking."""
        if self._state != "thinking" or self._opener is None:
            return ""
        return self._closers[self._opener.partner]

    def feed(self, token_ids: Sequence[int]) -> list[Delta]:
        """Return the deltas of the next tokens."""
        deltas: list[Delta] = []
        for token in token_ids:
            marker = self._by_id.get(token)
            before = self._state
            if marker is not None:
                deltas += self._spelled_out(self._decoder.end(), last=True)
                deltas += self._mark(marker)
            elif token not in self._dropped:
                deltas += self._spelled_out(self._decoder.put(token))
            self.reasoning_tokens += "thinking" in (before, self._state)
        return _merged(deltas)

    def finish(self) -> list[Delta]:
        """Return the deltas that were held back until the end."""
        deltas = [*self._spelled_out(self._decoder.end(), last=True)]
        held, self._held = self._held, ""
        if self._state == "call":
            deltas += self._calls()
        elif self._state == "answer" and self._may_be_bare and _BARE.match(held):
            calls, rest = self._read(held)
            if not calls or rest or self._last:
                # If calls are repeated, the second copy has fewer markers.
                deltas += [] if calls and calls == self._last else [Delta("text", held)]
            else:
                deltas += [self._call(each) for each in calls]
        elif held:
            deltas.append(Delta("reasoning" if self._state == "thinking" else "text", held))
        return _merged(deltas)

    def _spelled_out(self, text: str, last: bool = False) -> Iterator[Delta]:
        """Find markers that are not tokens. Text that may begin a marker waits for more."""
        self._text += text
        while (found := self._scan.search(self._text)) is not None:
            before, self._text = self._text[: found.start()], self._text[found.end() :]
            yield from self._pass(before)
            yield from self._mark(self._spelled[found[0]])
        held = 0 if last else max((overlap(self._text, m) for m in self._spelled), default=0)
        whole = self._text[: len(self._text) - held]
        self._text = self._text[len(whole) :]
        yield from self._pass(whole)

    def _mark(self, marker: Marker) -> Iterator[Delta]:
        """Process a marker: it opens or closes a passage, or is text if it can do neither."""
        if marker.kind == "call" and self._state != "thinking":
            yield from self._mark_call(marker)
        elif self._may_think and not marker.closes and not self._held.strip():
            self._turn("thinking", marker)
        elif self._state == "thinking" and marker.kind == "thinking" and self._closes(marker):
            self._turn("answer")
        elif self._state == "thinking" and self._fresh and not marker.closes and not self._opener:
            # The reply began in thinking anyway, and the model writes the marker too.
            self._opener = marker
        else:
            yield from self._pass(marker.text)

    def _closes(self, marker: Marker) -> bool:
        return marker.closes and (not self._opener or marker.partner == self._opener.partner)

    def _mark_call(self, marker: Marker) -> Iterator[Delta]:
        if self._state == "call":
            yield from self._calls()
        elif not marker.closes:
            yield from self._pass("", flush=True)
        elif self._may_be_bare and _BARE.match(self._held):
            # Calls without an opening marker, or repeated calls.
            if not self._last or self._read(self._held)[0] != self._last:
                self._body = [self._held]
                yield from self._calls()
        else:
            return
        self._turn("answer" if marker.closes else "call")

    def _turn(self, state: State, opener: Marker | None = None) -> None:
        self._state, self._opener, self._held = state, opener, ""
        self._fresh, self._may_think, self._may_be_bare = True, False, self._tools

    def _pass(self, text: str, flush: bool = False) -> Iterator[Delta]:
        """Emit text of the passage, except the part that a following marker could change."""
        if self._state == "call":
            self._body.append(text)
            return
        self._held += text
        if self._fresh:
            self._held = self._held.lstrip()
        if self._state == "answer" and not flush:
            if self._may_think and not self._held.strip():
                return
            # The next text decides what this is.
            if self._may_be_bare and (
                _BARE.match(self._held) or _MAY_BE_BARE.fullmatch(self._held)
            ):
                return
        # Only white space before a marker is dropped, and a plain answer has no marker.
        plain = self._state == "answer" and not self._tools
        shown = self._held if plain else self._held.rstrip()
        if shown:
            self._held = self._held[len(shown) :]
            self._fresh = self._may_think = self._may_be_bare = False
            yield Delta("reasoning" if self._state == "thinking" else "text", shown)

    def _read(self, body: str) -> tuple[list[Call], list[str]]:
        return read_xml_calls(body, self._schemas) if self._xml else read_calls(body)

    def _calls(self) -> Iterator[Delta]:
        calls, rest = self._read("".join(self._body))
        self._body = []
        self._last = calls or self._last
        for part in rest:
            yield Delta("text", part)
        for each in calls:
            yield self._call(each)

    def _call(self, call: Call) -> Delta:
        self._count += 1
        place = self._count - 1
        return Delta("tool_call", "", place, self._new_id(), call.name, call.arguments)


def _schemas(functions: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    schemas = {}
    for tool in functions:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and isinstance(function.get("parameters"), Mapping):
            schemas[str(function.get("name"))] = function["parameters"]
    return schemas


def _merged(deltas: Sequence[Delta]) -> list[Delta]:
    """Join adjacent texts of one kind."""
    merged: list[Delta] = []
    for delta in deltas:
        if merged and delta.kind == merged[-1].kind != "tool_call":
            merged[-1] = replace(merged[-1], text=merged[-1].text + delta.text)
        elif delta.kind == "tool_call" or delta.text:
            merged.append(delta)
    return merged
