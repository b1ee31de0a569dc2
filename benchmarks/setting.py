"""The quickstart's model, data, teacher and library, which the benchmarks run on.

They are made when missing and kept where searches keep them (`$AUTOCOMP_CACHE`), so a quickstart
before saves time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

SPEC = Path(__file__).parents[1] / "search_spaces" / "quickstart.yaml"


@dataclass(frozen=True)
class Setting:
    """What a search stands on, and a directory that goes when the benchmark ends."""

    plan: Any
    study: Any
    teacher: Any
    context: Any
    scratch: Path


@contextmanager
def quickstart(
    *,
    library: bool = True,
    overrides: Mapping[str, Any] | None = None,
    spec: Path = SPEC,
) -> Iterator[Setting]:
    """The quickstart (or `spec`) up to its first trial; without its items unless `library`."""
    from dataclasses import replace

    import torch

    from autocomp.api import prepare
    from autocomp.api.plan import make_plan
    from autocomp.report.progress import Silent
    from autocomp.study.directory import Study
    from autocomp.workers.cluster import start

    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="autocomp-benchmark-") as directory:
        scratch = Path(directory)
        plan = make_plan(spec, overrides or {})
        study = Study.create_or_open(scratch / "study", plan.spec)
        teacher = prepare.prepare_teacher(plan, Silent())
        context = prepare.prepare_context(plan, study, teacher)
        if library:
            with ExitOnDemand(start) as cluster:
                items = prepare.prepare_library(plan, teacher, cluster, Silent())
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


def cpu_seconds() -> float:
    """Processor time of this process: what single-threaded work costs, whatever else runs here."""
    return time.process_time()
