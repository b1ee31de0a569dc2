"""Resident actors: workers that load once and answer many short calls."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

from autocomp.core.errors import InternalError
from autocomp.workers.tasks import surfaced

logger = logging.getLogger(__name__)

_QUEUED_PER_ACTOR = 2
_PATIENCE_S = 60.0
"""How long the first call waits for all workers, and the time between words in the log while none
starts."""


class ActorPool:
    """`workers` actors of one class, each in its own process.

    A call whose actor died is made again, and a new actor built from the same arguments; an item
    that kills its actor more than `retries` times fails the pool. An actor is given work once it
    has started: one that a cluster which lost a node has no core for holds nothing up. Use as a
    context manager.

    Args:
        cls: importable class.
        args: picklable constructor arguments, the same for every actor.
        workers: number of actors.
        retries: repetitions of a call whose actor died.
    """

    def __init__(
        self, cls: type, args: tuple[Any, ...] = (), workers: int = 1, *, retries: int = 2
    ) -> None:
        import ray

        self._class: Any = ray.remote(num_cpus=1, max_restarts=0)(cls)
        self._args = args
        self._name = cls.__name__
        self._retries = retries
        self._actors: dict[int, Any] = {slot: self._class.remote(*args) for slot in range(workers)}
        self._started: set[int] = set()

    def map_unordered(
        self,
        method: str,
        items: Iterable[Any],
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Call `actor.method(item)` for every item; yield (index, result) as they come.

        Two calls are queued per actor, so that none waits for the driver, and no more.

        Raises:
            AutocompError: what the method raised, if it is one of ours.
            InternalError: for anything else, or an item whose actor keeps dying.
        """
        import ray

        waiting = deque((index, item, 0) for index, item in enumerate(items))
        total, done, deaths = len(waiting), 0, 0
        running: dict[Any, tuple[int, tuple[int, Any, int]]] = {}
        load = dict.fromkeys(self._started, 0)
        starting = {
            actor.__ray_ready__.remote(): slot
            for slot, actor in self._actors.items()
            if slot not in self._started
        }
        if progress is not None:
            progress(0, total)
        if waiting and not self._started:
            ray.wait(list(starting), num_returns=len(starting), timeout=_PATIENCE_S)
        while waiting or running:
            while waiting and load and min(load.values()) < _QUEUED_PER_ACTOR:
                slot = min(load, key=load.__getitem__)
                job = waiting.popleft()
                call = getattr(self._actors[slot], method)
                running[call.remote(job[1])] = (slot, job)
                load[slot] += 1
            ready, _ = ray.wait([*starting, *running], num_returns=1, timeout=_PATIENCE_S)
            if not ready:
                if not running:
                    logger.warning("no %s worker has started yet: waiting for a core", self._name)
                continue
            if ready[0] in starting:
                slot = starting.pop(ready[0])
                try:
                    ray.get(ready[0])
                except ray.exceptions.RayActorError as error:
                    deaths += 1
                    if getattr(error, "cause", None) is not None or deaths > self._retries:
                        raise surfaced(
                            error, f"{self._name}: a worker died as it started"
                        ) from error
                    starting[self._replaced(slot)] = slot
                else:
                    self._started.add(slot)
                    load[slot] = 0
                continue
            slot, (index, item, tries) = running.pop(ready[0])
            load[slot] -= 1
            try:
                result = ray.get(ready[0])
            except ray.exceptions.RayActorError as error:
                lost = self._lost(running, slot)
                if getattr(error, "cause", None) is not None or tries >= self._retries:
                    raise surfaced(
                        error, f"{self._name}.{method}: worker died on item {index + 1}"
                    ) from error
                logger.warning("a %s worker died; its work is repeated", self._name)
                del load[slot]
                starting[self._replaced(slot)] = slot
                waiting.extendleft(lost)
                waiting.appendleft((index, item, tries + 1))
                continue
            except ray.exceptions.RayError as error:
                raise surfaced(
                    error, f"{self._name}.{method} failed on item {index + 1} of {total}"
                ) from error
            done += 1
            if progress is not None:
                progress(done, total)
            yield index, result

    def _living(self) -> list[Any]:
        return [self._actors[slot] for slot in sorted(self._started or self._actors)]

    def _replaced(self, slot: int) -> Any:
        """Put a new actor in a slot; resolves when it has started."""
        self._started.discard(slot)
        self._actors[slot] = self._class.remote(*self._args)
        return self._actors[slot].__ray_ready__.remote()

    @staticmethod
    def _lost(running: dict[Any, tuple[int, tuple[int, Any, int]]], slot: int) -> list[Any]:
        """Take the calls queued on a dead actor out of `running`."""
        references = [reference for reference, (at, _) in running.items() if at == slot]
        return [running.pop(reference)[1] for reference in references]

    def map(
        self,
        method: str,
        items: Iterable[Any],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Any]:
        """`map_unordered`, results in the order of the items."""
        results = dict(self.map_unordered(method, items, progress))
        return [results[index] for index in range(len(results))]

    def close(self) -> None:
        """End the actors' processes."""
        import ray

        actors, self._actors = self._actors, {}
        self._started.clear()
        if ray.is_initialized():
            for actor in actors.values():
                ray.kill(actor)

    def __enter__(self) -> ActorPool:
        if not self._actors:
            raise InternalError("this pool was closed")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
