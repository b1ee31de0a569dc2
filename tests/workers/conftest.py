"""One embedded Ray for all worker tests: starting it costs seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from autocomp.workers import Cluster, start


@pytest.fixture(scope="session")
def worker_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers") / "log.txt"


@pytest.fixture(scope="session")
def cluster(worker_log: Path) -> Iterator[Cluster]:
    here = str(Path(__file__).parent)
    before = os.environ.get("PYTHONPATH")
    root = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, root, before]))
    try:
        with start(workers=2, log=worker_log) as running:
            yield running
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
