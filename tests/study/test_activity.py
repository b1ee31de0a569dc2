"""What trials tell while they run: whole files, at most once a second, and never a failure."""

from __future__ import annotations

import stat
from pathlib import Path

from autocomp.study.activity import Activity, ActivityWriter, read_activities


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_what_is_written_is_read(tmp_path: Path) -> None:
    clock = Clock()
    directory = tmp_path / "running"
    one, other = (ActivityWriter(directory, name, clock) for name in ("8a6b", "uniform-width-0.5"))
    assert read_activities(directory) == {}
    one.enter("distil")
    other.enter("measure")
    assert read_activities(directory) == {
        "8a6b": Activity("distil"),
        "uniform-width-0.5": Activity("measure"),
    }
    one.advance(1, 10)
    assert read_activities(directory)["8a6b"].total is None, "told less than a second ago"
    clock.now_s += 1.0
    one.advance(2, 10)
    one.advance(3, 10)
    assert read_activities(directory)["8a6b"] == Activity("distil", 2, 10)
    one.enter("export")
    assert read_activities(directory)["8a6b"] == Activity("export"), "a phase is told at once"
    one.close()
    other.close()
    other.close()
    assert read_activities(directory) == {}
    assert list(directory.iterdir()) == []


def test_words() -> None:
    assert Activity("distil", 625, 1000).describe() == "distil 62%"
    assert Activity("distil", 1001, 1000).describe() == "distil 100%"
    assert Activity("measure").describe() == "measure"


def test_a_file_system_that_refuses_is_ignored(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no directory")
    blocked.chmod(stat.S_IRUSR)
    writer = ActivityWriter(blocked, "8a6b")
    writer.enter("distil")
    writer.advance(1, 2)
    writer.close()
    assert read_activities(blocked) == {}


def test_a_file_that_is_no_activity_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"phase": "dis')
    (tmp_path / "other.json").write_text('{"phase": "distil", "stage": 3}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / ".whole.json.17").write_text('{"phase": "distil"}')
    ActivityWriter(tmp_path, "whole").enter("stitch")
    assert read_activities(tmp_path) == {"whole": Activity("stitch")}
