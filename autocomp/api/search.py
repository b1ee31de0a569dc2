"""`search`: from a spec to exported, measured models. Wires the rooms; decides nothing itself."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.api.opened import OpenStudy
from autocomp.api.phases import PhaseTimes
from autocomp.api.plan import Plan, make_plan
from autocomp.api.predictor import TablePredictor
from autocomp.api.session import Measured, Session
from autocomp.core.budget import Budget
from autocomp.core.candidate import Runtime
from autocomp.core.errors import InfeasibleError
from autocomp.front.pick import pick
from autocomp.study.directory import Study

if TYPE_CHECKING:
    from autocomp.report.progress import SearchProgress
    from autocomp.trial.context import TrialContext
    from autocomp.workers.cluster import Cluster


def search(
    path: Path | str,
    study: Path | str | None = None,
    *,
    workers: int | None = None,
    ray_address: str | None = None,
    trials: int | None = None,
    screen: int | None = None,
    time_limit_s: float | None = None,
    overrides: Mapping[str, Any] | None = None,
    progress: SearchProgress | None = None,
    tracking_uri: str | None = None,
    fork: Path | str | None = None,
) -> OpenStudy:
    """Search for models within a spec's budget; resumes where an earlier call stopped.

    Args:
        path: the spec.
        study: the study's directory, `runs/<name of the spec>` by default.
        workers: worker processes, one per core by default.
        ray_address: of a running Ray cluster; by default Ray runs inside this process.
        trials, screen: amounts of search, instead of the spec's.
        time_limit_s: propose no trial after this many seconds.
        overrides: dotted path → value, put over the spec.
        progress: is told what happens.
        tracking_uri: MLflow store or server; the study's own SQLite store by default.
        fork: keep a study of a changed spec here, starting from what `study` has.

    Returns:
        The study, for `front` and `pick`.

    Raises:
        UserError: for anything wrong in the spec, model, data or study directory.
        InfeasibleError: if no candidate, or no measured trial, meets the budget.
    """
    from autocomp.report.mlflow_log import MlflowProjector
    from autocomp.report.progress import Silent

    progress = progress or Silent()
    changed = dict(overrides or {})
    for name, amount in (("search.trials", trials), ("search.screen", screen)):
        if amount is not None:
            changed[name] = amount
    plan = make_plan(path, changed)
    directory = Path(study) if study is not None else Path("runs") / Path(path).stem
    if fork is None:
        opened = Study.create_or_open(directory, plan.spec)
    else:
        from autocomp.study.fork import fork_study

        opened = fork_study(Study.open(directory), fork, plan.spec)
    deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
    with (
        opened.lease(),
        _logging_to(opened.paths.log),
        MlflowProjector(opened.paths.root, tracking_uri, units=plan.units),
        ExitStack() as stack,
    ):
        _Search(plan, opened, progress, stack, workers, ray_address, deadline).run()
    return OpenStudy(Study.open(opened.paths.root))


class _Search:
    """One call of `search`, phase by phase; whatever the ledger already holds is not done again."""

    def __init__(
        self,
        plan: Plan,
        study: Study,
        progress: SearchProgress,
        stack: ExitStack,
        workers: int | None,
        ray_address: str | None,
        deadline: float | None,
    ) -> None:
        self._stack, self._workers, self._address = stack, workers, ray_address
        self._running: Cluster | None = None
        times = PhaseTimes(progress, study.ledger)
        stack.callback(times.end)
        self.session = Session(plan, study, times, self.cluster, deadline)

    def run(self) -> None:
        """Everything, to the report split of the chosen trial."""
        from autocomp.api import prepare
        from autocomp.api.finish import open_report_split, write_front
        from autocomp.api.screening import score_and_screen
        from autocomp.api.trials import run_trials

        plan, study, progress = self.session.plan, self.session.study, self.session.progress
        spec = plan.spec
        progress.header(study=study.name, model=spec.model.source, target=_target(plan))
        for note in plan.notes:
            progress.note(note)
        teacher = prepare.prepare_teacher(plan, progress)
        progress.phase("cost table")
        context = prepare.prepare_context(plan, study, teacher)
        dense, context = prepare.measure_dense(plan, study, context, progress)
        assert dense.measured is not None
        budget = spec.budget.limits().resolve(dense.measured)
        progress.header(budget=budget)
        tables = within_reach(self.session, self._tables(context), budget)
        items = prepare.prepare_library(plan, teacher, self.cluster, progress, study.ledger)
        measured = Measured(replace(context, items=items), budget, tables)
        screened, scores = score_and_screen(self.session, measured)
        run_trials(self.session, measured, screened, scores)
        chosen = pick(study.trials(), budget)
        progress.phase("report", 2)
        open_report_split(self.session, measured.context, [dense, chosen])
        write_front(study)
        shutil.rmtree(study.paths.work, ignore_errors=True)  # made again if the search goes on

    def cluster(self) -> Cluster:
        """Ray, started at first use and kept until the search ends."""
        if self._running is None:
            from autocomp.workers.cluster import start

            self._running = self._stack.enter_context(start(self._address, self._workers))
        return self._running

    def _tables(self, context: TrialContext) -> dict[Runtime, TablePredictor]:
        """A cost table for each runtime that can be used."""
        from autocomp.api.prepare import prepare_cost_table

        plan, study, progress = self.session.plan, self.session.study, self.session.progress
        return {
            runtime: TablePredictor(
                prepare_cost_table(plan, study, context, progress, runtime),
                plan.excluded.get(runtime, {}),
            )
            for runtime in context.references
        }


def within_reach(
    session: Session, tables: Mapping[Runtime, TablePredictor], budget: Budget
) -> dict[Runtime, TablePredictor]:
    """The tables of the runtimes on which some candidate is predicted within the budget.

    Raises:
        InfeasibleError: if there is none, before anything is built.
    """
    import numpy as np

    from autocomp.api.dispatch import peak_memories
    from autocomp.search.costs import Costs
    from autocomp.search.milp import check_reachable

    space = session.plan.space
    memory = peak_memories(session.study.trials(), tables)
    free = [np.zeros(len(space.options[name])) for name in space.names]
    found: dict[Runtime, TablePredictor] = {}
    reasons = []
    for runtime, table in tables.items():
        costs = Costs(space, table, memory[runtime])
        try:
            check_reachable(free, costs, costs.limits(budget))
        except InfeasibleError as error:
            reasons.append(str(error) if runtime is None else f"{runtime}: {error}")
        else:
            found[runtime] = table
    if not found:
        raise InfeasibleError("\n".join(reasons))
    for reason in reasons:
        session.progress.note(f"out of reach on {reason}")
    return found


def _target(plan: Plan) -> str:
    """`onnxruntime on cpu`, for the header."""
    section = plan.spec.target
    names = [str(section.runtime if runtime is None else runtime) for runtime in plan.runtimes]
    return f"{' and '.join(names)} on {section.device}"


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Everything autocomp logs goes to the study's log file too."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("autocomp")
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
