"""Small importable functions, actors and runners for the worker tests."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from autocomp.core.errors import StorageError


def square(value: int) -> int:
    """The later an item, the sooner it is done: results must not come in order of arrival."""
    time.sleep(max(0.0, 0.05 - 0.01 * value))
    return value * value


def threads(_: int) -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def disk_full(_: int) -> None:
    raise StorageError("cannot write x: disk full")


def slow_writer(path: str) -> None:
    """Fails at once without a path."""
    if not path:
        disk_full(0)
    time.sleep(0.5)
    Path(path).touch()


def odd(value: int) -> int:
    if value == 3:
        raise ValueError("three is odd")
    return value


def die_once(path: str) -> str:
    marker = Path(path)
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


class Counter:
    """Counts its calls; dies once on request."""

    def __init__(self, start: int) -> None:
        self.calls = start

    def add(self, item: int) -> tuple[int, int, int]:
        self.calls += 1
        return item + 1, self.calls, os.getpid()

    def die_once(self, path: str) -> str:
        return die_once(path) if path else "alive"

    def nap(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def always_dies(self, _: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fails(self, item: int) -> int:
        raise ValueError(f"bad {item}")


class Runner:
    """Runs what its payload says."""

    def __init__(self, factor: int) -> None:
        self.factor = factor
        self.runs = 0

    def setup(self, context: Mapping[str, Any]) -> None:
        self.context = dict(context)

    def start(self, payload: dict[str, Any]) -> Generator[dict[str, Any], None, dict[str, Any]]:
        self.runs += 1
        for rung in range(payload.get("rungs", 0)):
            try:
                yield {"rung": rung, "of": payload["x"]}
            except GeneratorExit:
                Path(payload["left"]).write_text(str(rung))
                raise
        if payload.get("raise"):
            raise ValueError("this trial is broken")
        if payload.get("full"):
            raise StorageError("cannot write x: disk full")
        if payload.get("die"):
            die_once(payload["die"])
        if payload.get("always"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(payload.get("sleep", 0.0))
        return {
            "value": payload["x"] * self.factor,
            "nested": {"infinite": float("inf"), "list": [1, 2]},
            "context": self.context,
            "pid": os.getpid(),
            "runs": self.runs,
        }


class BrokenSetup(Runner):
    """Cannot load what it needs."""

    def setup(self, context: Mapping[str, Any]) -> None:
        raise FileNotFoundError("teacher.safetensors is missing")


def doze(seconds: float) -> None:
    time.sleep(seconds)
