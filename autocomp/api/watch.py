"""Watches the trials that run, wherever their workers are, and tells the audience."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autocomp.report.progress import SearchProgress
from autocomp.study.activity import Activity, read_activities

POLL_S = 1.0


@contextmanager
def watching(directory: Path, progress: SearchProgress, poll_s: float = POLL_S) -> Iterator[None]:
    """Read what trials write into `directory` every `poll_s` seconds, in a thread of its own.

    What an earlier search left there is removed first.
    """
    shutil.rmtree(directory, ignore_errors=True)
    over = threading.Event()

    def watch() -> None:
        told: dict[str, Activity] = {}
        while not over.wait(poll_s):
            found = read_activities(directory)
            for trial, activity in found.items():
                if told.get(trial) != activity:
                    progress.trial_advanced(trial, activity)
            told = found

    thread = threading.Thread(target=watch, name="autocomp-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
