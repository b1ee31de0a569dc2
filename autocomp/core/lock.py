"""A lock on a file, between the processes of all hosts that share it. It dies with its holder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(
    path: Path, mode: int = fcntl.LOCK_EX, waiting: Callable[[], None] | None = None
) -> Iterator[int]:
    """Hold `path`, made if need be, in a mode of `fcntl.flock`; yields its descriptor.

    Args:
        waiting: called once if others hold it, before it is waited for.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if waiting is not None:
            try:
                fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
        fcntl.flock(descriptor, mode)
        yield descriptor
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for copies a forked child may hold
        os.close(descriptor)
