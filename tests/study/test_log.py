"""The study's log: messages of many processes in one file, none of them mixed or lost."""

from __future__ import annotations

import logging
import multiprocessing
from pathlib import Path

import pytest

from autocomp.study.log import LogFile, logging_to
from autocomp.workers.log import VARIABLE, keep_log

LINES = 40
LONG = "x" * 20_000


def write(path: Path, name: str) -> None:
    logger = logging.getLogger(f"autocomp.{name}")
    with logging_to(LogFile(path)):
        for index in range(LINES):
            logger.info("%s %d %s %s", name, index, LONG, name)


def test_processes_append_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write, args=(path, name)) for name in ("one", "two")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    lines = path.read_text().splitlines()
    assert len(lines) == 2 * LINES
    for name in ("one", "two"):
        mine = [line for line in lines if line.endswith(name)]
        assert [line.split()[-4:-2] for line in mine] == [[name, str(i)] for i in range(LINES)]


def test_a_traceback_is_kept_and_a_file_that_is_refused_fails_nothing(tmp_path: Path) -> None:
    logger = logging.getLogger("autocomp.test")
    level = logging.getLogger("autocomp").level
    with logging_to(LogFile(tmp_path / "log.txt"), LogFile(tmp_path / "missing" / "log.txt")):
        logger.debug("too detailed")
        try:
            raise ValueError("three is odd")
        except ValueError:
            logger.exception("a trial failed")
    logger.error("after it")
    text = (tmp_path / "log.txt").read_text()
    assert "ERROR autocomp.test [" in text
    assert "]: a trial failed\nTraceback" in text
    assert "ValueError: three is odd" in text
    assert "too detailed" not in text
    assert "after it" not in text
    assert logging.getLogger("autocomp").level == level


def test_a_worker_keeps_its_log_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger("autocomp")
    before, level = list(root.handlers), root.level
    monkeypatch.setenv(VARIABLE, str(tmp_path / "log.txt"))
    try:
        keep_log()
        keep_log()
        logging.getLogger("autocomp.trial").info("once")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    assert (tmp_path / "log.txt").read_text().count("once") == 1
