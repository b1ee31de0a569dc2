"""Stateless work in parallel: one function over many items, results in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from autocomp.core.errors import AutocompError, InternalError

T = TypeVar("T")
R = TypeVar("R")

_IN_FLIGHT_PER_WORKER = 2

_GRACE_S = 10.0
"""How long the calls in flight have to end once another has failed."""


def run_tasks(
    function: Callable[[T], R],
    items: Iterable[T],
    workers: int,
    progress: Callable[[int, int], None] | None = None,
    *,
    retries: int = 2,
) -> list[R]:
    """Call `function` on every item in worker processes.

    At most two calls per worker are in flight, so items are not copied ahead of need. A call whose
    process died is repeated; a call that raised is not.

    Args:
        function: importable, with picklable argument and result.
        items: one argument each.
        workers: how many run at a time.
        progress: called with (done, total) at the start and after each.
        retries: repetitions after a process died.

    Returns:
        Results in the order of the items.

    Raises:
        AutocompError: what the function raised, if it is one of ours.
        InternalError: for anything else, with the cause.

    After an error the few calls in flight get ten seconds to end, so that what they were storing is
    whole; the caller, who ends Ray, kills the rest. None is cancelled: cancelling one just as it
    ends makes Ray 2.60 abort the process that cancels.
    """
    import ray

    pending = list(items)
    total = len(pending)
    results: dict[int, R] = {}
    if progress is not None:
        progress(0, total)
    remote = ray.remote(num_cpus=1, max_retries=retries)(function)
    running: dict[Any, int] = {}
    index = 0
    while index < total or running:
        while index < total and len(running) < workers * _IN_FLIGHT_PER_WORKER:
            running[remote.remote(pending[index])] = index
            index += 1
        ready, _ = ray.wait(list(running), num_returns=1)
        at = running.pop(ready[0])
        try:
            results[at] = ray.get(ready[0])
        except ray.exceptions.RayError as error:
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_GRACE_S)
            name = getattr(function, "__name__", repr(function))
            raise surfaced(error, f"{name} failed on item {at + 1} of {total}") from error
        if progress is not None:
            progress(len(results), total)
    return [results[at] for at in range(total)]


def surfaced(error: BaseException, what: str) -> AutocompError:
    """Our own error as the worker raised it; anything else as an `InternalError` with its cause."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, AutocompError):
        return cause
    text = str(cause).strip().splitlines()
    first = text[0] if text else ""
    return InternalError(f"{what}: {type(cause).__name__}: {first}")
