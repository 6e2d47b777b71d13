"""Fixtures of the kernels' tests: what a launch touches, pages far apart, any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from lfm2_fast.cache.batch import Batch
from tests.batches import batch_of


@pytest.fixture(scope="session")
def traced(kernel_device: torch.device) -> Callable[..., AbstractContextManager[None]]:
    """``with traced(reads, writes, exchanged)`` follows every access of the kernel launched inside.

    The kernel may load elements of any list, and store only elements of the last two. If a program
    stores an element, no other may load or store it, because programs run in any order. Only
    ``exchanged`` is shared: a program stores before its atomic, and loads after it. This works in
    the interpreter. On a GPU nothing is checked here.
    """

    @contextmanager
    def trace(
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        exchanged: Sequence[torch.Tensor] = (),
    ) -> Iterator[None]:
        if kernel_device.type != "cpu":
            yield
            return
        from triton.runtime.interpreter import interpreter_builder as builder

        loads: list[tuple[tuple[int, ...], np.ndarray]] = []
        stores: list[tuple[tuple[int, ...], np.ndarray]] = []
        wrong_side: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
        counted: set[tuple[int, ...]] = set()
        load, store = builder.create_masked_load, builder.create_masked_store
        atomic = builder.create_atomic_rmw
        exchange = elements(exchanged)
        writable = np.concatenate([elements(writes), exchange])
        readable = np.concatenate([elements(reads), writable])
        writable.sort()
        readable.sort()

        # What lies outside is not touched: a store there could bring the process down.
        def note_load(ptrs: Any, mask: Any, *args: Any) -> Any:
            at = ptrs.data[mask.data.astype(bool)].astype(np.int64)
            assert among(at, readable).all(), "loads from outside of its tensors"
            loads.append((builder.grid_idx, at))
            if builder.grid_idx not in counted:
                wrong_side.append(at)
            return load(ptrs, mask, *args)

        def note_store(ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
            at = ptrs.data[mask.data.astype(bool)].astype(np.int64)
            assert among(at, writable).all(), "stores outside of what it may write"
            stores.append((builder.grid_idx, at))
            if builder.grid_idx in counted:
                wrong_side.append(at)
            return store(ptrs, value, mask, *args)

        def note_atomic(*args: Any) -> Any:
            counted.add(builder.grid_idx)
            return atomic(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "create_masked_load", note_load)
            patch.setattr(builder, "create_masked_store", note_store)
            patch.setattr(builder, "create_atomic_rmw", note_atomic)
            yield
        exchange.sort()
        out_of_turn = among(np.concatenate(wrong_side), exchange)
        assert not out_of_turn.any(), "handed over after the atomic, or taken before it"
        loaded, stored = by_program(loads), by_program(stores)
        shared = among(loaded[0], np.sort(stored[0]))
        touched = np.concatenate([stored, loaded[:, shared]], axis=1)
        touched = touched[:, ~among(touched[0], exchange)]
        addresses = np.unique(touched, axis=1)[0]
        assert len(np.unique(addresses)) == len(addresses), "two programs meet where one stores"

    def among(addresses: np.ndarray, ordered: np.ndarray) -> np.ndarray:
        """``np.isin``, whose hash table is slow for addresses, of sorted ones."""
        at = np.searchsorted(ordered, addresses)
        return np.append(ordered, 0)[at] == addresses

    def elements(tensors: Sequence[torch.Tensor]) -> np.ndarray:
        """The address of every element."""
        found = [np.empty(0, dtype=np.int64)]
        for tensor in tensors:
            places = torch.zeros(tensor.shape, dtype=torch.int64)
            for axis, (size, stride) in enumerate(
                zip(tensor.shape, tensor.stride(), strict=True), start=1
            ):
                steps = torch.arange(size) * stride * tensor.element_size()
                places += steps.view(-1, *[1] * (tensor.dim() - axis))
            found.append(tensor.data_ptr() + places.flatten().numpy())
        return np.concatenate(found)

    def by_program(accesses: list[tuple[tuple[int, ...], np.ndarray]]) -> np.ndarray:
        """``[2, n]``: addresses, and the number of the program that used each."""
        programs = {place: i for i, place in enumerate({place for place, _ in accesses})}
        pairs = [np.empty((2, 0), dtype=np.int64)]
        for place, at in accesses:
            pairs.append(np.stack([at, np.full_like(at, programs[place])]))
        return np.concatenate(pairs, axis=1)

    return trace


@pytest.fixture(scope="session")
def far_apart(
    kernel_device: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Copies pages to where each is 2**30 elements behind the one before.

    Page 4 then looks like page 0 to an offset of 32 bits. In the interpreter the space between
    pages is the hole of a sparse file.
    """

    def spread(pages: torch.Tensor) -> torch.Tensor:
        step = 2**30
        size = (len(pages) - 1) * step + pages[0].numel()
        if kernel_device.type == "cpu":
            path = tmp_path_factory.mktemp("far") / "pages"
            flat = torch.from_file(str(path), shared=True, size=size, dtype=pages.dtype)
            path.unlink()
        else:
            flat = torch.empty(size, dtype=pages.dtype, device=pages.device)
        return flat.as_strided(pages.shape, (step, *pages[0].stride())).copy_(pages)

    return spread


@pytest.fixture(scope="session")
def draw_batch(kernel_device: torch.device) -> Callable[..., Batch]:
    """Lets hypothesis draw a batch of at most ``tokens`` a sequence: counts, starts and slots."""

    def draw(data: st.DataObject, tokens: int) -> Batch:
        slots = data.draw(st.integers(1, 5), "slots")
        live = data.draw(st.permutations(range(slots)), "order")[: data.draw(st.integers(1, slots))]
        counts = [data.draw(st.integers(1, tokens), "tokens") for _ in live]
        held = [data.draw(st.integers(0, 40), "held") for _ in range(slots)]
        return batch_of(held, counts, live, kernel_device)

    return draw
