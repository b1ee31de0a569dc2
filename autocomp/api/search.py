"""`search`: from a spec to exported, measured models. Wires the rooms; decides nothing itself."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.api.opened import OpenStudy
from autocomp.api.phases import PhaseTimes
from autocomp.api.plan import Plan, make_plan
from autocomp.api.predictor import TablePredictor
from autocomp.api.session import Measured, Session
from autocomp.api.watch import watching
from autocomp.core.budget import Budget
from autocomp.core.candidate import Runtime
from autocomp.core.errors import InfeasibleError
from autocomp.front.choice import choose
from autocomp.front.pick import absolute, scale_of
from autocomp.front.view import noise_on_search
from autocomp.study.directory import Study
from autocomp.study.log import LogFile, logging_to
from autocomp.study.records import TrialRecord

if TYPE_CHECKING:
    from autocomp.api.prepare import Teacher
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
        ray_address: of a running Ray cluster's head, `HOST:PORT`, or `auto`; by default Ray runs
            inside this process. All nodes must see the study, the cache (`AUTOCOMP_CACHE`), the
            model and the data under the same paths: keep them on shared storage.
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
        InfeasibleError: if no candidate, or no measured trial (`NothingFitsError`, with the nearest
            one), meets the budget. The front is written all the same.
    """
    from autocomp.report.mlflow_projector import MlflowProjector
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
        logging_to(LogFile(opened.paths.log), _Notes(progress)),
        watching(opened.paths.running, progress),
        MlflowProjector(opened.paths.root, tracking_uri, units=plan.units, note=progress.note),
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
        from autocomp.api.finish import open_report_split

        plan, study, progress = self.session.plan, self.session.study, self.session.progress
        spec = plan.spec
        progress.header(study=study.name, model=spec.model.source, target=_target(plan))
        for note in plan.notes:
            progress.note(note)
        if self._address is not None:
            self.cluster()  # one that cannot be joined is found out before anything slow
        teacher = prepare.prepare_teacher(plan, progress)
        progress.phase("cost table")
        context = prepare.prepare_context(plan, study, teacher)
        dense, context = prepare.measure_dense(plan, study, context, progress)
        assert dense.measured is not None
        budget = absolute(spec.budget.limits(), dense)
        progress.header(budget=budget)
        _note_high_floor(budget, dense, progress)
        try:
            chosen = self._chosen(teacher, context, budget)
            progress.phase("report", 2)
            open_report_split(self.session, context, [dense, chosen])
        except InfeasibleError:
            self._end()  # the front is what a person decides by what to relax
            raise
        self._end()

    def _end(self) -> None:
        """Leave the front, and of what the search worked with only what trials go on from."""
        from autocomp.api.finish import write_front
        from autocomp.api.trials import begun

        study = self.session.study
        write_front(study)
        if not begun(study):
            shutil.rmtree(study.paths.work, ignore_errors=True)

    def _chosen(self, teacher: Teacher, context: TrialContext, budget: Budget) -> TrialRecord:
        """From the measured dense model to the trial chosen."""
        from autocomp.api.library import prepare_library
        from autocomp.api.screening import score_and_screen
        from autocomp.api.trials import run_trials

        plan, study, progress = self.session.plan, self.session.study, self.session.progress
        tables = within_reach(self.session, self._tables(context), budget)
        items = prepare_library(plan, teacher, self.cluster, progress, study.ledger)
        measured = Measured(replace(context, items=items), budget, tables)
        screened, scores = score_and_screen(self.session, measured)
        run_trials(self.session, measured, screened, scores)
        records = study.trials()
        return choose(records, budget, noise_on_search(study, records)).record

    def cluster(self) -> Cluster:
        """Ray, started at first use (a cluster is joined at once) and kept until the end."""
        if self._running is None:
            from autocomp.workers.cluster import start

            log = self.session.study.paths.log
            self._running = self._stack.enter_context(start(self._address, self._workers, log))
        return self._running

    def _tables(self, context: TrialContext) -> dict[Runtime, TablePredictor]:
        """A cost table for each runtime that can be used, fitted to what was measured before."""
        from autocomp.api.dispatch import refitted
        from autocomp.api.peak_memory import PeakMemory
        from autocomp.api.prepare import prepare_cost_table
        from autocomp.targets.load_memory import PeakFit

        plan, study, progress = self.session.plan, self.session.study, self.session.progress
        tables = {}
        for runtime in context.references:
            table = prepare_cost_table(plan, study, context, progress, runtime)
            target = context.target(runtime)
            memory = PeakMemory(plan.units, target, PeakFit(target.idle_memory_bytes))
            predictor = TablePredictor(table, plan.excluded.get(runtime, {}), memory)
            tables[runtime] = refitted(predictor, runtime, study.trials())
        return tables


def _note_high_floor(budget: Budget, dense: TrialRecord, progress: SearchProgress) -> None:
    """Say so early where the floor on quality is above what the teacher itself reaches."""
    if budget.quality is None or dense.quality is None or dense.quality >= budget.quality:
        return
    scale = scale_of([dense])
    progress.note(
        f"the budget asks for {scale.floor(budget.quality)}, the dense model itself has "
        f"{scale.name} {scale.value(dense.quality):.4g}: a compressed model rarely does better"
    )


def within_reach(
    session: Session, tables: Mapping[Runtime, TablePredictor], budget: Budget
) -> dict[Runtime, TablePredictor]:
    """The tables of the runtimes on which some candidate is predicted within the budget.

    Where only peak memory is out of reach, and by no more than its prediction may err, the table is
    a hopeful one.

    Raises:
        InfeasibleError: if there is none, before anything is built.
    """
    import numpy as np

    from autocomp.search.costs import Costs
    from autocomp.search.milp import check_reachable

    space = session.plan.space
    free = [np.zeros(len(space.options[name])) for name in space.names]
    found: dict[Runtime, TablePredictor] = {}
    reasons = []
    for runtime, table in tables.items():
        for predictor in (table, table.hopeful()):
            costs = Costs(space, predictor)
            try:
                check_reachable(free, costs, costs.limits(budget))
            except InfeasibleError as error:
                reason = str(error) if runtime is None else f"{runtime}: {error}"
            else:
                found[runtime] = predictor
                break
        else:
            reasons.append(reason)
            continue
        if predictor is not table:
            session.progress.note(
                f"{reason} Predicted peaks may be wrong by "
                f"{table.peak_memory_error:.0%}: the search goes on, measured trials will tell"
            )
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


class _Notes(logging.Handler):
    """Warnings reach the audience too, each of them once."""

    def __init__(self, progress: SearchProgress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        text = record.getMessage().strip().split("\n")[0]
        if text not in self._told:
            self._told.add(text)
            self._progress.note(text)
