"""Full trials through Ray Tune: reused workers, our own searcher and scheduler, retries where a
worker dies.

Tune places and retries; what runs next, and what is stopped at a rung, is the proposer's decision,
and the truth is the ledger the runner writes. So nothing is restored from Tune's own checkpoints,
and a new search starts a new Tuner.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocomp.core.errors import AutocompError, InternalError, StorageError
from autocomp.workers.cluster import quieten
from autocomp.workers.protocol import Failure, Proposer, RunnerFactory, Running, TrialRunner

quieten()

from ray import tune  # noqa: E402
from ray.tune.schedulers import FIFOScheduler, TrialScheduler  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Outcome:
    """A trial's report at a rung, its result, its failure or what ends the search; opaque to Tune,
    which would flatten a dictionary.
    """

    report: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    failure: Failure | None = None
    fatal: AutocompError | None = None


class _Trainable(tune.Trainable):
    """Holds one runner per process and hands it one payload per trial; a step is up to a rung.

    A runner's exception is a result, not a crash: Tune retries crashes, and an exception would
    only be raised again.
    """

    _runner: TrialRunner | None = None
    _running: Running | None = None

    def setup(  # type: ignore[override]  # with_parameters adds the rest
        self, config: dict[str, Any], factory: RunnerFactory, context: Mapping[str, Any]
    ) -> None:
        self._factory, self._context = factory, context
        self._config = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end()
        self._config = new_config
        return True

    def cleanup(self) -> None:
        self._end()

    def step(self) -> dict[str, Any]:
        outcome = self._outcome()
        return {"outcome": outcome, "done": outcome.report is None}

    def _end(self) -> None:
        """Leave a trial that was stopped at a rung."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _outcome(self) -> _Outcome:
        try:
            runner = self._runner or self._set_up()
        except Exception as error:
            logger.exception("a worker could not be set up")
            text = f"a worker could not be set up: {type(error).__name__}: {error}"
            fatal = error if isinstance(error, AutocompError) else InternalError(text)
            return _Outcome(fatal=fatal)
        try:
            if self._running is None:
                self._running = runner.start(json.loads(self._config["payload"]))
            return _Outcome(report=next(self._running))
        except StopIteration as end:
            return _Outcome(result=end.value)
        except StorageError as error:
            logger.exception("trial %s could not be stored", self._config["key"])
            return _Outcome(fatal=error)
        except Exception as error:
            logger.exception("trial %s failed", self._config["key"])
            return _Outcome(failure=Failure(f"{type(error).__name__}: {error}"))

    def _set_up(self) -> TrialRunner:
        runner = self._factory()
        runner.setup(self._context)
        self._runner = runner
        return runner

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the ledger is the truth."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing."""


class _Deaths(tune.Callback):
    """Says that a worker died; Tune itself only runs the trial again."""

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        logger.warning("the worker of trial %s died; it is run again", trial.config["key"])


