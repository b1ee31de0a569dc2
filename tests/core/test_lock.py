"""A lock between processes: taken over from the dead, and who waits says so."""

import subprocess
import sys
from pathlib import Path

import pytest

from autocomp.core.lock import locked

HOLD = """
import sys
from pathlib import Path
from autocomp.core.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_who_waits_is_told_once_and_goes_on_when_the_holder_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    try:
        assert child.stdout.readline() == "held\n"
        told: list[str] = []

        def waiting() -> None:
            told.append("waiting")
            child.kill()

        with locked(path, waiting=waiting):
            assert told == ["waiting"]
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def test_a_free_lock_is_not_waited_for(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / "lock", waiting=pytest.fail):
            pass
