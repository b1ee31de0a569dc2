"""The Ray Tune driver: every trial told once, failures told with their message, deaths retried."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import worker_samples as samples

from autocomp.core.errors import InfeasibleError, InternalError, StorageError
from autocomp.workers import Cluster, RunnerFactory
from autocomp.workers.protocol import Failure
from autocomp.workers.trials import run_trials

RUNNER = RunnerFactory(samples.Runner, (10,))


class Queue:
    """Proposes a fixed list."""

    def __init__(self, payloads: dict[str, dict[str, Any]]) -> None:
        self.waiting = list(payloads.items())
        self.told: dict[str, tuple[dict[str, Any] | None, Failure | None]] = {}

    def ask(self) -> tuple[str, dict[str, Any]] | None:
        return self.waiting.pop(0) if self.waiting else None

    def judge(self, key: str, report: dict[str, Any]) -> bool:
        raise AssertionError("a trial without rungs was judged")

    def tell(self, key: str, result: dict[str, Any] | None, failure: Failure | None) -> None:
        assert key not in self.told
        self.told[key] = (result, failure)


def test_trials_complete_fail_alone_and_survive_a_dead_worker(
    cluster: Cluster,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    worker_log: Path,
) -> None:
    payloads: dict[str, dict[str, Any]] = {f"t{i}": {"x": i, "sleep": 0.2} for i in range(6)}
    payloads["broken"] = {"x": 0, "raise": True}
    payloads["mortal"] = {"x": 7, "die": str(tmp_path / "died")}
    payloads["deadly"] = {"x": 8, "always": True}
    queue = Queue(payloads)
    started: list[str] = []
    finished: list[str] = []
    most = 0

    def on_start(key: str, payload: dict[str, Any]) -> None:
        nonlocal most
        assert payload == payloads[key]
        started.append(key)
        most = max(most, len(started) - len(finished))

    def on_result(key: str, result: dict[str, Any] | None, failure: Failure | None) -> None:
        assert queue.told[key] == (result, failure)
        finished.append(key)

    count = run_trials(
        queue,
        RUNNER,
        workers=cluster.workers,
        storage=tmp_path / "ray",
        context={"teacher": "path"},
        max_failures=1,
        on_start=on_start,
        on_result=on_result,
    )
    assert count == 9
    assert sorted(queue.told) == sorted(started) == sorted(finished) == sorted(payloads)
    for i in range(6):
        result, error = queue.told[f"t{i}"]
        assert error is None
        assert result is not None
        assert result["value"] == 10 * i
        assert result["context"] == {"teacher": "path"}
        assert result["nested"]["list"] == [1, 2]
    assert queue.told["broken"] == (None, Failure("ValueError: this trial is broken"))
    assert (tmp_path / "died").exists()
    assert queue.told["mortal"][0] is not None
    assert queue.told["mortal"][0]["value"] == 70
    dead = Failure("the worker process died each of the 2 times it was run", died=True)
    assert queue.told["deadly"] == (None, dead)
    assert sorted(r.getMessage() for r in caplog.records if r.levelname == "WARNING") == [
        "the worker of trial deadly died; it is run again",
        "the worker of trial mortal died; it is run again",
    ]
    log = worker_log.read_text()
    assert "trial broken failed\nTraceback (most recent call last)" in log
    assert "ValueError: this trial is broken" in log
    assert most == 2
    assert max(result["runs"] for result, _ in queue.told.values() if result) >= 2, "not reused"
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_a_trial_is_judged_at_each_rung_and_left_where_it_is_stopped(
    cluster: Cluster, tmp_path: Path
) -> None:
    class Judge(Queue):
        def __init__(self, payloads: dict[str, dict[str, Any]]) -> None:
            super().__init__(payloads)
            self.judged: list[tuple[str, int]] = []

        def judge(self, key: str, report: dict[str, Any]) -> bool:
            self.judged.append((key, report["rung"]))
            assert report["of"] == int(key)
            return key != "2" or report["rung"] < 1

    left = tmp_path / "left"
    payloads = {str(x): {"x": x, "rungs": 3, "left": str(left)} for x in (1, 2, 3)}
    queue = Judge(payloads)
    assert run_trials(queue, RUNNER, workers=1, storage=tmp_path / "ray") == 3
    rungs = [("1", 0), ("1", 1), ("1", 2), ("2", 0), ("2", 1), ("3", 0), ("3", 1), ("3", 2)]
    assert queue.judged == rungs
    assert {key: result["value"] for key, (result, _) in queue.told.items() if result} == {
        "1": 10,
        "3": 30,
    }
    assert left.read_text() == "1", "the trial that was stopped was not left at its rung"


def test_what_a_proposer_raises_when_it_judges_ends_the_search(
    cluster: Cluster, tmp_path: Path
) -> None:
    class Raises(Queue):
        def judge(self, key: str, report: dict[str, Any]) -> bool:
            raise StorageError("the ledger is full")

    queue = Raises({x: {"x": 1, "rungs": 1, "left": str(tmp_path / "left")} for x in "ab"})
    with pytest.raises(StorageError, match="the ledger is full"):
        run_trials(queue, RUNNER, workers=1, storage=tmp_path / "ray")
    assert queue.told == {}


def test_a_worker_that_cannot_be_set_up_ends_the_search_and_blames_no_trial(
    cluster: Cluster, tmp_path: Path
) -> None:
    queue = Queue({"a": {"x": 1}, "b": {"x": 2}})
    factory = RunnerFactory(samples.BrokenSetup, (1,))
    message = "a worker could not be set up: FileNotFoundError: teacher.safetensors is missing"
    with pytest.raises(InternalError, match=message):
        run_trials(queue, factory, workers=1, storage=tmp_path / "ray")
    assert queue.told == {}


def test_a_full_disk_ends_the_search_and_blames_no_trial(cluster: Cluster, tmp_path: Path) -> None:
    payloads: dict[str, dict[str, Any]] = {"first": {"x": 1}, "second": {"x": 2, "full": True}}
    queue = Queue({**payloads, "third": {"x": 3}})
    with pytest.raises(StorageError, match="cannot write x: disk full"):
        run_trials(queue, RUNNER, workers=1, storage=tmp_path / "ray")
    assert list(queue.told) == ["first"]
    assert run_trials(Queue({"second": {"x": 2}}), RUNNER, workers=1, storage=tmp_path / "ray") == 1


def test_nothing_to_propose_ends_at_once(cluster: Cluster, tmp_path: Path) -> None:
    assert run_trials(Queue({}), RUNNER, workers=2, storage=tmp_path / "ray") == 0


def test_what_the_proposer_raises_comes_back_as_it_was(cluster: Cluster, tmp_path: Path) -> None:
    class Raises(Queue):
        def ask(self) -> None:
            raise InfeasibleError("nothing fits")

    with pytest.raises(InfeasibleError, match="nothing fits"):
        run_trials(Raises({}), RUNNER, workers=1, storage=tmp_path / "ray")


def test_what_a_proposer_raises_when_told_comes_back_too(cluster: Cluster, tmp_path: Path) -> None:
    class Raises(Queue):
        def tell(self, *outcome: Any) -> None:
            raise StorageError("the ledger is full")

    queue = Raises({"a": {"x": 1}, "b": {"x": 2}})
    with pytest.raises(StorageError, match="the ledger is full"):
        run_trials(queue, RUNNER, workers=1, storage=tmp_path / "ray")
    assert list(dict(queue.waiting)) == ["b"]


SCRIPT = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.default_int_handler)  # a background job would ignore it
from pathlib import Path
import worker_samples as samples
from autocomp.workers import RunnerFactory, start
from autocomp.workers.trials import run_trials

class Endless:
    count = 0
    def ask(self):
        self.count += 1
        return str(self.count), {"x": self.count, "sleep": 600}
    def tell(self, *outcome):
        print("told", outcome, flush=True)

try:
    with start(workers=1):
        run_trials(Endless(), RunnerFactory(samples.Runner, (1,)), workers=1,
                   storage=Path(sys.argv[1]), on_start=lambda *_: print("started", flush=True))
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("number", "send"),
    # a terminal tells the whole group, a cluster's manager the command alone
    [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_being_stopped_raises_in_the_driver_and_leaves_no_process(
    tmp_path: Path, number: signal.Signals, send: Callable[[int, int], None]
) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    driver = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "ray")],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "started\n"
    send(driver.pid, number)
    output, _ = driver.communicate(timeout=60)
    assert output == "interrupted\n"
    assert driver.returncode == 130
    left = subprocess.run(
        ["ps", "-s", str(driver.pid), "-o", "stat=,args="], capture_output=True, text=True
    )
    alive = [line for line in left.stdout.splitlines() if not line.startswith("Z")]
    assert alive == []
