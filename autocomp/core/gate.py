"""The measurement gate: while one process measures, the others on this host hold still.

A reader/writer lock on a file. Work is done in short pieces under `working()` (shared); a
measurement runs under `measuring()` (exclusive). CPU affinity alone is not enough: neighbours
share caches and memory bandwidth. A process that dies releases its lock.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Gate:
    """A reader/writer gate on `path`; picklable, each process opens its own descriptor."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold the gate shared. Keep the piece of work short (about 0.3 s): measuring waits for it.

        A waiting measurement goes first: flock alone would let a stream of readers starve it.
        """
        while self._waiting.exists() and self._fresh():
            time.sleep(0.005)
        with self._locked(fcntl.LOCK_SH):
            yield

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Hold the gate alone."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._waiting.touch()
        try:
            with self._locked(fcntl.LOCK_EX):
                self._waiting.unlink(missing_ok=True)
                yield
        finally:
            self._waiting.unlink(missing_ok=True)

    @property
    def _waiting(self) -> Path:
        return self.path.with_suffix(".waiting")

    def _fresh(self) -> bool:
        """A waiting mark older than 10 s was left by a process that died."""
        try:
            return time.time() - self._waiting.stat().st_mtime < 10.0
        except FileNotFoundError:
            return False

    @contextmanager
    def _locked(self, mode: int) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, mode)
            yield
        finally:
            os.close(descriptor)
