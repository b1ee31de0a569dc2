"""A Ctrl-C that somebody's code swallowed stops the command at the next step of progress."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import threading
from collections.abc import Iterator

import pytest

from autocomp.cli.interrupts import listen, stoppable
from autocomp.report.progress import Silent


class Heard(Silent):
    def __init__(self) -> None:
        self.phases: list[tuple[str, int | None]] = []

    def phase(self, name: str, total: int | None = None) -> None:
        self.phases.append((name, total))


@pytest.fixture(autouse=True)
def _listening() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.unraisablehook
    listen()
    yield
    listen()
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_swallowed_signal_is_raised_again(number: signal.Signals) -> None:
    heard = Heard()
    progress = stoppable(heard)
    progress.phase("library", total=3)
    with contextlib.suppress(BaseException):  # as third-party code does
        signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        progress.phase("scores")
    assert heard.phases == [("library", 3)]


def test_other_threads_are_not_interrupted() -> None:
    heard = Heard()
    progress = stoppable(heard)
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    thread = threading.Thread(target=progress.phase, args=("trials",))
    thread.start()
    thread.join()
    assert heard.phases == [("trials", None)]


class Dropped:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __del__(self) -> None:
        raise self.error


def test_a_signal_in_a_finaliser_prints_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    Dropped(KeyboardInterrupt())
    gc.collect()
    assert capsys.readouterr().err == ""
    Dropped(ValueError("worth knowing"))
    gc.collect()
    assert "worth knowing" in capsys.readouterr().err
