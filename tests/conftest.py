"""How the suite is shared among processes (`pytest --numprocesses 2 --dist loadgroup`).

A room's tests stay together, for their fixtures; what starts Ray comes first, in one process, so
that two clusters never share the machine. Alone, `pytest` runs everything in one process.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

RAY = ("end_to_end", "workers")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if room(item) in RAY else room(item)))
    items.sort(key=lambda item: room(item) not in RAY)


def room(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]
