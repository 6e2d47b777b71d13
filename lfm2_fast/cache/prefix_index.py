"""PrefixIndex: full pages, found by their text and the text before them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from lfm2_fast.cache.page_memory import PAGE_SIZE
from lfm2_fast.cache.page_pool import PagePool


@dataclass(frozen=True)
class Match:
    """Indexed part of a text: whole ``pages``, then ``rows`` tokens of page ``partial``."""

    pages: tuple[int, ...] = ()
    partial: int | None = None
    rows: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the text whose keys and values are there."""
        return len(self.pages) * PAGE_SIZE + self.rows


@dataclass
class _Entry:
    page: int
    parent: bytes
    tokens: tuple[int, ...]


class PrefixIndex:
    """Pages of ``pool`` by a hash chain over their tokens: each hash includes the one before.

    Only full pages are entered, as soon as the launch that fills them is made. They stay as long as
    the pool keeps them. ``salt`` separates texts that must not share pages, for example of two
    adapters or two tenants.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        pool.on_evict = self._evicted
        self._entries: dict[bytes, _Entry] = {}
        self._digests: dict[int, bytes] = {}
        self._children: dict[bytes, set[bytes]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def match(
        self, tokens: Sequence[int], salt: bytes = b"", digests: list[bytes] | None = None
    ) -> Match:
        """Return the longest indexed part of a text's beginning.

        ``digests`` are the known digests of the text's first full pages. The list is extended, so
        that a later look-up need not hash them again.
        """
        digests = [] if digests is None else digests
        parent, pages = _root(salt), []
        for number in range(len(tokens) // PAGE_SIZE):
            if number == len(digests):
                part = tokens[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]
                digests.append(_digest(parent, part))
            digest = digests[number]
            if digest not in self._entries:
                break
            parent = digest
            pages.append(self._entries[digest].page)
        rest = tokens[len(pages) * PAGE_SIZE :][:PAGE_SIZE]
        partial, rows = None, 0
        for child in self._children.get(parent, ()):
            entry = self._entries[child]
            same = common_prefix(entry.tokens, rest)
            if same > rows:
                partial, rows = entry.page, same
        return Match(tuple(pages), partial, rows)

    def enter(self, tokens: Sequence[int], pages: Sequence[int], salt: bytes = b"") -> None:
        """Enter the full pages of a text. ``pages`` hold it from its beginning on.

        A page is left out if another page with its text is indexed already.
        """
        parent = _root(salt)
        for number, page in enumerate(pages):
            part = tokens[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]
            if len(part) < PAGE_SIZE:
                return
            digest = self._digests.get(page) or _digest(parent, part)
            if digest not in self._entries:
                self._entries[digest] = _Entry(page, parent, tuple(part))
                self._digests[page] = digest
                self._children.setdefault(parent, set()).add(digest)
                self.pool.keep(page)
            parent = digest

    def clear(self) -> None:
        """Remove every text, and free the pages without owner."""
        self.pool.drop_cached()
        for page in list(self._digests):
            self.pool.forget(page)
            self._evicted(page)

    def _evicted(self, page: int) -> None:
        digest = self._digests.pop(page)
        entry = self._entries.pop(digest)
        siblings = self._children[entry.parent]
        siblings.discard(digest)
        if not siblings:
            del self._children[entry.parent]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts begin with in common."""
    count = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        count += 1
    return count


def _root(salt: bytes) -> bytes:
    return blake2b(salt, digest_size=16).digest()


def _digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()
