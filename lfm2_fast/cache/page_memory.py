"""Memory for the pages of a KV cache: it grows, and never moves if graphs point at it."""

from __future__ import annotations

import mmap
import sys

import torch

# Tokens of a page.
PAGE_SIZE = 64
# Linux's flag for address space that is not counted as memory until it is written to.
_NORESERVE = 0x4000
# Smallest allocation on a device, in bytes.
_LEAST = 2**26


class PageMemory:
    """Pages ``[pages, 2 * layers, kv_heads, PAGE_SIZE, head_dim]``: k and v of each layer.

    All layers of a page are next to each other. ``layer(i)`` gives the views of one layer, which
    implementations index by page number. ``limit`` is the largest number of pages.

    ``kind`` says how they grow. "reserved", on a CPU: the whole address space is reserved at once,
    and pages take memory when they are written. "slabs", on a device with ``in_place``: a page's
    number is its distance from the first slab, in pages, so one base address and one table reach
    all slabs. "moving", elsewhere: the pages move.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        limit: int,
        device: torch.device | str,
        dtype: torch.dtype,
        in_place: bool,
    ) -> None:
        self.shape = (2 * layers, kv_heads, PAGE_SIZE, head_dim)
        self.limit = limit
        self.device, self.dtype = torch.device(device), dtype
        self.page_bytes = dtype.itemsize
        for size in self.shape:
            self.page_bytes *= size
        self.count = 0
        self._slabs: list[torch.Tensor] = []
        kinds = {True: "slabs", False: "moving"}
        self.kind = "reserved" if self.device.type == "cpu" else kinds[in_place]
        if self.kind == "reserved":
            self._slabs = [self._reserved()]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's k and v, ``[pages, kv_heads, PAGE_SIZE, head_dim]`` from the base on."""
        base = self._slabs[0] if self._slabs else self._empty(0)
        return base[:, 2 * index], base[:, 2 * index + 1]

    def grow(self, pages: int) -> list[int]:
        """Take memory for at least ``pages`` more and return the numbers of the new pages.

        There may be fewer if ``limit`` is near, and more to avoid growing again soon. Raises
        torch.OutOfMemoryError as torch does.
        """
        first = self.count
        if self.kind == "reserved":
            self.count = min(self.limit, first + pages)
            return list(range(first, self.count))
        ahead = max(pages, first // 4, _LEAST // max(self.page_bytes, 1))
        more = min(ahead, self.limit - first)
        if self.kind == "slabs":
            numbers = self._slab(more)
            self.count += more
            return numbers
        moved = self._empty(first + more)
        if self._slabs:
            moved[:first] = self._slabs[0]
        self._slabs = [moved]
        self.count += more
        return list(range(first, self.count))

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first ``tokens`` rows of a page into another one, for all layers."""
        self.page(target)[:, :, :tokens] = self.page(source)[:, :, :tokens]

    def page(self, number: int) -> torch.Tensor:
        """Return the page of that number, ``[2 * layers, kv_heads, PAGE_SIZE, head_dim]``."""
        for slab in self._slabs:
            place = number - self._number(slab)
            if 0 <= place < len(slab):
                return slab[place]
        raise IndexError(f"page {number} is not in this memory")

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that may have been written."""
        return self.count * self.page_bytes

    def _number(self, slab: torch.Tensor) -> int:
        return (slab.data_ptr() - self._slabs[0].data_ptr()) // max(self.page_bytes, 1)

    def _slab(self, pages: int) -> list[int]:
        """Allocate a slab whose distance from the first is a whole number of pages."""
        slab = self._empty(pages + bool(self._slabs))
        if self._slabs:
            off = (self._slabs[0].data_ptr() - slab.data_ptr()) % self.page_bytes
            items = off // self.dtype.itemsize
            flat = slab.flatten()[items : items + pages * (self.page_bytes // self.dtype.itemsize)]
            slab = flat.view(pages, *self.shape)
        self._slabs.append(slab)
        first = self._number(slab)
        return list(range(first, first + pages))

    def _empty(self, pages: int) -> torch.Tensor:
        # A cache made inside torch.inference_mode must stay writable outside of it.
        with torch.inference_mode(False):
            return torch.empty(pages, *self.shape, dtype=self.dtype, device=self.device)

    def _reserved(self) -> torch.Tensor:
        """Return address space for all pages of a CPU."""
        nbytes = self.limit * self.page_bytes
        if nbytes == 0 or sys.platform == "win32":
            return self._empty(self.limit)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if sys.platform == "linux":
            flags |= _NORESERVE
        try:
            space = mmap.mmap(-1, nbytes, flags=flags)
        except (OSError, OverflowError) as error:
            raise MemoryError(
                f"this machine reserves no address space of {nbytes / 2**30:.0f} GiB for the cache "
                f"({error}); lower max_length or the number of sequences"
            ) from error
        with torch.inference_mode(False):
            return torch.frombuffer(space, dtype=self.dtype).view(self.limit, *self.shape)


def pages_of(tokens: int) -> int:
    """Return how many pages hold a context of ``tokens``."""
    return -(-tokens // PAGE_SIZE)
