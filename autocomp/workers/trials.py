"""Full trials through Ray Tune: reused workers, our own searcher, retries where a worker dies.

Tune places and retries; what runs next is the proposer's decision, and the truth is the ledger the
runner writes. So nothing is restored from Tune's own checkpoints, and a new search starts a new
Tuner.
"""

from __future__ import annotations

import json
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocomp.workers.cluster import quieten
from autocomp.workers.protocol import Proposer, RunnerFactory, TrialRunner

quieten()

from ray import tune  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Outcome:
    """A trial's result or error, opaque to Tune, which would flatten a dictionary."""

    result: dict[str, Any] | None = None
    error: str | None = None


class _Trainable(tune.Trainable):
    """Holds one runner per process and hands it one payload per trial.

    A runner's exception is a result, not a crash: Tune retries crashes, and an exception would
    only be raised again.
    """

    _runner: TrialRunner | None = None

    def setup(  # type: ignore[override]  # with_parameters adds the rest
        self, config: dict[str, Any], factory: RunnerFactory, context: Mapping[str, Any]
    ) -> None:
        self._factory, self._context = factory, context
        self._config = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._config = new_config
        return True

    def step(self) -> dict[str, Any]:
        try:
            if self._runner is None:
                runner = self._factory()
                runner.setup(self._context)
                self._runner = runner
            outcome = _Outcome(result=self._runner.run(json.loads(self._config["payload"])))
        except Exception as failure:
            outcome = _Outcome(error=f"{type(failure).__name__}: {failure}")
            logger.warning("trial %s failed\n%s", self._config["key"], traceback.format_exc())
        return {"outcome": outcome, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the ledger is the truth."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing."""


class _Searcher(Searcher):
    """Tune's view of a proposer; keeps at most `workers` trials in flight."""

    def __init__(
        self,
        proposer: Proposer,
        workers: int,
        max_failures: int,
        on_start: Callable[[str, dict[str, Any]], None] | None,
        on_result: Callable[[str, dict[str, Any] | None, str | None], None] | None,
    ) -> None:
        super().__init__()
        self._proposer, self._workers, self._max_failures = proposer, workers, max_failures
        self._on_start, self._on_result = on_start, on_result
        self.in_flight: dict[str, str] = {}
        self.finished = 0
        self.failure: Exception | None = None

    def suggest(self, trial_id: str) -> Any:
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

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        key = self.in_flight.pop(trial_id, None)
        if key is None:
            return
        outcome = None if error else (result or {}).get("outcome")
        if outcome is None:
            times = self._max_failures + 1
            outcome = _Outcome(
                error=f"the worker process died each of the {times} times it was run"
            )
        self.finished += 1
        with self._kept():
            self._proposer.tell(key, outcome.result, outcome.error)
            if self._on_result is not None:
                self._on_result(key, outcome.result, outcome.error)

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
    on_result: Callable[[str, dict[str, Any] | None, str | None], None] | None = None,
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
        on_result: called with key, result and error after the proposer was told.

    Returns:
        The number of trials that were told.

    Raises:
        KeyboardInterrupt: on Ctrl-C; trials in flight end with the cluster and are not told.
        Exception: whatever the proposer or a callback raised.
    """
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(workers)  # else processes start one by one
    searcher = _Searcher(proposer, workers, max_failures, on_start, on_result)
    trainable = tune.with_parameters(_Trainable, factory=factory, context=dict(context or {}))
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(storage.resolve()),
            verbose=0,
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
