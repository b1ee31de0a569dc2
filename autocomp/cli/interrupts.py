"""Ctrl-C that cannot get lost.

Python raises `KeyboardInterrupt` wherever the main thread happens to be. Third-party code swallows
it there now and then (a bare `except` while Ray or torch is imported, a callback from C++), and the
command would go on as if nothing had been said. So the signal is also remembered, and raised again
at the next step of progress. Where Python itself cannot pass the exception on (a finaliser, a hook
of a fork), it would print a traceback: that is left out.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import Any, cast

from autocomp.report.progress import SearchProgress

_stopped = threading.Event()


def listen() -> None:
    """Let SIGINT and SIGTERM stop the command, also where a shell started us with them ignored."""
    _stopped.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.unraisablehook = _unraisable


def _stop(number: int, frame: FrameType | None) -> None:
    _stopped.set()
    raise KeyboardInterrupt


def _unraisable(args: Any) -> None:
    if not issubclass(args.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(args)


class _Stoppable:
    def __init__(self, progress: SearchProgress) -> None:
        self._progress = progress

    def __getattr__(self, name: str) -> Any:
        member: Callable[..., Any] = getattr(self._progress, name)

        @wraps(member)
        def call(*arguments: Any, **named: Any) -> Any:
            if _stopped.is_set() and threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return member(*arguments, **named)

        return call


def stoppable(progress: SearchProgress) -> SearchProgress:
    """The same audience; its calls from the main thread raise `KeyboardInterrupt` once stopped."""
    return cast(SearchProgress, _Stoppable(progress))
