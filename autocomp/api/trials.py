"""The trials of a search: baselines on every runtime, then proposals, dispatched to workers."""

from __future__ import annotations

from functools import partial

from autocomp.api.dispatch import Dispatcher, stages, stopped
from autocomp.api.session import Measured, Session
from autocomp.front.pick import feasible, scale_of
from autocomp.search.baselines import Baseline, baselines
from autocomp.search.proposer import TrialProposer
from autocomp.search.rungs import Rungs
from autocomp.search.scores import Scores
from autocomp.search.screening import Screened
from autocomp.search.settings import Settings
from autocomp.study.directory import Study
from autocomp.study.records import RungRecord, TrialRecord
from autocomp.trial.context import TrialContext

EXTRA_ROUNDS = 2
"""How often the search goes on, with a third of its trials, while no measured trial fits; never
where none were asked for."""


def run_trials(
    session: Session, measured: Measured, screened: list[Screened], scores: Scores
) -> None:
    """Baselines and proposals; more of them while nothing measured fits the budget."""
    spec, study, progress = session.plan.spec, session.study, session.progress
    space, tables, budget = session.plan.space, measured.tables, measured.budget
    rungs = Rungs(spec.search.keep, budget, list(spec.objectives))
    begun = _judged_again(study, rungs)
    failed = study.failed_by_machine()
    finished = [record for record in study.trials() if record not in failed]
    again: list[TrialRecord | RungRecord] = [*failed, *begun]
    for record in finished:
        if record.kind != "dense":
            progress.trial_finished(record)
    uniform = _baselines(session, measured.context)
    proposer = TrialProposer(
        space,
        screened,
        tables,
        budget,
        scores=scores,
        trials=spec.search.trials,
        seed=spec.search.seed,
        finished=finished,
        baselines=uniform,
        again=again,
        objectives=list(spec.objectives),
    )
    dispatcher = Dispatcher(study, proposer, tables, progress, session.deadline, rungs)
    others = sum(kind != "dense" for _, kind, _ in uniform)
    allowed = spec.search.trials

    def advance() -> None:
        """Earlier extra rounds count too."""
        ran = [record.kind for record in study.trials() if record.kind != "dense"]
        progress.advance(len(ran), max(allowed, ran.count("search")) + others)

    progress.phase("trials", allowed + others)
    progress.funnel(**stages(finished))
    advance()
    rounds = EXTRA_ROUNDS if allowed else 0
    for extra in range(1 + rounds):
        _dispatch(session, dispatcher, measured.context)
        records = study.trials()
        if any(feasible(record, budget) for record in records) or dispatcher.late:
            break
        if extra < rounds:
            more = max(2, spec.search.trials // 3)
            proposer.extend(more)
            allowed += more
            advance()
            progress.note(
                f"no measured trial meets {budget.describe(scale_of(records))} yet: "
                f"{more} more trials, "
                f"with a larger margin"
            )


def _judged_again(study: Study, rungs: Rungs) -> list[RungRecord]:
    """Show `rungs` what was seen in earlier calls; the trials that go on where they were.

    One that is stopped where it was last seen was so before, or would have been.
    """
    survived = {}
    for entry in study.ledger.read().of("rung").values():
        report = RungRecord.from_json(entry)
        survived[report.id] = rungs.survives(report)
    going_on = []
    for report in begun(study):
        if survived[report.id]:
            going_on.append(report)
        else:
            stopped(study, report)
    return going_on


def begun(study: Study) -> list[RungRecord]:
    """Trials that were looked at and came to no end: the last that was seen of each."""
    ended = {record.id for record in study.trials()}
    entries = study.ledger.read().of("rung").values()
    reports = (RungRecord.from_json(entry) for entry in entries)
    return list({report.id: report for report in reports if report.id not in ended}.values())


def _baselines(session: Session, context: TrialContext) -> list[Baseline]:
    """Of every runtime, also of one that cannot meet this budget: `pick` answers others."""
    plan = session.plan
    settings = Settings(plan.spec.distill).spread(0)
    return [
        baseline
        for runtime in context.references
        for baseline in baselines(
            plan.space,
            plan.space.units,
            settings,
            runtime,
            partial(plan.possible, runtime),
            plan.suffix(runtime),
        )
    ]


def _dispatch(session: Session, dispatcher: Dispatcher, context: TrialContext) -> None:
    from autocomp.trial.runner import CandidateRunner
    from autocomp.workers.protocol import RunnerFactory
    from autocomp.workers.trials import run_trials as run_on_workers

    if not dispatcher.ready():
        return
    run_on_workers(
        dispatcher,
        RunnerFactory(CandidateRunner),
        workers=session.cluster().workers,
        storage=session.study.paths.root / "ray",
        context={"trial": context},
    )
