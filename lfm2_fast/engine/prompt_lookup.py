"""PromptLookup: drafts of a text's next tokens out of the text itself. (Saxena, 2023)"""

from __future__ import annotations

from collections.abc import Sequence

# Tokens to which an earlier place is compared with the text's end.
MOST_COMPARED = 16


class PromptLookup:
    """Finds earlier places of a text that are like its end, and drafts what came there.

    Up to ``size`` last tokens are looked up, the most first. Of places that are alike the last
    counts, and the place that the draft before came from, as long as it goes on to fit.
    """

    def __init__(self, size: int) -> None:
        self._text: list[int] = []
        # By length less one: the last tokens of a place, and the place after them.
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in range(size)]
        self._source = self._drafted_at = 0

    def follow(self, prompt: Sequence[int], written: Sequence[int]) -> None:
        """Index the new part of a text: its prompt, then its new tokens."""
        text = self._text
        new = written[len(text) - len(prompt) :] if text else [*prompt, *written]
        for token in new:
            end = len(text)
            for length, places in enumerate(self._places, 1):
                if length <= end:
                    places[tuple(text[end - length :])] = end
            text.append(token)

    def find(self) -> tuple[int, int] | None:
        """Return the place whose tokens are to come next, and how many tokens before it fit."""
        text = self._text
        found = self._source + len(text) - self._drafted_at if self._source else 0
        best = self._alike(found) if 0 < found < len(text) else 0
        for length in range(len(self._places), 0, -1):
            place = self._places[length - 1].get(tuple(text[-length:]))
            if place is not None:
                alike = self._alike(place)
                if alike > best:
                    found, best = place, alike
                break
        return (found, best) if best else None

    def draft(self, place: int, count: int) -> list[int]:
        """Return ``count`` tokens from ``place`` on; what they repeat themselves goes on so."""
        text = self._text
        drafted: list[int] = []
        for at in range(place, place + count):
            drafted.append(text[at] if at < len(text) else drafted[at - len(text)])
        self._source, self._drafted_at = place, len(text)
        return drafted

    def _alike(self, place: int) -> int:
        """Return how many tokens before ``place`` are those at the text's end."""
        text, count = self._text, 0
        most = min(place, MOST_COMPARED)
        while count < most and text[place - 1 - count] == text[-1 - count]:
            count += 1
        return count
