"""Literals: values as Python and JSON write them, read from a model's text without running it."""

from __future__ import annotations

import re
import sys
import unicodedata
from typing import Any

# Most levels of values: deeper ones are refused before Python's own stack is full.
MAX_DEPTH = 64
# Most digits of a whole number. A longer one is read as a float.
MAX_DIGITS = 4000

WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_SPACE = re.compile(r"\s*")
_OPENER = re.compile(r"([rRbBuUfF]{0,2})(\"\"\"|'''|\"|')")
_WORD = re.compile(r"[^\W\d]\w*")
_NUMBER = re.compile(
    r"[+-]?(?:0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+"
    r"|(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d+)?)(?!\w)"
)
_ESCAPE = re.compile(
    r"\\(\r\n|N\{[^}]{1,99}\}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|.)",
    re.DOTALL,
)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v"}
_ESCAPED |= {"\\": "\\", "'": "'", '"': '"', "/": "/", "\n": "", "\r\n": "", "\r": ""}
_PLACEHOLDER = re.compile(r"\{\{|\}\}|[{}]")
_PIECES = {quote: re.compile(rf"(?:[^\\{quote}]+|\\.)*", re.DOTALL) for quote in "'\""}

# Characters that may follow a closing quote, by the string's parent. A quote before another
# character belongs to the string, if the text cannot be read otherwise.
_NEXT_VALUE = r"[\"'\[({\d.+-]|[rRbBuUfF]{1,2}[\"']|(?:True|False|None|true|false|null)\b"
FOLLOWS = {
    "argument": re.compile(r"\s*(?:,\s*[^\W\d]\w*\s*=(?!=)|,?\s*\)\s*(?:,|\]|$))"),
    "item": re.compile(rf"\s*(?:,?\s*[\])}}]|,\s*(?:{_NEXT_VALUE}))"),
    "key": re.compile(r"\s*:"),
    "value": re.compile(r"\s*(?:,?\s*\}|,\s*[\"'\d+-])"),
}


class LiteralError(ValueError):
    """Error of a text that is not a literal. ``at`` is the first wrong character."""

    def __init__(self, why: str, at: int) -> None:
        super().__init__(f"{why} at character {at}")
        self.at = at


