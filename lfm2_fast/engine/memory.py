"""Memory of a device: how much is free, and how much an engine takes."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lfm2_fast.cache.page_memory import PAGE_SIZE
from lfm2_fast.engine.model_runner import MOST_DRAFTED, RING
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.models.stream_ring import width

UNITS = {"%": 0.01, "GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6, "": 1}


def free_memory(device: torch.device) -> int:
    """Return the bytes of a device's memory that are not in use.

    On a GPU, memory that torch holds and does not use counts as free. If a device does not report
    it, the result is the host's.
    """
    module = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        free, _ = module.mem_get_info(device)
        return free + module.memory_reserved(device) - module.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def bytes_of(memory: int | str, device: torch.device) -> int:
    """Return ``memory`` in bytes: from a number, "8GB", "500MB", or "80%" of the free memory.

    Raises ValueError for another text, for 0 or less, and for more than "100%".
    """
    amount, is_share = memory_amount(memory)
    return int(amount * free_memory(device)) if is_share else int(amount)


def memory_amount(memory: int | str) -> tuple[float, bool]:
    """Return a number of bytes and False, or a share of the free memory and True.

    Raises as ``bytes_of``.
    """
    text = str(memory).strip()
    unit = next(each for each in UNITS if text.endswith(each))
    try:
        amount = float(text.removesuffix(unit)) * UNITS[unit]
    except ValueError:
        amount = 0.0
    is_share = unit == "%"
    if not 0 < amount < 2**62 or is_share and amount > 1:
        raise ValueError(
            "memory must be bytes, or like '8GB', '500MB' or at most '100%' of the free memory, "
            f"got {memory!r}"
        )
    return amount, is_share


def pages_in(
    memory: int | str, taken: int, model: Lfm2, max_rows: int, *, drafter: bool = True
) -> int:
    """Return how many pages of a model fit into ``taken`` bytes beside what ``max_rows`` need.

    That are conv windows and, with ``drafter``, what the model's drafter has not read yet.
    ``memory`` is how ``taken`` was asked for. Raises ValueError if it is too small for one page.
    """
    config, item = model.config, model.dtype.itemsize
    drafts = model.draft_layers if drafter else 0
    page = config.cache_bytes(item, PAGE_SIZE, drafts)
    ring = config.conv_L_cache + MOST_DRAFTED + 1
    window = config.layer_types.count("conv") * ring * config.hidden_size
    if drafts:
        window += RING * width(model.drafter)
    windows = (max_rows + 1) * window * item
    pages = (taken - windows) // max(page, 1)
    if pages < 1:
        raise ValueError(
            f"memory={memory!r} is {taken / 2**20:.0f} MiB, but {windows / 2**20:.0f} MiB of "
            f"conv windows and a page of {page / 2**20:.2f} MiB are the least that an engine "
            "of these max_rows needs; give more memory, or lower max_rows"
        )
    return int(pages)
