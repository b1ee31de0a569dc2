"""The screening of a search: replace-one scores, then stitched candidates, on resident workers.

What it finds out about quality holds on every runtime; which candidates are worth looking at is
asked of each runtime's costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from autocomp.api.session import Measured, Session
from autocomp.core.candidate import Candidate, Option
from autocomp.search.costs import Costs
from autocomp.search.scores import (
    EACH,
    LocalError,
    LocalErrors,
    Scores,
    Table,
    interpolated,
    replace_one,
    to_score,
)
from autocomp.search.screening import Screened, screen_on_each
from autocomp.search.space import Space

if TYPE_CHECKING:
    from autocomp.trial.context import TrialContext
    from autocomp.workers.actors import ActorPool

SCORED_PER_CALL = 4


def score_and_screen(session: Session, measured: Measured) -> tuple[list[Screened], Scores]:
    """Replace-one scores, then screening within the predicted budget; what is known is not redone.

    Returns:
        What was screened, and the scores.
    """
    with ExitStack() as stack:
        screening = _Screening(session, measured, stack)
        scores = screening.score()
        return screening.screen(scores), scores


class _Screening:
    """The pool of screeners, started at first use, and what is asked of it."""

    def __init__(self, session: Session, measured: Measured, stack: ExitStack) -> None:
        self._session, self._measured, self._stack = session, measured, stack
        self._progress, self._ledger = session.progress, session.study.ledger
        self._pool: ActorPool | None = None

    def score(self) -> Scores:
        """The replace-one score of every option: its own, or one between those of its family's."""
        space = self._session.plan.space
        options = len(replace_one(space))
        local = None if options <= EACH else local_errors(self._measured.context, space)
        known = self._scored()
        missing = to_score(space, known, local)
        if missing:  # workers load the model before the phase: no part of the pace of scoring
            workers = self._session.cluster().workers
            list(self._screeners().map_unordered("evaluate", [[]] * workers))
        self._progress.phase("scores", _count(known) + len(missing))
        while missing:
            self._score(missing, known)
            missing = to_score(space, known, local)
        if local is None:
            return Scores(known)
        self._progress.note(
            f"{_count(known):,} of {options:,} options scored, those between by their local errors"
        )
        return interpolated(space, known, local)

    def _scored(self) -> dict[str, dict[str, float | None]]:
        """Scores of this space's options that are in the ledger: unit → option key → KL."""
        known = self._ledger.read().of("score")
        rows: dict[str, dict[str, float | None]] = {}
        for unit, option in self._session.plan.space:
            entry = known.get(_score_key(unit, option.key))
            if entry is not None:
                rows.setdefault(unit, {})[option.key] = entry["kl"]
        return rows

    def _score(
        self,
        missing: list[tuple[str, Option, Candidate]],
        known: dict[str, dict[str, float | None]],
    ) -> None:
        """Score these: into `known`, and into the ledger after each call."""
        chunks = _chunks(missing, SCORED_PER_CALL)
        payloads = [[candidate.to_json() for _, _, candidate in chunk] for chunk in chunks]
        total = _count(known) + len(missing)
        answers = self._screeners().map_unordered("evaluate", payloads)
        while (answer := self._next(answers)) is not None:
            index, values = answer
            entries = []
            for (unit, option, _), kl in zip(chunks[index], values, strict=True):
                known.setdefault(unit, {})[option.key] = kl
                payload = {"unit": unit, "option": option.key, "kl": kl}
                entries.append((_score_key(unit, option.key), payload))
            self._ledger.append_many("score", entries)
            self._progress.advance(_count(known), total)

    def screen(self, scores: Scores) -> list[Screened]:
        """Candidates within the budget of the runtime they were proposed for, and their KL."""
        session, tables, budget = self._session, self._measured.tables, self._measured.budget
        space, wanted = session.plan.space, session.plan.spec.search.screen
        known = [Screened.from_json(entry) for entry in self._ledger.read().of("screen").values()]
        self._progress.phase("screening", wanted)

        def advance(done: int, total: int) -> None:
            self._progress.advance(min(done, wanted), wanted)
            self._progress.funnel(screened=done)

        screened = screen_on_each(
            space,
            tables,
            self._evaluate,
            budget,
            wanted,
            session.plan.spec.search.seed,
            known,
            scores=scores,
            on_batch=self._keep,
            progress=advance,
        )
        costs = [Costs(space, table) for table in tables.values()]
        limits = [each.limits(budget) for each in costs]
        vectors = [space.encode(s.candidate) for s in screened if s.kl is not None]
        fitting = sum(
            any(each.fits(vector, limit) for each, limit in zip(costs, limits, strict=True))
            for vector in vectors
        )
        self._progress.funnel(screened=len(screened), within_budget=fitting)
        return screened

    def _screeners(self) -> ActorPool:
        if self._pool is None:
            from autocomp.trial.screener import Screener
            from autocomp.workers.actors import ActorPool

            count = self._session.cluster().workers
            pool = ActorPool(Screener, (self._measured.context,), count)
            self._pool = self._stack.enter_context(pool)
        return self._pool

    def _evaluate(self, candidates: list[Any]) -> list[float]:
        count = self._session.cluster().workers
        size = max(1, -(-len(candidates) // (4 * count)))
        chunks = _chunks([c.to_json() for c in candidates], size)
        with self._progress.waiting():
            values = dict(self._screeners().map_unordered("evaluate", chunks))
        return [value for index in sorted(values) for value in values[index]]

    def _keep(self, batch: list[Screened]) -> None:
        self._ledger.append_many("screen", [(s.key, s.to_json()) for s in batch])

    def _next(self, answers: Iterator[tuple[int, Any]]) -> tuple[int, Any] | None:
        with self._progress.waiting():
            return next(answers, None)


def local_errors(context: TrialContext, space: Space) -> LocalErrors:
    """What the library's items say they do to the outputs of their unit; without an item, 0."""
    from autocomp.library.store import Library
    from autocomp.operators import family

    library = Library(context.library_path)

    def local(unit: str, option: Option) -> LocalError:
        key = context.items.get((unit, option.key))
        item = library.describe(key) if key else None
        error = 0.0 if item is None else float(sum(item["error"].values()))
        return LocalError(family(option).key, error)

    rows: dict[str, dict[str, LocalError]] = {}
    for unit, option in space:
        rows.setdefault(unit, {})[option.key] = local(unit, option)
    return rows


def _count(known: Table) -> int:
    return sum(map(len, known.values()))


def _score_key(unit: str, option: str) -> str:
    return f"{unit} {option}"


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
