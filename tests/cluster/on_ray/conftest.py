"""A simulated cluster that the tests of a file share, and break.

Without Ray, which `make test-cluster` installs, nothing here is collected.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

if importlib.util.find_spec("ray") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module")
def simulated() -> Iterator[Any]:
    """Two workers that can run four replicas each."""
    from bench.cluster.simulated import Simulated

    made = Simulated(workers=2, cores=4)
    yield made
    made.close()