def skip_space(text: str, at: int) -> int:
    """Return the place of the next character from ``at`` on that is not white space."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


class LiteralReader:
    """Reads literals of ``text``: ``value(at)`` returns the one at a place, and its end.

    It reads strings, numbers, lists, dicts, tuples, sets, and the words of Python and JSON for
    true, false and null. Tuples and sets become lists, and keys become strings. Numbers may have a
    sign or leading zeros. Strings may have raw control characters. With ``mends`` a quote inside a
    string need not be escaped if the text after it could not follow the string's end. Raises
    LiteralError.
    """

    def __init__(self, text: str, *, mends: bool = False) -> None:
        self.text = text
        self.mends = mends

    def value(self, at: int, within: str = "item", depth: int = 0) -> tuple[Any, int]:
        """Return the value at ``at``, after any white space, and the place after the value.

        ``within`` is the kind of its parent: an "argument", an "item", or a "value" of a dict.
        """
        if depth > MAX_DEPTH:
            raise LiteralError(f"values are more than {MAX_DEPTH} deep", at)
        at = skip_space(self.text, at)
        first = self.text[at : at + 1]
        if first in ("[", "("):
            return self._items(at + 1, "])"["[(".index(first)], depth)
        if first == "{":
            return self._braces(at + 1, depth)
        if _OPENER.match(self.text, at):
            return self._strings(at, within)
        number = _NUMBER.match(self.text, at)
        if number:
            return _number(number[0]), number.end()
        word = _WORD.match(self.text, at)
        if word and word[0] in WORDS:
            return WORDS[word[0]], word.end()
        raise LiteralError("a value is missing", at)

    def _items(self, at: int, closer: str, depth: int) -> tuple[Any, int]:
        """Read the content of a bracket. A value in parentheses without a comma is that value."""
        items: list[Any] = []
        comma = False
        while True:
            at = skip_space(self.text, at)
            if self.text.startswith(closer, at):
                single = closer == ")" and len(items) == 1 and not comma
                return (items[0] if single else items), at + 1
            if items and not comma:
                raise LiteralError(f"',' or {closer!r} is missing", at)
            item, at = self.value(at, "item", depth + 1)
            items.append(item)
            at, comma = self._comma(at)

    def _braces(self, at: int, depth: int) -> tuple[Any, int]:
        """Read a dict or a set."""
        pairs: dict[str, Any] = {}
        items: list[Any] = []
        comma = True
        while True:
            at = skip_space(self.text, at)
            if self.text.startswith("}", at):
                return (items or pairs), at + 1
            if not comma:
                raise LiteralError("',' or '}' is missing", at)
            start = at
            key, at = self.value(at, "item" if items else "key", depth + 1)
            at = skip_space(self.text, at)
            if self.text.startswith(":", at) and not items:
                pairs[_key(key, start)], at = self.value(at + 1, "value", depth + 1)
            elif pairs:
                raise LiteralError("':' is missing", at)
            else:
                items.append(key)
            at, comma = self._comma(at)

    def _comma(self, at: int) -> tuple[int, bool]:
        at = skip_space(self.text, at)
        comma = self.text.startswith(",", at)
        return at + comma, comma

    def _strings(self, at: int, within: str) -> tuple[str, int]:
        """Read a string, and directly following strings, which Python joins."""
        opener = _OPENER.match(self.text, at)
        parts = []
        while opener is not None:
            part, at = self._string(opener, within)
            parts.append(part)
            after = skip_space(self.text, at)
            apart = after > at and not self.mends
            opener = _OPENER.match(self.text, after) if apart else None
            # A letter before a quote is more likely part of a string with quotes inside.
            opener = None if opener is not None and opener[1] else opener
        return joined_surrogates("".join(parts)), at

    def _string(self, opener: re.Match[str], within: str) -> tuple[str, int]:
        prefix, quote = opener[1].lower(), opener[2]
        end = self._end(opener.end(), quote, within)
        body = self.text[opener.end() : end]
        if "r" not in prefix:
            body = _ESCAPE.sub(_unescaped, body)
        if "f" in prefix:
            body = _PLACEHOLDER.sub(lambda found: _brace(found[0], opener.start()), body)
        return body, end + len(quote)

    def _end(self, at: int, quote: str, within: str) -> int:
        """Return the place of a string's closing quote."""
        pieces, start = _PIECES[quote[0]], at
        while (found := pieces.match(self.text, at)) and found.end() < len(self.text):
            at = found.end()
            if self.text[at] == "\\":
                break
            if len(quote) == 3:
                if self.text.startswith(quote, at):
                    return at
            elif not self.mends or FOLLOWS[within].match(self.text, at + 1):
                return at
            at += 1
        raise LiteralError("a string does not end", start - len(quote))


def joined_surrogates(text: str) -> str:
    """Return ``text`` with pairs of surrogates joined, and single ones replaced."""
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _unescaped(found: re.Match[str]) -> str:
    what = found[1]
    if what in _ESCAPED:
        return _ESCAPED[what]
    if what[0] in "xuU" and len(what) > 1:
        code = int(what[1:], 16)
        return chr(code) if code <= 0x10FFFF else found[0]
    if what[0] in "01234567":
        return chr(int(what, 8))
    if what[0] == "N" and len(what) > 1:
        try:
            return unicodedata.lookup(what[2:-1])
        except KeyError:
            return found[0]
    return found[0]


def _brace(found: str, at: int) -> str:
    if len(found) == 1:
        raise LiteralError("an f-string has a placeholder", at)
    return found[0]


def _number(text: str) -> int | float:
    """Return a number. Beyond the range of a float it is the largest one: JSON has no infinity."""
    digits = text.replace("_", "").lower()
    if digits.lstrip("+-")[:2] in ("0x", "0o", "0b"):
        return int(digits, 0)
    if len(digits) <= MAX_DIGITS and digits.lstrip("+-").isdecimal():
        return int(digits)
    largest = sys.float_info.max
    return min(max(float(digits), -largest), largest)


def _key(key: Any, at: int) -> str:
    """Return a dict's key as JSON writes it."""
    if isinstance(key, str):
        return key
    if isinstance(key, (list, dict)):
        raise LiteralError("a key is not a string", at)
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    return repr(key)
