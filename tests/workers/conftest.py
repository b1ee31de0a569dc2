"""One embedded Ray for all worker tests: starting it costs seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from autocomp.workers import Cluster, start


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    here = str(Path(__file__).parent)
    before = os.environ.get("PYTHONPATH")
    root = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, root, before]))
    try:
        with start(workers=2) as running:
            yield running
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
