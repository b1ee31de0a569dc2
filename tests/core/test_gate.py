"""The gate between processes: exclusion, death, no starvation."""

import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest

from autocomp.core.errors import InternalError
from autocomp.core.gate import NO_GATE, Gate

PRELUDE = """
import sys, time
from pathlib import Path
from autocomp.core.gate import Gate
gate, log = Gate(Path(sys.argv[1])), open(sys.argv[2], "ab", buffering=0)
def note(text): log.write(f"{time.monotonic_ns()} {text}\\n".encode())
"""


@pytest.fixture
def start(tmp_path):
    """Start `code` in another process; all are killed at the end."""
    children = []

    def run(code):
        child = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + code, str(tmp_path / "gate"), str(tmp_path / "log")],
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child

    yield run
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()


def events(tmp_path):
    lines = (tmp_path / "log").read_text().splitlines()
    return sorted((int(at), kind) for at, kind in (line.split() for line in lines))


def test_measuring_excludes_everyone(start, tmp_path):
    work = (
        "for _ in range(60):\n    with gate.working():\n"
        "        note('+w'); time.sleep(.002); note('-w')"
    )
    measure = (
        "for _ in range(15):\n    with gate.measuring():\n"
        "        note('+m'); time.sleep(.003); note('-m')"
    )
    children = [start(work), start(work), start(measure), start(measure)]
    for child in children:
        assert child.wait(timeout=60) == 0
    working = measuring = most_workers = 0
    for _, kind in events(tmp_path):
        step = 1 if kind[0] == "+" else -1
        working += step * (kind[1] == "w")
        measuring += step * (kind[1] == "m")
        most_workers = max(most_workers, working)
        assert measuring in (0, 1)
        assert not (measuring and working)
    assert most_workers == 2, "workers should share the gate"
    assert len(events(tmp_path)) == 2 * (2 * 60 + 2 * 15)


@pytest.mark.parametrize("mode", ["working", "measuring"])
def test_a_dead_process_releases(start, tmp_path, mode):
    child = start(f"with gate.{mode}():\n    print('in', flush=True); time.sleep(600)")
    assert child.stdout.readline() == "in\n"
    entered = threading.Event()

    def measure():
        with Gate(tmp_path / "gate").measuring():
            entered.set()

    thread = threading.Thread(target=measure)
    thread.start()
    assert not entered.wait(0.2), "held by the other process"
    child.send_signal(signal.SIGKILL)
    assert entered.wait(10)
    thread.join()


def test_a_dead_waiting_measurement_blocks_nobody(start, tmp_path):
    gate = Gate(tmp_path / "gate")
    with gate.working():
        child = start("note('wait'); print('up', flush=True)\nwith gate.measuring(): pass")
        assert child.stdout.readline() == "up\n"
        time.sleep(0.2)
        assert child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
    began = time.monotonic()
    with gate.working():
        assert time.monotonic() - began < 1.0


def test_a_stream_of_workers_does_not_starve_a_measurement(start, tmp_path):
    # At any moment at least one of the three is inside.
    endless = "print('up', flush=True)\nwhile True:\n    with gate.working(): time.sleep({})"
    for child in [start(endless.format(seconds)) for seconds in (0.021, 0.034, 0.055)]:
        assert child.stdout.readline() == "up\n"
    time.sleep(0.1)
    waits = []
    for _ in range(10):
        began = time.monotonic()
        with Gate(tmp_path / "gate").measuring():
            waits.append(time.monotonic() - began)
    assert max(waits) < 2.0, waits


def test_entering_again_is_free_but_measuring_while_working_is_refused(tmp_path):
    gate = pickle.loads(pickle.dumps(Gate(tmp_path / "gate")))
    with gate.measuring(), gate.working(), gate.measuring():
        pass
    with (
        gate.working(),
        gate.working(),
        pytest.raises(InternalError, match="inside working"),
        gate.measuring(),
    ):
        pass
    with Gate(tmp_path / "gate").measuring():
        pass


def test_released_on_an_exception(tmp_path):
    gate = Gate(tmp_path / "gate")
    with pytest.raises(ZeroDivisionError), gate.measuring():
        raise ZeroDivisionError
    with gate.measuring():
        pass


def test_without_a_path_nobody_waits():
    gate = pickle.loads(pickle.dumps(NO_GATE))
    with gate.working(), gate.measuring(), NO_GATE.measuring():
        pass