class _Scheduler(FIFOScheduler):
    """Stops a trial at a rung where the searcher says so."""

    def __init__(self, searcher: _Searcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        going_on = self._searcher.goes_on(trial.trial_id, result["outcome"])
        return TrialScheduler.CONTINUE if going_on else TrialScheduler.STOP

    def __getstate__(self) -> dict[str, Any]:
        """As the searcher: Tune pickles it, and nobody restores it."""
        return {}


class _Searcher(Searcher):
    """Tune's view of a proposer; keeps at most `workers` trials in flight."""

    def __init__(
        self,
        proposer: Proposer,
        workers: int,
        max_failures: int,
        on_start: Callable[[str, dict[str, Any]], None] | None,
        on_result: Callable[[str, dict[str, Any] | None, Failure | None], None] | None,
    ) -> None:
        super().__init__()
        self._proposer, self._workers, self._max_failures = proposer, workers, max_failures
        self._on_start, self._on_result = on_start, on_result
        self.in_flight: dict[str, str] = {}
        self.finished = 0
        self.failure: Exception | None = None

    def suggest(self, trial_id: str) -> Any:
        if self.failure is not None:
            raise self.failure
        if len(self.in_flight) >= self._workers:
            return None
        with self._kept():
            asked = self._proposer.ask()
        if asked is None:
            return Searcher.FINISHED
        key, payload = asked
        self.in_flight[trial_id] = key
        if self._on_start is not None:
            with self._kept():
                self._on_start(key, payload)
        return {"key": key, "payload": json.dumps(payload)}

    def goes_on(self, trial_id: str, outcome: _Outcome) -> bool:
        """Whether a trial goes on after what it gave; one that has ended does, to its end."""
        if outcome.report is None:
            return True
        key = self.in_flight.get(trial_id)
        if key is None or self.failure is not None:
            return False
        with contextlib.suppress(Exception), self._kept():
            return self._proposer.judge(key, outcome.report)
        return False

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        key = self.in_flight.pop(trial_id, None)
        if key is None:
            return
        outcome = None if error else (result or {}).get("outcome")
        if outcome is None:
            times = self._max_failures + 1
            cause = f"the worker process died each of the {times} times it was run"
            outcome = _Outcome(failure=Failure(cause, died=True))
        if outcome.fatal is not None:
            self.failure = self.failure or outcome.fatal
            return
        self.finished += 1
        if outcome.report is not None:  # stopped at a rung
            return
        # What is raised here Tune takes for the trial's failure, and runs the trial again.
        with contextlib.suppress(Exception), self._kept():
            self._proposer.tell(key, outcome.result, outcome.failure)
            if self._on_result is not None:
                self._on_result(key, outcome.result, outcome.failure)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Keep what the caller's own code raised: Tune wraps it in an error of its own."""
        try:
            yield
        except Exception as failure:
            self.failure = failure
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher into a file that a restore would read; we never restore."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


def run_trials(
    proposer: Proposer,
    factory: RunnerFactory,
    *,
    workers: int,
    storage: Path,
    context: Mapping[str, Any] | None = None,
    max_failures: int = 3,
    on_start: Callable[[str, dict[str, Any]], None] | None = None,
    on_result: Callable[[str, dict[str, Any] | None, Failure | None], None] | None = None,
) -> int:
    """Run trials until the proposer has no more and all are told.

    Args:
        proposer: decides what runs next.
        factory: makes the runner of each worker process.
        workers: trials at a time, each in a process with one core.
        storage: directory for Tune's own files, normally `ray/` in the study.
        context: passed to `TrialRunner.setup`.
        max_failures: how often a trial whose process died is run again.
        on_start: called with key and payload when a trial is dispatched.
        on_result: called with key, result and failure after the proposer was told.

    Returns:
        The number of trials that were told, or stopped at a rung.

    Raises:
        KeyboardInterrupt: on Ctrl-C; trials in flight end with the cluster and are not told.
        StorageError: what a runner raised; the search cannot go on, and that trial is not told.
        AutocompError: what setting a worker up raised, else InternalError with its cause.
        Exception: whatever the proposer or a callback raised.
    """
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(workers)  # else processes start one by one
    searcher = _Searcher(proposer, workers, max_failures, on_start, on_result)
    trainable = tune.with_parameters(_Trainable, factory=factory, context=dict(context or {}))
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=_Scheduler(searcher),
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(storage.resolve()),
            verbose=0,
            callbacks=[_Deaths()],
            failure_config=tune.FailureConfig(max_failures=max_failures),
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_at_end=False, checkpoint_frequency=0
            ),
        ),
    )
    with _quiet():
        try:
            tuner.fit()
        except Exception as error:
            raise searcher.failure or error from None
    if searcher.failure is not None:
        raise searcher.failure
    return searcher.finished


def _name(trial: Any) -> str:
    """Tune would put the payload into directory names."""
    return str(trial.trial_id)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings or logs of Tune's own: failures reach the proposer, which tells the user."""
    log = logging.getLogger("ray.tune")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
