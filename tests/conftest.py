"""How the suite runs: property tests repeat, and processes share it by room.

Under `pytest --numprocesses 2` (pytest-xdist) a room's tests stay together, for their fixtures;
what starts Ray comes first and stays in one process, so that two clusters never share the machine.
Alone, `pytest` runs everything in one process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

RAY = ("end_to_end", "workers")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(tests).parts[0] not in RAY)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Rooms(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            room = nodeid.removeprefix("tests/").partition("/")[0]
            return "ray" if room in RAY else room

    return Rooms(config, log)
