"""Projects a study to MLflow while it is searched: a thread that stops nothing.

What does not work is said once, tried again with longer and longer pauses, and left to a later
projection when the search ends.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from autocomp.core.unit import Unit
from autocomp.report.mlflow_client import without_password
from autocomp.report.mlflow_log import Projection

logger = logging.getLogger(__name__)

_INTERVAL_S = 2.0
_LONGEST_PAUSE_S = 60.0


class MlflowProjector:
    """Follows a study's ledger in a thread and writes what is new to MLflow.

    ```
    with MlflowProjector(study.paths.root) as projector:
        ...                       # search
    ```
    `start` and `close` return quickly; an unreachable server costs a note and late pages.
    """

    def __init__(
        self,
        study_dir: Path | str,
        tracking_uri: str | None = None,
        experiment: str | None = None,
        *,
        front: Callable[[], Mapping[str, Any]] | None = None,
        units: Iterable[Unit] | None = None,
        note: Callable[[str], None] | None = None,
        interval_s: float = _INTERVAL_S,
    ) -> None:
        """Nothing is read or opened yet.

        Args:
            study_dir: an existing study.
            tracking_uri: MLflow store or server; the study's own SQLite store by default.
            experiment: its name; model and target by default.
            front: gives the `front --json` mapping; worked out from the study by default.
            units: the model's units, so that means are weighted by parameters.
            note: is told, once, when writing does not work; without it a warning is logged.
            interval_s: pause between looks at the ledger.
        """
        self._make: Callable[[], Projection] = lambda: Projection(
            Path(study_dir), tracking_uri, experiment, front, units
        )
        self._uri = tracking_uri or ""
        self._place = "the study's MLflow store"
        if tracking_uri is not None:
            self._place = f"MLflow at {without_password(tracking_uri)}"
        self._note = note
        self._told = False
        self._interval_s = interval_s
        self._closing = threading.Event()
        self._status = "FINISHED"
        self._complete = False
        self._thread = threading.Thread(target=self._follow, name="autocomp-mlflow", daemon=True)

    def start(self) -> Self:
        """Begin to follow."""
        self._thread.start()
        return self

    def close(self, timeout_s: float = 30.0, *, status: str = "FINISHED") -> bool:
        """Write what is left and end; `False` (and a warning) if that was not possible in time.

        `status` is the parent run's: `FINISHED`, `KILLED` or `FAILED`.
        """
        self._status = status
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if not self._complete:
            self._tell("has not got the whole study")
        return self._complete

    def _tell(self, what: str) -> None:
        """Say to whoever listens that pages are missing, once; afterwards to the log alone."""
        text = f"{self._place} {what}: `autocomp dashboard` makes the pages again"
        alone = self._note is None and not self._told
        logger.log(logging.WARNING if alone else logging.INFO, text)
        if self._note is not None and not self._told:
            self._note(f"{text}; the cause is in log.txt")
        self._told = True

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        status = "FINISHED" if kind is None else "KILLED" if stopped else "FAILED"
        self.close(5.0 if stopped else 30.0, status=status)

    def _follow(self) -> None:
        projection: Projection | None = None
        pause_s = self._interval_s
        while True:
            closing = self._closing.is_set()
            try:
                if projection is None:
                    projection = self._make()
                projection.catch_up()
                if closing:
                    projection.finish(self._status)
                    self._complete = True
                pause_s = self._interval_s
            except Exception as error:
                if not self._told:
                    logger.info("MLflow: %s", without_password(self._uri, str(error)))
                    self._tell("is out of reach or behind, the search goes on")
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if closing:
                return
            self._closing.wait(pause_s)
