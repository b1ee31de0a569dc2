"""Keep a compiled library off this process's stdout, where JSON may go."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_REDIRECTED = threading.Lock()


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What is written to file descriptor 1 meanwhile, by whatever language, goes to 2 instead.

    Of the whole process: keep it short. C keeps what it prints in a buffer of its own, which is
    written out at both ends.
    """
    c = ctypes.CDLL(None)
    with _REDIRECTED:
        sys.stdout.flush()
        c.fflush(None)
        kept = os.dup(1)
        try:
            os.dup2(2, 1)
            yield
        finally:
            c.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
