"""Stopped or killed at any moment, the same command goes on: nothing is lost or done twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_study import Command, ended_with, keys, ledger, stamps, wait_until

EVERY_STEP = ("library", "scores", "trials")

pytestmark = pytest.mark.timeout(900)  # a busy host; seconds on an idle one


def announced(process: subprocess.Popen[str], step: str) -> None:
    """Read the log lines until the step has begun."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if f"{step}: started" in line:
            return
    raise AssertionError(f"{step} never began:\n{''.join(seen)}")


def stop(process: subprocess.Popen[str]) -> str:
    """Ctrl-C, which a terminal sends to the whole group; what was said on stderr."""
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    # Python ends itself by the signal if it came while a string was executed (an import of Ray):
    # a shell shows 130 for both.
    assert process.returncode in (130, -signal.SIGINT), err
    assert "Traceback" not in err
    assert "Stopped. Everything finished is kept; continue with: autocomp search" in err
    return err


def finished_trials(study: Path) -> list[str]:
    return [entry["payload"]["id"] for entry in ledger(study) if entry["kind"] == "trial"]


def results(study: Path, kind: str) -> dict[str, Any]:
    return {e["key"]: e["payload"]["kl"] for e in ledger(study) if e["kind"] == kind}


@pytest.mark.parametrize(
    "steps", [EVERY_STEP[:1], pytest.param(EVERY_STEP, marks=pytest.mark.slow)], ids="-".join
)
def test_stopped_at_every_step_then_killed(
    command: Command,
    finished: Path,
    cut_back: Callable[..., Path],
    tmp_path: Path,
    steps: tuple[str, ...],
) -> None:
    study = cut_back()
    cache = tmp_path / "cache"
    shutil.copytree(command.cache, cache, ignore=shutil.ignore_patterns("library", "statistics"))
    mine = command.with_(cache=cache)
    arguments = ("search", *mine.spec_arguments(), "--study", study)
    dense = stamps(study, "artifacts/dense/*")

    for step in steps:
        with ended_with(mine.start(*arguments)) as process:
            announced(process, step)
            time.sleep(0.3)
            stop(process)
        assert finished_trials(study)[0] == "dense"

    with ended_with(mine.start(*arguments)) as process:
        announced(process, "trials")
        stopped = len(finished_trials(study))
        wait_until(lambda: len(finished_trials(study)) > stopped, process)
        done = finished_trials(study)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert len(done) < 6, "there was nothing left to interrupt"
    artifacts = {name: stamps(study / "artifacts" / name) for name in done}
    library = stamps(cache / "library", "**/*.safetensors")
    assert library

    ended = mine.search(study, options=("--json", "--quiet"))
    assert ended.status == 0, ended.err
    after = finished_trials(study)
    assert set(done) <= set(after)
    assert set(Counter(after).values()) == {1}
    for kind in ("score", "screen"):
        assert set(Counter(keys(study, kind)).values()) == {1}
    assert {name: stamps(study / "artifacts" / name) for name in done} == artifacts
    assert stamps(study, "artifacts/dense/*") == dense
    assert stamps(cache / "library", "**/*.safetensors") == library
    shown = {trial["id"]: trial for trial in ended.json["trials"]}
    assert list(shown) == after
    assert all(trial["state"] == "complete" for trial in shown.values())
    assert Counter(trial["kind"] for trial in shown.values()) == {
        "dense": 1,
        "uniform": 2,
        "search": 3,
    }
    assert ended.json["chosen"] in shown
    # Scores and screening are what an undisturbed search finds.
    assert results(study, "score") == pytest.approx(results(finished, "score"), rel=1e-3, abs=1e-6)
    both = results(study, "screen").keys() & results(finished, "screen").keys()
    assert len(both) >= 0.5 * len(results(finished, "screen"))


def test_a_second_search_on_a_running_study_is_refused(
    command: Command, cut_back: Callable[..., Path]
) -> None:
    import fcntl

    study = cut_back("score", "screen")
    with (study / "lease").open("r+") as lease:
        fcntl.flock(lease, fcntl.LOCK_EX)
        lease.write(json.dumps({"pid": 4711, "host": "elsewhere", "since": "now"}))
        lease.flush()
        message = command.search(study, options=("--quiet",)).complaint()
    assert "process 4711 on elsewhere" in message


FULL_DISK = """
import os, sys
from pathlib import Path

library = os.environ["LIBRARY"]

def refuse(event, arguments):
    if event == "os.rename" and str(arguments[1]).startswith(library):
        if str(arguments[1]).endswith(".safetensors"):
            if len(list(Path(library).rglob("*.safetensors"))) >= 6:
                raise OSError(28, "No space left on device")

sys.addaudithook(refuse)
"""


def test_the_disk_is_full_while_the_library_is_built(
    command: Command,
    finished: Path,
    cut_back: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = cut_back("score", "screen", "report", trials=tuple(finished_trials(finished)))
    cache = tmp_path / "cache"
    shutil.copytree(command.cache, cache, ignore=shutil.ignore_patterns("library", "statistics"))
    mine = command.with_(cache=cache)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "sitecustomize.py").write_text(FULL_DISK)
    monkeypatch.setenv("LIBRARY", str(cache / "library"))
    with monkeypatch.context() as patched:
        patched.setenv("PYTHONPATH", str(tmp_path / "full"))
        # one worker: two would count six files at the same time
        ended = mine.search(study, options=("--quiet", "--workers", "1"))
    message = ended.complaint(4)
    assert "No space left on device" in message
    assert "free disk space and start the same command again" in message
    kept = stamps(cache / "library", "**/*.safetensors")
    assert len(kept) == 6
    assert not list((cache / "library").rglob("*.tmp"))

    again = mine.search(study, options=("--quiet", "--json"))
    assert again.status == 0, again.err
    built = stamps(cache / "library", "**/*.safetensors")
    assert kept.items() <= built.items(), "what was stored is kept and used"
    assert len(built) > len(kept)


FULL_FOR_TRIALS = """
import os, sys

def refuse(event, arguments):
    if event == "os.rename" and "/students/" in str(arguments[1]):
        if not str(arguments[1]).endswith("dense.safetensors"):
            raise OSError(28, "No space left on device")

sys.addaudithook(refuse)
"""


@pytest.mark.slow  # tests/workers and tests/api hold its parts
def test_the_disk_is_full_while_trials_run(
    command: Command,
    cut_back: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No candidate is blamed: the search ends, and runs every trial once there is space."""
    study = cut_back("score", "screen")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "sitecustomize.py").write_text(FULL_FOR_TRIALS)
    with monkeypatch.context() as patched:
        patched.setenv("PYTHONPATH", str(tmp_path / "full"))
        ended = command.search(study, options=("--quiet",))
    message = ended.complaint(4)
    assert "No space left on device" in message
    assert "free disk space and start the same command again" in message
    assert finished_trials(study) == ["dense"]
    log = (study / "log.txt").read_text()
    assert "could not be stored\nTraceback" in log, "what happened in the worker is in the log"

    again = command.search(study, options=("--quiet", "--json"))
    assert again.status == 0, again.err
    assert {trial["state"] for trial in again.json["trials"]} == {"complete"}
    assert len(again.json["trials"]) == 6
