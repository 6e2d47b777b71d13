"""What happens to tokens while they are written: ids become text, and text becomes segments."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

Kind = Literal["answer", "thinking", "tool call"]
ANSWER: Kind = "answer"

# Opening marker -> what closes it, and what stands between. Thinking can only begin a text, and
# tool calls stand in the answer: where another passage mentions a marker, it is text.
PASSAGES: dict[str, tuple[str, Kind]] = {
    "<think>": ("</think>", "thinking"),
    "<|cot_start|>": ("<|cot_end|>", "thinking"),
    "<|tool_call_start|>": ("<|tool_call_end|>", "tool call"),
}
TOOL_CALL = "<|tool_call_start|>"
THINKING = tuple(opener for opener, (_, kind) in PASSAGES.items() if kind == "thinking")
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
        whole = len(self._held) - self._overlap(marker)
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

    def _overlap(self, marker: str) -> int:
        """How much of the marker's beginning the held text ends with."""
        longest = min(len(marker) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(marker[:n])), 0)


class Stopped(Exception):
    """Ends a ``generate`` from within its streamer."""


@dataclass
class Timing:
    """When a call of ``generate`` began, and when its first and its last token came."""

    begun: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0

    def tick(self) -> None:
        """Note that a token came."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += 1

    def __str__(self) -> str:
        if not self.tokens:
            return "no tokens"
        words = f"first token after {self.first - self.begun:.2f} s"
        if self.tokens > 1 and self.last > self.first:
            rate = (self.tokens - 1) / (self.last - self.first)
            words += f", {self.tokens} tokens at {rate:.{0 if rate >= 100 else 1}f} tokens/s"
        return words


class TokenStream:
    """A streamer for ``generate`` with one row: hands over text as soon as characters are whole.

    Special tokens are dropped, but for those in MARKERS. When ``stopped`` says so, ``generate``
    ends with Stopped, between two steps. ``text`` is all the text, ``ids`` all the tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        from tokenizers.decoders import DecodeStream

        self.ids: list[int] = []
        self.text = ""
        self.timing = Timing()
        self._write = write
        self._stopped = stopped
        self._backend = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=False)
        added = tokenizer.added_tokens_decoder.items()
        self._dropped = {i for i, t in added if t.special and t.content not in MARKERS}
        self._in_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, which comes first, or one more token."""
        if self._in_prompt:
            self._in_prompt = False
            return
        self.timing.tick()
        token = int(value)
        self.ids.append(token)
        if token not in self._dropped:
            self._pass(self._decoder.step(self._backend, token) or "")
        if self._stopped():
            raise Stopped

    def end(self) -> None:
        """The text is over: hand over characters that remained incomplete."""
        shown = [token for token in self.ids if token not in self._dropped]
        whole = self._backend.decode(shown, skip_special_tokens=False)
        self._pass(whole[len(self.text) :])

    def _pass(self, text: str) -> None:
        if text:
            self.text += text
            self._write(text)
