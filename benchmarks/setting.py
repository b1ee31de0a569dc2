"""A spec's model, data, teacher and library, which the benchmarks run on: mostly the quickstart's.

They are made when missing and kept where searches keep them (`$AUTOCOMP_CACHE`), so a search
before saves time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

SPACES = Path(__file__).parents[1] / "search_spaces"


@dataclass(frozen=True)
class Setting:
    """What a search stands on, and a directory that goes when the benchmark ends."""

    plan: Any
    study: Any
    teacher: Any
    context: Any
    scratch: Path


def quickstart(
    *, library: bool = True, overrides: Mapping[str, Any] | None = None
) -> AbstractContextManager[Setting]:
    """The quickstart up to its first trial; without its items unless `library`."""
    return prepared("quickstart", library=library, overrides=overrides)


@contextmanager
def prepared(
    spec: str,
    *,
    library: bool = True,
    overrides: Mapping[str, Any] | None = None,
    progress: Any = None,
) -> Iterator[Setting]:
    """A spec of `search_spaces/` up to its first trial; without its items unless `library`."""
    from dataclasses import replace

    import torch

    from autocomp.api import prepare
    from autocomp.api.library import prepare_library
    from autocomp.api.plan import make_plan
    from autocomp.report.progress import Silent
    from autocomp.study.directory import Study
    from autocomp.workers.cluster import start

    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="autocomp-benchmark-") as directory:
        scratch = Path(directory)
        progress = progress or Silent()
        plan = make_plan(SPACES / f"{spec}.yaml", overrides or {})
        study = Study.create_or_open(scratch / "study", plan.spec)
        teacher = prepare.prepare_teacher(plan, progress)
        context = prepare.prepare_context(plan, study, teacher)
        if library:
            with ExitOnDemand(start) as cluster:
                items = prepare_library(plan, teacher, cluster, progress)
            context = replace(context, items=items)
        yield Setting(plan, study, teacher, context, scratch)


class ExitOnDemand:
    """Starts a cluster when it is called for, ends it at the end of the block."""

    def __init__(self, start: Any) -> None:
        self._start, self._entered, self._cluster = start, None, None

    def __enter__(self) -> Any:
        return self._get

    def _get(self) -> Any:
        if self._entered is None:
            self._entered = self._start(None, None)
            self._cluster = self._entered.__enter__()
        return self._cluster

    def __exit__(self, *error: Any) -> None:
        if self._entered is not None:
            self._entered.__exit__(*error)


def lines() -> Any:
    """Progress as lines, for a search or its preparation."""
    from rich.console import Console

    from autocomp.report.lines import LineView

    return LineView(Console())


def cpu_seconds() -> float:
    """Processor time of this process: what single-threaded work costs, whatever else runs here."""
    return time.process_time()
