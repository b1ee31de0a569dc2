"""The watch over running trials, and the warnings that become notes."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from autocomp.api.search import _Notes
from autocomp.api.watch import watching
from autocomp.report.progress import Silent
from autocomp.study.activity import Activity, ActivityWriter
from autocomp.study.log import logging_to


class Audience(Silent):
    def __init__(self) -> None:
        self.advanced: list[tuple[str, Activity]] = []
        self.notes: list[str] = []

    def trial_advanced(self, id: str, activity: Activity) -> None:
        self.advanced.append((id, activity))

    def note(self, text: str) -> None:
        self.notes.append(text)


def wait_for(audience: Audience, count: int) -> None:
    limit = time.monotonic() + 30
    while len(audience.advanced) < count:
        assert time.monotonic() < limit, audience.advanced
        time.sleep(0.005)


def test_changes_are_told_once_and_what_was_left_behind_never(tmp_path: Path) -> None:
    ActivityWriter(tmp_path / "running", "killed").enter("distil")
    audience = Audience()
    with watching(tmp_path / "running", audience, poll_s=0.01):
        writer = ActivityWriter(tmp_path / "running", "8a6b")
        writer.enter("distil")
        wait_for(audience, 1)
        time.sleep(0.1)
        writer.enter("measure")
        wait_for(audience, 2)
    writer.enter("evaluate")
    time.sleep(0.05)
    assert audience.advanced == [("8a6b", Activity("distil")), ("8a6b", Activity("measure"))]


def test_warnings_become_notes_once() -> None:
    audience, logger = Audience(), logging.getLogger("autocomp.library.store")
    with logging_to(_Notes(audience)):
        for _ in range(2):
            logger.warning("%s is damaged: built again\nat byte %d", "item", 7)
        logger.info("nothing to worry about")
        logger.error("the worker of trial %s died", "8a6b")
    logger.warning("after it")
    assert audience.notes == ["item is damaged: built again", "the worker of trial 8a6b died"]
