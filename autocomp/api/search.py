"""`search`: from a spec to exported, measured models. Wires the rooms; decides nothing itself."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.api.opened import OpenStudy
from autocomp.api.phases import PhaseTimes
from autocomp.api.plan import Plan, make_plan
from autocomp.api.predictor import TablePredictor
from autocomp.core.budget import Budget
from autocomp.front.pick import feasible, pick
from autocomp.study.directory import Study
from autocomp.study.records import TrialRecord

if TYPE_CHECKING:
    from autocomp.api.dispatch import Dispatcher
    from autocomp.report.progress import SearchProgress
    from autocomp.search.costs import Costs
    from autocomp.search.scores import Scores
    from autocomp.search.screening import Screened
    from autocomp.tasks.protocol import Quality
    from autocomp.trial.context import TrialContext
    from autocomp.workers.actors import ActorPool
    from autocomp.workers.cluster import Cluster

logger = logging.getLogger(__name__)

SCORED_PER_CALL = 4
EXTRA_ROUNDS = 2
"""How often the search goes on, with a third of its trials, while no measured trial fits."""


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
        self.plan, self.study = plan, study
        self.progress = PhaseTimes(progress, study.ledger)
        self._stack, self._workers, self._address = stack, workers, ray_address
        stack.callback(self.progress.end)
        self._deadline = deadline
        self._running: Cluster | None = None

    def run(self) -> None:
        """Everything, to the report split of the chosen trial."""
        from autocomp.api import prepare

        plan, study, progress = self.plan, self.study, self.progress
        spec = plan.spec
        progress.header(
            study=study.name,
            model=spec.model.source,
            target=f"{spec.target.runtime} on {spec.target.device}",
        )
        teacher = prepare.prepare_teacher(plan, progress)
        progress.phase("cost table")
        context = prepare.prepare_context(plan, study, teacher)
        dense, context = prepare.measure_dense(plan, study, context, progress)
        assert dense.measured is not None
        budget = spec.budget.limits().resolve(dense.measured)
        progress.header(budget=budget)
        table = TablePredictor(prepare.prepare_cost_table(plan, study, context, progress))
        costs = self._costs(table, budget)
        items = prepare.prepare_library(plan, teacher, self.cluster, progress)
        context = replace(context, items=items)
        screened, scores = self._screen(context, table, budget, costs)
        self._run_trials(context, table, budget, screened, scores)
        chosen = pick(study.trials(), budget)
        progress.phase("report", 2)
        self._open_report_split(context, [dense, chosen])
        self._write_front()
        shutil.rmtree(study.paths.work, ignore_errors=True)  # made again if the search goes on

    def cluster(self) -> Cluster:
        """Ray, started at first use and kept until the search ends."""
        if self._running is None:
            from autocomp.workers.cluster import start

            self._running = self._stack.enter_context(start(self._address, self._workers))
        return self._running

    # -- screening

    def _costs(self, table: TablePredictor, budget: Budget) -> Costs:
        """Cost terms of the space.

        Raises:
            InfeasibleError: if no candidate is predicted within the budget, before anything is
                built.
        """
        import numpy as np

        from autocomp.api.dispatch import peak_memory
        from autocomp.search.costs import Costs
        from autocomp.search.milp import check_reachable

        space = self.plan.space
        costs = Costs(space, table, peak_memory(self.study.trials()))
        free = [np.zeros(len(space.options[name])) for name in space.names]
        check_reachable(free, costs, costs.limits(budget))
        return costs

    def _screen(
        self, context: TrialContext, table: TablePredictor, budget: Budget, costs: Costs
    ) -> tuple[list[Screened], Scores]:
        """Replace-one scores, then screening within the predicted budget."""
        from autocomp.api.dispatch import peak_memory
        from autocomp.search.screening import Screened, screen
        from autocomp.workers.actors import ActorPool

        space = self.plan.space
        entries = self.study.ledger.read()
        known = [Screened.from_json(payload) for payload in entries.of("screen").values()]
        with ExitStack() as stack:
            pool: ActorPool | None = None

            def screeners() -> ActorPool:
                nonlocal pool
                if pool is None:
                    from autocomp.trial.screener import Screener

                    count = self.cluster().workers
                    pool = stack.enter_context(ActorPool(Screener, (context,), count))
                return pool

            scores = self._score(screeners)

            def evaluate(candidates: list[Any]) -> list[float]:
                count = self.cluster().workers
                size = max(1, -(-len(candidates) // (4 * count)))
                chunks = _chunks([c.to_json() for c in candidates], size)
                with self.progress.waiting():
                    values = dict(screeners().map_unordered("evaluate", chunks))
                return [value for index in sorted(values) for value in values[index]]

            self.progress.phase("screening", self.plan.spec.search.screen)

            def keep(batch: list[Screened]) -> None:
                self.study.ledger.append_many("screen", [(s.key, s.to_json()) for s in batch])

            def advance(done: int, total: int) -> None:
                self.progress.advance(done, total)
                self.progress.funnel(screened=done)

            screened = screen(
                space,
                table,
                evaluate,
                budget,
                self.plan.spec.search.screen,
                self.plan.spec.search.seed,
                known,
                scores=scores,
                peak_memory=peak_memory(self.study.trials()),
                on_batch=keep,
                progress=advance,
            )
        limits = costs.limits(budget)
        fitting = sum(
            costs.fits(space.encode(s.candidate), limits) for s in screened if s.kl is not None
        )
        self.progress.funnel(screened=len(screened), within_budget=fitting)
        return screened, scores

    def _score(self, screeners: Any) -> Scores:
        from autocomp.search.scores import Scores, replace_one

        ledger = self.study.ledger
        known = ledger.read().of("score")
        wanted = replace_one(self.plan.space)
        missing = [entry for entry in wanted if _score_key(entry[0], entry[1].key) not in known]
        if missing:  # workers load the model before the phase: no part of the pace of scoring
            list(screeners().map_unordered("evaluate", [[]] * self.cluster().workers))
        self.progress.phase("scores", len(wanted))
        if missing:
            chunks = _chunks(missing, SCORED_PER_CALL)
            payloads = [[candidate.to_json() for _, _, candidate in chunk] for chunk in chunks]
            done = len(wanted) - len(missing)
            answers = screeners().map_unordered("evaluate", payloads)
            while (answer := self._next(answers)) is not None:
                index, values = answer
                ledger.append_many(
                    "score",
                    [
                        (
                            _score_key(unit, option.key),
                            {"unit": unit, "option": option.key, "kl": kl},
                        )
                        for (unit, option, _), kl in zip(chunks[index], values, strict=True)
                    ],
                )
                done += len(values)
                self.progress.advance(done, len(wanted))
        rows: dict[str, dict[str, float | None]] = {}
        for payload in ledger.read().of("score").values():
            rows.setdefault(payload["unit"], {})[payload["option"]] = payload["kl"]
        return Scores(rows)

    def _next(self, answers: Iterator[tuple[int, Any]]) -> tuple[int, Any] | None:
        with self.progress.waiting():
            return next(answers, None)

    # -- trials

    def _run_trials(
        self,
        context: TrialContext,
        table: TablePredictor,
        budget: Budget,
        screened: list[Screened],
        scores: Scores,
    ) -> None:
        """Baselines and proposals; more of them while nothing measured fits the budget."""
        from autocomp.api.dispatch import Dispatcher, peak_memory
        from autocomp.search.baselines import baselines
        from autocomp.search.proposer import TrialProposer
        from autocomp.search.settings import Settings

        spec, space = self.plan.spec, self.plan.space
        finished = self.study.trials()
        for record in finished:
            if record.kind != "dense":
                self.progress.trial_finished(record)
        uniform = baselines(space, space.units, Settings(spec.distill).spread(0))
        proposer = TrialProposer(
            space,
            screened,
            table,
            budget,
            scores=scores,
            trials=spec.search.trials,
            seed=spec.search.seed,
            finished=finished,
            baselines=uniform,
            peak_memory=peak_memory(finished),
            objectives=list(spec.objectives),
        )
        dispatcher = Dispatcher(self.study, proposer, table, self.progress, self._deadline)
        self.progress.phase("trials", spec.search.trials + len(uniform) - 1)
        for extra in range(1 + EXTRA_ROUNDS):
            self._dispatch(dispatcher, context)
            records = self.study.trials()
            if any(feasible(record, budget) for record in records) or dispatcher.late:
                break
            if extra < EXTRA_ROUNDS:
                more = max(2, spec.search.trials // 3)
                proposer.extend(more)
                self.progress.note(
                    f"no measured trial meets {budget.describe()} yet: {more} more trials, "
                    f"with a larger margin"
                )

    def _dispatch(self, dispatcher: Dispatcher, context: TrialContext) -> None:
        from autocomp.trial.runner import CandidateRunner
        from autocomp.workers.protocol import RunnerFactory
        from autocomp.workers.trials import run_trials

        if not dispatcher.ready():
            return
        run_trials(
            dispatcher,
            RunnerFactory(CandidateRunner),
            workers=self.cluster().workers,
            storage=self.study.paths.root / "ray",
            context={"trial": context},
        )

    # -- the end

    def _open_report_split(self, context: TrialContext, records: list[TrialRecord]) -> None:
        """Evaluate dense, first, and the chosen trial on the report split, once, after selection.

        Dense is the teacher, exported.
        """
        from autocomp.models.vocabulary import load_vocabulary
        from autocomp.targets import make_target, open_artifact
        from autocomp.tasks import make_task
        from autocomp.tasks.vocabulary import retokenised

        known = self.study.ledger.read().of("report")
        if all(record.id in known for record in records):
            return
        task = make_task(self.plan.spec, self.plan.model_path)
        target = make_target(self.plan.spec.target, context.gate, context.reference)
        teacher: Quality | None = None
        for done, record in enumerate(records, start=1):
            assert record.artifact is not None
            artifact = open_artifact(self.study.paths.root / record.artifact)
            vocabulary = load_vocabulary(artifact.path.parent)
            asked = task
            if vocabulary is not None:
                asked = retokenised(self.plan.spec, self.plan.model_path, vocabulary)
            quality = asked.evaluate(partial(target.run, artifact), "report").quality
            teacher = quality if teacher is None else teacher
            self.study.ledger.append(
                "report",
                record.id,
                {
                    "quality": quality.value,
                    "metric": quality.metric_json(),
                    "teacher_quality": teacher.value,
                    "teacher_metric": teacher.metric_json(),
                },
            )
            self.progress.advance(done, len(records))

    def _write_front(self) -> None:
        """`front.html` and `front.json` beside the ledger."""
        import json

        from autocomp.core.files import write_text_atomic
        from autocomp.front.view import study_front
        from autocomp.report.html import front_html

        view = study_front(self.study)
        write_text_atomic(self.study.paths.front_html, front_html(view))
        write_text_atomic(self.study.paths.root / "front.json", json.dumps(view, indent=2) + "\n")


def _score_key(unit: str, option: str) -> str:
    return f"{unit} {option}"


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


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
