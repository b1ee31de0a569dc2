"""The measurement gate: while one process measures, the others on this host hold still.

A reader/writer lock on a file. Work is done in short pieces under `working()` (shared); a
measurement runs under `measuring()` (exclusive). CPU affinity alone is not enough: neighbours
share caches and memory bandwidth. A process that dies releases its locks.

flock alone would let a stream of readers starve a measurement, so everyone passes a turnstile, a
second file that is locked on the way in. A waiting measurement keeps the turnstile: newcomers queue
behind it, those inside finish.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autocomp.core.errors import InternalError
from autocomp.core.lock import locked

_held = threading.local()
"""`_held.modes`: resolved gate path → lock mode this thread holds it in."""


class Gate:
    """A reader/writer gate on `path`; picklable, each entry opens its own descriptor.

    Entering again in the same thread is free, except that `measuring()` inside `working()` is
    refused: it would wait for itself. Without a path it is always open: see `NO_GATE`.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold the gate shared. Keep the piece of work short (about 0.3 s): measuring waits for it.

        A waiting measurement goes first.
        """
        with self._entered(fcntl.LOCK_SH):
            yield

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Hold the gate alone.

        Raises:
            InternalError: inside this thread's own `working()`.
        """
        with self._entered(fcntl.LOCK_EX):
            yield

    @contextmanager
    def _entered(self, mode: int) -> Iterator[None]:
        if self.path is None:
            yield
            return
        modes: dict[str, int] = _held.__dict__.setdefault("modes", {})
        key = os.path.realpath(self.path)
        if key in modes:
            if mode == fcntl.LOCK_EX and modes[key] == fcntl.LOCK_SH:
                raise InternalError(f"measuring() inside working() on the gate {self.path}")
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        turn = self.path.with_name(self.path.name + ".turn")
        with locked(turn) as turnstile, locked(self.path, mode):
            if mode == fcntl.LOCK_SH:
                fcntl.flock(turnstile, fcntl.LOCK_UN)
            modes[key] = mode
            try:
                yield
            finally:
                del modes[key]


NO_GATE = Gate(None)
"""For who is alone on the machine: nobody waits for anybody."""
